"""Rows and cell files: null with a reason instead of 0, whole or not at all, foreign files refused."""

import json
import os

import pytest
from pydantic import ValidationError

from pbbench.errors import InputError, StorageError
from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import CellResult, read_cell, read_cells, rows_of, write_cell
from pbbench.records.rows import COLUMNS, SCHEMA_VERSION, Row


def cell(**row):
    rows = [Row(cell="d1-p8-b8-no", phase="train_step", **row)]
    return CellResult(id="d1-p8-b8-no", kind="measure", status="ok", axes={"patch_divider": 1}, rows=rows)


def test_a_cell_comes_back_as_it_was_written(tmp_path):
    written = cell(peak_live_bytes=12345678901234567, seconds_per_step=0.25, reasons={"peak_reserved_bytes": "no GPU"})
    write_cell(tmp_path, written)
    assert read_cells(tmp_path) == [written]
    assert list(rows_of([written])[0]) == list(COLUMNS)


def test_a_number_that_is_not_finite_becomes_null_with_a_reason(tmp_path):
    write_cell(tmp_path, cell(held_out_loss=float("nan"), seconds_per_step=float("inf")))
    row = read_cells(tmp_path)[0].rows[0]
    assert row.held_out_loss is None
    assert "nan" in row.reasons["held_out_loss"]
    assert "inf" in row.reasons["seconds_per_step"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    write_cell(tmp_path, cell(seconds_per_step=1.0))

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"d1-p8-b8-no\.json .*No space .*make room"):
        write_cell(tmp_path, cell(seconds_per_step=2.0))
    assert read_cells(tmp_path)[0].rows[0].seconds_per_step == 1.0
    assert [p.name for p in (tmp_path / "cells").iterdir()] == ["d1-p8-b8-no.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"id": "x"}', '{"schema_version": "two"}'])
def test_a_broken_cell_file_is_named(tmp_path, text):
    path = tmp_path / "cell.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"cell\.json"):
        read_cell(path)


def test_a_newer_schema_is_refused(tmp_path):
    write_cell(tmp_path, cell())
    path = tmp_path / "cells" / "d1-p8-b8-no.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(InputError, match="update pbbench"):
        read_cell(path)


def test_reasons_may_only_name_columns():
    with pytest.raises(ValidationError, match="unknown columns: peak_bytes"):
        Row(cell="x", phase="load", reasons={"peak_bytes": "?"})


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no cells"):
        read_cells(tmp_path)
    with pytest.raises(InputError, match="no run folder"):
        read_cells(tmp_path / "absent")


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (20_420_402_176, "19.0 GiB")],
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text
