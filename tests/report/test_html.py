"""The whole report: what it writes, that the page stands alone and says what was and was not measured, that it is the same
each time, and that no run is too poor or too broken for it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from make_run import make_run

from pbbench.errors import InputError
from pbbench.records.cells import CellResult, read_cells, write_cell
from pbbench.records.rows import COLUMNS
from pbbench.report import write_report

CHARTS = ("memory_quality", "memory_split", "speed_memory", "samples")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CPU run with one configuration out of memory, reported."""
    folder = make_run(
        tmp_path_factory.mktemp("cpu"), dividers=(1, 2), failed={"d2-p128-b32-no": {"train_step": "out_of_memory"}}
    )
    write_report(folder)
    return folder


class Page(HTMLParser):
    """What a browser would fetch, the page's text, and whether its elements close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")
        ]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_writes_every_form(tmp_path: Path) -> None:
    folder = make_run(tmp_path, dividers=(1, 2))
    written = write_report(folder)
    names = {str(path.relative_to(folder)) for path in written}
    figures = {f"figures/{name}.{kind}" for name in CHARTS for kind in ("png", "svg")}
    assert names == figures | {"results.csv", "results.json", "report.md", "report.html", "table.tex"}
    assert all(path.stat().st_size > 100 for path in written)
    assert not list(folder.rglob(".*"))  # nothing half written stays behind


def test_the_page_stands_alone(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert len(page.references) == 4
    assert all(reference.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for reference in page.references)
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    without_figures = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|//|url\(|@import", without_figures)


def test_the_pages_say_what_was_measured(run: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (run / name).read_text(encoding="utf-8")
        said = " ".join(Page(text).text.split()) if name.endswith("html") else text
        for expected in (
            "Measured on a CPU with torch 2.15.0",
            "0123abc",  # the commit
            "seed 0",
            "live tensor bytes (peak_live_bytes)",
            "8.0 GiB",  # of memory
            "num_steps = 500",
            "1,000",  # samples scored
            "10,000",  # reference images
            "16,000 images seen",
            "ddim, 50 steps",
            "not FID",
            "synthetic scenes, 128×128",
            "at d = 1 activations are 90% of the peak",
            "What was not measured",
            "read on CUDA devices only; this phase ran on cpu",
            "undefined without patch borders (d = 1)",
            "How to read a row",
            "What failed",
            "d2-p128-b32-no",
            "Held-out denoising loss by timestep",
        ):
            assert expected in said, f"{name} does not say {expected!r}"


def test_the_best_that_patching_saved_is_named(run: Path) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "The lowest peak of those measured: d = 2, one patch index a pass, −67%." in text


def test_results_hold_every_row_and_column(run: Path) -> None:
    rows = [row for cell in read_cells(run) for row in cell.rows]
    as_json = json.loads((run / "results.json").read_text(encoding="utf-8"))
    with (run / "results.csv").open(encoding="utf-8", newline="") as file:
        as_csv = list(csv.DictReader(file))
    assert len(rows) == len(as_json) == len(as_csv)
    assert tuple(as_csv[0]) == COLUMNS == tuple(as_json[0])
    for row, line, values in zip(rows, as_csv, as_json, strict=True):
        assert values == row.model_dump(mode="json")
        assert json.loads(line["reasons"]) == row.reasons
        assert line["peak_live_bytes"] == ("" if row.peak_live_bytes is None else str(row.peak_live_bytes))


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    """Byte for byte, in another folder and in another process with another hash seed."""
    here = make_run(tmp_path / "run", dividers=(1, 2))
    there = shutil.copytree(here, tmp_path / "elsewhere" / "run")
    write_report(here)
    code = "import sys; from pathlib import Path; from pbbench.report import write_report; write_report(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(there)], check=True, env={"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin"})
    files = sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file())
    assert len(files) > 15
    for name in files:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name


def test_reporting_needs_no_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pbbench.report import terminal_table, write_report\n"
        "assert not {'pandas', 'matplotlib', 'jinja2'} & set(sys.modules), 'importing the package must stay light'\n"
        "write_report(Path(sys.argv[1])); terminal_table(Path(sys.argv[1]))\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('torch', 'torchvision', 'pynvml')]"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)


def test_a_memory_only_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path, dividers=(1, 2), scored=False)
    names = {path.name for path in write_report(folder)}
    assert {"memory_split.png", "speed_memory.png"} <= names
    assert not {"memory_quality.png", "samples.png"} & names
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Memory against quality: this run scored no images (memory and speed only)." in text
    assert "no quality cell in this run" in text


def test_a_run_in_which_everything_failed(tmp_path: Path) -> None:
    both = {"sample_step": "crashed", "train_step": "out_of_memory"}
    every = dict.fromkeys(("d1-p32-b32-no", "d2-p128-b32-no", "d2-p32-b32-no"), both)
    folder = make_run(tmp_path, dividers=(1, 2), failed=every, quality_status={1: "nan_loss", 2: "killed"})
    names = {path.name for path in write_report(folder)}
    assert not [name for name in names if name.endswith((".png", ".svg"))]
    page = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert "crashed in sample step; out of memory in train step; nan loss in quality" in page
    assert "no step that ended well" in page
    assert "the training loss was not a number at step 17" in page
    assert "Not known for this run" in page  # whether patching pays


def test_a_run_of_one_divider_with_real_features(tmp_path: Path) -> None:
    folder = make_run(tmp_path, dividers=(4,), device="cuda", genuine=True, predicted=True)
    write_report(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| FID-1k |" in text
    assert "| 52.7 (51.6–54.3) |" in text
    assert "not FID" not in text
    assert "FID-1k lies above" in text
    assert "there is none of d = 1 in one pass to compare with" in text
    assert "### Predicted against measured" in text
    assert "### The ledger after each step" in text
    assert "NVML hides it from this container" in text


def test_a_run_without_its_other_files(tmp_path: Path) -> None:
    folder = make_run(tmp_path, dividers=(1,))
    shutil.rmtree(folder / "samples")
    (folder / "environment.json").unlink()
    (folder / "experiment.toml").write_text("= not toml")
    write_report(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "experiment.toml is missing or unreadable" in text
    assert "environment.json is missing or unreadable" in text
    assert "samples/d1-quality.png is not there" in text


def test_text_from_a_run_is_shown_not_interpreted(tmp_path: Path) -> None:
    axes = {"patch_divider": 2, "patch_batch_size": 4, "batch_size": 4, "mixed_precision": "no", "repeat": 0}
    error = {"phase": "load", "type": "crashed", "message": "<script>alert(1)</script> a|b {{ 7 * 7 }}"}
    write_cell(tmp_path, CellResult(id="x", kind="measure", status="crashed", axes=axes, rows=[], error=error))
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "<script>alert(1)</script> a|b {{ 7 * 7 }}" in page.text
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; a\|b {{ 7 \* 7 }}" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_figures_of_an_earlier_report_do_not_pass_for_this_ones(tmp_path: Path) -> None:
    folder = make_run(tmp_path, dividers=(1,), scored=False)
    stale, other = folder / "figures" / "memory_quality.png", folder / "figures" / "notes.txt"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    other.write_text("kept")
    write_report(folder)
    assert not stale.exists()
    assert other.exists()


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no cells"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no run folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "d1.json").write_text("{")
    with pytest.raises(InputError, match=r"d1\.json is not a cell's result"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]
