"""What a sweep on a GPU teaches a prediction: workspaces and the context, and that nothing unknown becomes 0."""

from pathlib import Path

import pytest
from make_run import measure_cell

from pbbench.errors import InputError
from pbbench.records.cells import write_cell
from pbbench.records.files import write_json
from pbbench.sweep.planning.calibration import UNCALIBRATED, calibrate

MIB = 2**20


def gpu_run(folder: Path, *, predicted: bool = True, process: int | None = 900 * MIB, gpu: str | None = "H200") -> Path:
    for divider in (1, 2):
        cell = measure_cell(divider, 32, device="cuda", predicted=predicted)
        closing = {"allocated": 100 * MIB, "reserved": 400 * MIB, "process": process}
        cell.details["ledger"] = {"train_step": {"closing": closing}}
        write_cell(folder, cell)
    write_json(folder / "environment.json", {"gpu": gpu, "torch": "2.15.0"})
    return folder


def test_the_terms_of_a_run(tmp_path: Path) -> None:
    found = calibrate(gpu_run(tmp_path))
    assert found.workspace_bytes == 20 * MIB  # make_run predicts 20 MiB less than it measures
    assert found.context_bytes == 500 * MIB
    assert found.known_bytes == 520 * MIB
    told = found.as_dict(reserved_bytes=MIB)
    assert told["predicted_process_bytes"] == 521 * MIB
    assert told["reasons"] == {}
    assert "H200" in found.describe()


def test_what_a_run_did_not_read_stays_unknown(tmp_path: Path) -> None:
    found = calibrate(gpu_run(tmp_path, predicted=False, process=None))
    assert (found.workspace_bytes, found.context_bytes) == (None, None)
    told = found.as_dict(reserved_bytes=MIB)
    assert told["predicted_process_bytes"] is None
    assert set(told["reasons"]) == {"workspace_bytes", "context_bytes", "predicted_process_bytes"}


def test_without_a_run_all_terms_are_null() -> None:
    told = UNCALIBRATED.as_dict(MIB)
    assert told["workspace_bytes"] is told["context_bytes"] is told["predicted_process_bytes"] is None
    assert "unknown" in UNCALIBRATED.describe()


def test_a_run_on_a_cpu_calibrates_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not measured on a GPU"):
        calibrate(gpu_run(tmp_path, gpu=None))
    (tmp_path / "environment.json").write_text("[")
    with pytest.raises(InputError, match=r"environment\.json"):
        calibrate(tmp_path)
