"""The report's tables: figures worked out by hand from a made run, honest names, and forms that fit where they are printed."""

from __future__ import annotations

import io
import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from make_run import PEAKS, make_run, measure_cell, quality_cell
from rich.console import Console

from pbbench.records.cells import CellResult, read_cells
from pbbench.records.quality_names import DISTANCE_WORDS, QUALITY_HEADERS, quality_header, quality_label
from pbbench.records.rows import CATEGORIES, COLUMNS, Row
from pbbench.report import terminal_table
from pbbench.report.pages.latex import latex_table
from pbbench.report.pages.markdown import markdown_escape, markdown_table
from pbbench.report.tables.configurations import passes, unsteadiness
from pbbench.report.tables.formatting import byte_unit, in_unit, number, percent, whole
from pbbench.report.tables.layout import Column, Table
from pbbench.report.tables.memory import (
    ledger_table,
    meters,
    meters_table,
    modules_table,
    predictions_table,
    split,
    split_table,
)
from pbbench.report.tables.missing import failures, failures_table, unmeasured
from pbbench.report.tables.quality import bands_table, quality_table
from pbbench.report.tables.results import results
from pbbench.report.tables.scores import DISTANCES, QUALITY, intervals, quality
from pbbench.report.tables.tradeoff import tradeoff, tradeoff_table

MIB = 2**20


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[CellResult]:
    """A CUDA run of four dividers, scored with the stand-in extractor."""
    return read_cells(make_run(tmp_path_factory.mktemp("cuda"), device="cuda"))


def test_tradeoff_has_one_line_per_configuration_joined_with_its_dividers_quality(cells: list[CellResult]) -> None:
    frame = tradeoff(cells)
    named = list(zip(frame["patch_divider"], frame["patches_per_pass"], strict=True))
    assert named == [(1, "all"), (2, "all"), (2, "index"), (4, "all"), (4, "index"), (8, "all"), (8, "index")]
    assert list(frame["patch_batch_size"]) == [32, 128, 32, 512, 32, 2048, 32]
    assert list(frame["random_features_frechet_distance"]) == [41.2, 44.9, 44.9, 52.7, 52.7, 71.3, 71.3]
    assert math.isnan(frame["seam_score"][0])
    assert frame["seam_score"][1] == 1.08
    assert "frechet_inception_distance" not in frame  # only columns that some divider has
    assert set(frame["status"]) == {"ok"}


def test_tradeoff_peaks_and_changes_are_those_of_the_warm_rows(cells: list[CellResult]) -> None:
    frame = tradeoff(cells)
    assert frame.attrs["memory_column"] == "peak_allocated_bytes"
    whole_image = PEAKS["train_step", 1][0] + 30  # MiB: the made allocator holds 30 more than the live tensors when warm
    chunked = PEAKS["train_step", 4][1] + 30
    assert frame["train_peak_bytes"][4] == pytest.approx(chunked * MIB, abs=1024)
    assert frame["train_peak_change"][4] == pytest.approx(chunked / whole_image - 1, abs=1e-6)
    assert frame["sample_peak_change"][0] == 0


def test_memory_column_is_live_tensors_where_no_gpu_was_read() -> None:
    cell = measure_cell(2, 32, device="cpu")
    frame = tradeoff([cell])
    assert frame.attrs["memory_column"] == "peak_live_bytes"
    warm = next(r for r in cell.rows if (r.phase, r.temperature) == ("train_step", "warm"))
    assert frame["train_peak_bytes"][0] == warm.peak_live_bytes
    assert math.isnan(frame["train_peak_change"][0])  # no d = 1 to compare with


def test_change_compares_with_the_whole_image_in_one_pass_at_the_same_batch_and_precision() -> None:
    made = [measure_cell(1, p, batch_size=n, device="cuda") for n in (8, 32) for p in (n, 4)]
    made.append(measure_cell(4, 8, batch_size=8, device="cuda"))
    frame = tradeoff(made)
    own = frame[(frame["batch_size"] == 8) & (frame["patch_divider"] == 1) & (frame["patches_per_pass"] == "all")]
    last = frame[frame["patch_divider"] == 4].iloc[0]
    assert last["train_peak_change"] == pytest.approx(last["train_peak_bytes"] / own["train_peak_bytes"].iloc[0] - 1)


def test_repeats_give_median_and_range() -> None:
    made = [measure_cell(1, 32, repeat=r) for r in range(3)]
    line = tradeoff(made).iloc[0]
    speeds = [r.images_per_second for c in made for r in c.rows if (r.phase, r.temperature) == ("sample_step", "warm")]
    assert line["repeats"] == 3
    assert line["sample_images_per_second"] == statistics.median(speeds)
    assert (line["sample_images_per_second_min"], line["sample_images_per_second_max"]) == (min(speeds), max(speeds))
    texts = tradeoff_table(made)
    column = next(c for c in texts.columns if c.title == "sample (images/s)")
    assert column.cells == ["5.55 (5.50–5.61)"]


def test_a_failed_phase_leaves_its_figures_unknown_and_keeps_the_others() -> None:
    made = [
        measure_cell(1, 32),
        measure_cell(2, 32, failed={"train_step": "out_of_memory"}),
        quality_cell(2, status="nan_loss"),
    ]
    line = tradeoff(made).iloc[1]
    assert math.isnan(line["train_peak_bytes"])
    assert line["sample_peak_bytes"] > 0
    assert line["status"] == "out_of_memory in train_step; nan_loss in quality"


def test_a_peak_read_while_the_phase_failed_does_not_count() -> None:
    cell = measure_cell(1, 32)
    row = next(r for r in cell.rows if (r.phase, r.temperature) == ("train_step", "warm"))
    row.status = "crashed"
    assert math.isnan(tradeoff([cell])["train_peak_bytes"][0])
    assert split([cell])["step"].tolist() == ["sample"]


def test_prediction_error_is_signed_and_shown_only_where_something_was_predicted(cells: list[CellResult]) -> None:
    assert not [c for c in tradeoff(cells).columns if "prediction" in c]
    assert predictions_table(cells) is None
    line = tradeoff([measure_cell(1, 32, device="cuda", predicted=True)]).iloc[0]
    live = PEAKS["train_step", 1][0]
    assert line["train_prediction_error"] == pytest.approx((live + 10) / (live + 30) - 1, abs=1e-6)  # made: 20 MiB short
    sheet = predictions_table([measure_cell(1, 32, device="cuda", predicted=True)])
    assert sheet is not None
    assert next(c for c in sheet.columns if c.title == "error of allocated").cells == ["−0.1%", "−0.6%"]


def test_energy_is_shown_only_where_the_card_counted_it() -> None:
    made = [measure_cell(d, 32, device="cuda") for d in (1, 2)]
    assert "train_joules_per_image" not in tradeoff(made)
    assert "J/img" not in markdown_table(tradeoff_table(made))
    for row in made[1].rows:
        if (row.phase, row.temperature) == ("train_step", "warm"):
            row.joules_per_image = 12.5
    assert list(tradeoff(made)["train_joules_per_image"].fillna(-1)) == [-1, 12.5]
    assert "train energy of the GPU (J/image)" in markdown_table(tradeoff_table(made))
    assert "sample energy" not in markdown_table(tradeoff_table(made))


@pytest.mark.parametrize(
    ("count", "batch", "divider", "name"),
    [
        (32, 32, 1, "all"),
        (128, 32, 2, "all"),
        (32, 32, 2, "index"),
        (7, 32, 2, "7"),
        (math.nan, 32, 2, "–"),
        (None, None, 1, "–"),
    ],
)
def test_passes_are_named(count: float, batch: int, divider: int, name: str) -> None:
    assert passes({"patch_batch_size": count, "batch_size": batch, "patch_divider": divider}) == name


def test_a_cell_that_was_killed_before_its_first_row_still_has_a_line() -> None:
    axes = {"patch_divider": 2, "patch_batch_size": "index", "batch_size": 4, "mixed_precision": "no", "repeat": 0}
    dead = CellResult(id="x", kind="measure", status="killed", axes=axes, rows=[], error={"message": "signal 9"})
    line = tradeoff([dead]).iloc[0]
    assert (line["patch_divider"], line["patch_batch_size"], line["patches_per_pass"], line["status"]) == (
        2,
        4,
        "index",
        "killed",
    )
    assert failures([dead])[0]["cause"] == "signal 9"


def test_split_sums_to_the_peak(cells: list[CellResult]) -> None:
    frame = split(cells)
    assert len(frame) == 14
    assert (frame[[f"{c}_bytes" for c in CATEGORIES]].sum(axis=1) == frame["peak_live_bytes"]).all()
    assert (frame["activation_share"] == frame["activation_bytes"] / frame["peak_live_bytes"]).all()
    sheet = split_table(cells, "sample")
    assert sheet is not None
    assert "optimizer (GiB)" not in [c.title for c in sheet.columns]  # a sampling step has none
    assert split_table([quality_cell(1)], "train") is None


def test_workspaces_are_what_cuda_allocated_beyond_live_tensors() -> None:
    """In make_run 30 MiB; null where no allocator was read, or one that held less."""
    on_gpu = split([measure_cell(2, 32, device="cuda")])
    assert (on_gpu["workspace_bytes"] == 30 * 2**20).all()
    assert (on_gpu["workspace_bytes"] + on_gpu["peak_live_bytes"] == on_gpu["measured_peak_bytes"]).all()
    sheet = split_table([measure_cell(2, 32, device="cuda")], "train")
    assert sheet is not None
    assert any(column.title.startswith("workspaces") for column in sheet.columns)
    assert any("cuDNN" in note for note in sheet.notes)
    assert split([measure_cell(2, 32, device="cpu")])["workspace_bytes"].isna().all()
    less = measure_cell(2, 32, device="cuda")
    for row in less.rows:
        if row.peak_live_bytes is not None:
            row.peak_allocated_bytes = row.peak_live_bytes - 1
    assert split([less])["workspace_bytes"].isna().all()


def test_meters_keep_cold_and_warm_apart_and_leave_out_those_that_read_nothing() -> None:
    frame = meters([measure_cell(1, 32, device="cpu")])
    assert set(frame["temperature"]) == {"cold", "warm"}
    assert {"peak_rss_bytes", "peak_live_bytes"} <= set(frame)
    assert "peak_allocated_bytes" not in frame
    sheet = meters_table([measure_cell(1, 32, device="cpu")])
    assert sheet is not None
    live = next(c for c in sheet.columns if c.title == "live tensor bytes (MiB)")
    assert live.cells == ["–", "388", "–", "66.5"]  # counted on a warm step only


def test_every_failed_phase_is_told_with_its_cause() -> None:
    cell = measure_cell(2, 32, failed={"sample_step": "crashed", "train_step": "out_of_memory"})
    found = failures([cell, measure_cell(1, 32)])
    assert [(f["status"], f["phase"]) for f in found] == [("crashed", "sample_step"), ("out_of_memory", "train_step")]
    assert found[1]["cause"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20_000 MiB & more"
    assert found[1]["bytes"]["requested"] == 20000 * MIB
    sheet = failures_table([cell])
    assert sheet is not None
    assert next(c for c in sheet.columns if c.title == "free").cells == ["–", "300 MiB"]
    assert failures_table([measure_cell(1, 32)]) is None


def test_what_is_missing_is_grouped_by_reason() -> None:
    found = unmeasured([measure_cell(1, 32), measure_cell(2, 32)])
    gpu = next(g for g in found if g["reason"].startswith("read on CUDA devices only"))
    assert gpu["columns"] == [f"peak_{k}_bytes" for k in ("allocated", "reserved", "process", "device")]
    assert gpu["phases"] == ["sample_step", "train_step"]
    assert gpu["rows"] == 8
    unscored = next(g for g in found if "no quality cell" in g["reason"])
    assert {"frechet_inception_distance", "held_out_loss", "num_images"} <= set(unscored["columns"])
    named = [c for g in found for c in g["columns"]]
    filled = {c for cell in (measure_cell(1, 32),) for row in cell.rows for c in COLUMNS if getattr(row, c) is not None}
    assert set(named) | filled == set(COLUMNS)  # no column is passed over in silence


def test_results_keep_integers_and_turn_what_is_not_finite_into_null_with_a_reason() -> None:
    row = Row(cell="a", phase="quality", num_images=5, held_out_loss=math.nan, seam_score=math.inf)
    frame = results([CellResult(id="a", kind="quality", status="ok", axes={}, rows=[row])])
    assert tuple(frame.columns) == COLUMNS
    values = frame.to_dict("records")[0]
    assert type(values["num_images"]) is int
    assert values["held_out_loss"] is None
    assert values["reasons"] == {"held_out_loss": "the value was nan", "seam_score": "the value was inf"}
    assert "NaN" not in json.dumps(frame.to_dict("records"), allow_nan=False)


def test_distances_from_the_metrics_carry_their_honest_names() -> None:
    cell = quality_cell(2)
    cell.details["metrics"] = {"unverified_inception_kernel_distance_mean": 0.5, "num_images": 1000, "anything_else": 3}
    scores = quality([cell])["", 2]
    assert scores["unverified_inception_kernel_distance_mean"] == 0.5
    assert "anything_else" not in scores


@pytest.mark.parametrize("genuine", [False, True])
def test_only_real_features_are_called_fid(genuine: bool) -> None:
    made = [measure_cell(1, 32), quality_cell(1, genuine=genuine)]
    for sheet in (tradeoff_table(made), quality_table(made)):
        assert sheet is not None
        titles = " ".join([*(c.title for c in sheet.columns), *(" ".join(c.header) for c in sheet.columns), *sheet.notes])
        assert ("FID" in titles.replace("not FID", "")) is genuine


@pytest.mark.parametrize(
    ("name", "counts", "header", "label"),
    [
        ("frechet_inception_distance", [10_000.0, None], "FID-10k", "FID-10k"),
        ("frechet_inception_distance", [5000, 50_000], "FID-5k/50k", "FID-5k/50k"),
        ("frechet_inception_distance", [2500], "FID (2,500)", "FID (2,500)"),
        ("frechet_inception_distance", [], "FID", "FID"),
        ("patch_frechet_inception_distance", [10_000], "patch FID-10k", "patch FID-10k"),
        ("kernel_inception_distance_mean", [1536], "KID (1,536)", "KID (1,536)"),
        (
            "random_features_frechet_distance",
            [256],
            "Fréchet (256), random features",
            "Fréchet distance of 256 images, random features (not FID)",
        ),
        ("held_out_loss", [256], "held-out loss", "held-out denoising loss"),
    ],
)
def test_names_carry_the_number_of_images(name: str, counts: list[float | None], header: str, label: str) -> None:
    assert " ".join(quality_header(name, counts)) == header
    assert quality_label(name, counts) == label


def test_every_quality_figure_has_a_name() -> None:
    assert set(QUALITY) == set(QUALITY_HEADERS)
    assert set(DISTANCES) == set(DISTANCE_WORDS)


def test_intervals_stand_beside_the_figure_of_a_divider_trained_once(cells: list[CellResult]) -> None:
    line = tradeoff(cells).iloc[3]
    ends = [line["random_features_frechet_distance_low"], line["random_features_frechet_distance_high"]]
    assert ends == pytest.approx([0.98 * 52.7, 1.03 * 52.7])
    sheet = quality_table(cells)
    assert sheet is not None
    column = next(c for c in sheet.columns if c.title.startswith("Fréchet"))
    assert column.cells[2] == "52.7 (51.6–54.3)"
    assert "95% interval" in sheet.notes[0]
    twice = [measure_cell(4, 32), quality_cell(4), quality_cell(4)]  # between trainings the spread is another
    assert intervals(twice) == {}
    assert "random_features_frechet_distance_low" not in tradeoff(twice)


def test_unsteady_speeds_are_called_rough() -> None:
    cell = measure_cell(1, 32)
    assert unsteadiness([cell]) == pytest.approx(1.02 / 0.99)
    assert not [n for n in tradeoff_table([cell]).notes if "rough" in n]
    cell.details["step_seconds"] = {"train_step": [1.0, 2.5]}
    assert [n for n in tradeoff_table([cell]).notes if "2.5 times" in n]
    assert math.isnan(unsteadiness([quality_cell(1)]))


def test_smaller_tables(cells: list[CellResult]) -> None:
    ledger = ledger_table(cells)
    assert ledger is not None
    assert ledger.rows[0][:4] == ("d = 1, all", "train step", "500 MiB", "1.0 MiB")
    assert ledger.rows[0][5] == "–"  # the process is hidden, so the gap to it is unknown, not 0
    assert ledger_table([measure_cell(1, 32)]) is None
    modules = modules_table(cells)
    assert modules is not None
    assert {row[1] for row in modules.rows} == {"d = 1, all", "d = 8, index"}
    bands = bands_table(cells)
    assert bands is not None
    assert [c.title for c in bands.columns] == ["d", "t = 0–249", "t = 250–499", "t = 500–749", "t = 750–999"]
    assert bands.rows[0] == ("1", "0.400", "0.200", "0.100", "0.0500")
    assert bands_table([measure_cell(1, 32)]) is None


@pytest.mark.parametrize("width", [120, 100, 80, 60, 40])
def test_terminal_table_fits_the_terminal(cells: list[CellResult], width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(terminal_table(cells, width))
    text = console.export_text()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert sum(line.lstrip().startswith(("1 all", "8 index")) for line in text.splitlines()) == 2  # each on one line
    assert "Fréchet" in text
    assert "18.99" in text
    assert ("Left out at this width" in " ".join(text.split())) is (width < 120)


def test_terminal_table_reads_a_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path, dividers=(1, 2))
    assert terminal_table(run, 100).row_count == 3


def test_latex_is_a_booktabs_table_of_the_right_shape(cells: list[CellResult]) -> None:
    sheet = tradeoff_table(cells)
    text = latex_table(sheet)
    columns = len(sheet.columns)
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 7
    assert all(line.count(" & ") == columns - 1 and line.endswith(r" \\") for line in body)
    assert text.count("\\toprule") == text.count("\\label{tab:tradeoff}") == text.count("\\caption{") == 1
    specification = text.split(r"\begin{tabular}{")[1].split("}")[0]
    assert len(specification) == columns
    assert r"\%" in text
    assert "−" not in text  # LaTeX's own minus
    assert text.isascii()


def test_latex_and_markdown_escape_what_means_something_to_them() -> None:
    sheet = Table(
        "50% & more_", [Column(("a_b",), [r"x & y_z {1} \ # $ ~ ^ 100% <0.1", "a|b <i> `c`"], numeric=False)], label="tab:x"
    )
    latex = latex_table(sheet)
    assert r"x \& y\_z \{1\} \textbackslash{} \# \$ \textasciitilde{} \textasciicircum{} 100\% $<$0.1" in latex
    assert r"50\% \& more\_" in latex
    assert r"| a\|b &lt;i&gt; \`c\` |" in markdown_table(sheet)
    assert markdown_escape("peak_live_bytes _x_") == r"peak_live_bytes \_x\_"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(cells: list[CellResult], tmp_path: Path) -> None:
    preamble = "\\documentclass{article}\\usepackage{booktabs}\\usepackage{graphicx}\\begin{document}\n"
    (tmp_path / "t.tex").write_text(preamble + latex_table(tradeoff_table(cells)) + "\\end{document}\n")
    done = subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(None), "–"),
        (number(math.nan), "–"),
        (number(0), "0"),
        (number(1234.5), "1,234"),
        (number(0.04567), "0.0457"),
        (number(-2.5e-7), "−2.50e−07"),
        (whole(10000.0), "10,000"),
        (percent(-0.8423), "−84%"),
        (percent(0.0031), "+0.3%"),
        (percent(0.0), "0%"),
        (percent(-0.00001), "0%"),
        (percent(0.9, signed=False), "90%"),
        (in_unit(19420 * MIB, "GiB", 2**30), "18.96"),
        (in_unit(553 * MIB, "MiB", MIB), "553"),
        (in_unit(33.14 * MIB, "MiB", MIB), "33.1"),
        (in_unit(1024, "MiB", MIB), "<0.1"),
        (in_unit(0, "MiB", MIB), "0"),
        (in_unit(math.nan, "MiB", MIB), "–"),
        (byte_unit([19420.0 * MIB, math.nan])[0], "GiB"),
        (byte_unit([100.0 * MIB])[0], "MiB"),
        (byte_unit([3000.0])[0], "KiB"),
    ],
)
def test_numbers_for_people(text: str, expected: str) -> None:
    assert text == expected
