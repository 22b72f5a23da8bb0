"""The one command for a GPU, gone through on a CPU: every check runs, one that fails stops no other, the summary says so."""

import json
import sys
from pathlib import Path

import pytest
from make_run import measure_cell

from pbbench.records.cells import write_cell

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "gpu"))
import evidence
import traces

TINY = """
name = "tiny"
[model]
dim = 8
dim_mults = [1, 2]
image_size = 16
[sweep]
dividers = [1, 2]
batch_sizes = [1, 2]
patch_batch_sizes = ["index"]
warmup_steps = 1
measured_steps = 2
quality = false
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path / "tiny.toml"


def test_steps_are_traced_where_there_is_no_gpu(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert traces.main(["--experiment", str(tiny), "--out", str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "traces.json").read_text())
    assert [(one["cell"], one["step"]) for one in found["steps"][:2]] == [
        ("d1-p1-b1-no", "sample_step"),
        ("d1-p1-b1-no", "train_step"),
    ]
    assert len(found["steps"]) == 8
    assert all(one["events"] > 100 and one["figures"]["predicted_reserved_bytes"] > 0 for one in found["steps"])
    assert "0 of 0 recorded steps" in capsys.readouterr().out


def test_time_runs_out_for_steps_not_yet_begun(tiny: Path, tmp_path: Path) -> None:
    assert traces.main(["--experiment", str(tiny), "--out", str(tmp_path), "--device", "cpu", "--seconds", "-1"]) == 0
    assert json.loads((tmp_path / "traces.json").read_text()) == {"steps": [], "left_out_for_time": 8}


def test_a_check_passes_fails_or_runs_out_of_time(tmp_path: Path) -> None:
    for code, status in (("print('fine')", "passed"), ("raise SystemExit(3)", "failed"), ("while True: pass", "timed_out")):
        check = evidence.run_check(status, [sys.executable, "-c", code], tmp_path, 1.5)
        assert check["status"] == status
    assert (tmp_path / "logs" / "passed.log").read_text() == "fine\n"


def test_predictions_are_held_against_the_target(tmp_path: Path) -> None:
    """make_run predicts 20 MiB less allocated than it measures: more than 2% of a small cell's peak."""
    write_cell(tmp_path, measure_cell(4, 32, device="cuda", predicted=True))
    allocated, reserved = evidence.compare_predictions(tmp_path)
    errors = evidence.errors([measure_cell(4, 32, device="cuda", predicted=True)], "allocated")
    assert len(errors) == 2
    assert all(error < 0 for error in errors)
    assert allocated["status"] == ("passed" if all(abs(error) <= 0.02 for error in errors) else "failed")
    assert "of 2 within 2%" in allocated["said"]
    assert reserved["check"] == "predicted reserved"


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    (failed,) = evidence.compare_predictions(tmp_path / "nowhere")
    assert failed["status"] == "failed"
    write_cell(tmp_path, measure_cell(4, 32, device="cpu"))
    assert {line["status"] for line in evidence.compare_predictions(tmp_path)} == {"not measured"}


@pytest.mark.slow
def test_the_whole_procedure(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: doctor, traces and grid pass; the cuda tests are replaced by one process that fails, and the rest goes on."""
    tiny.write_text(TINY.replace("[1, 2]\nbatch_sizes = [1, 2]", "[2]\nbatch_sizes = [1]"))
    run_check = evidence.run_check

    def without_tests(name: str, words: list[str], out: Path, limit: float) -> evidence.Check:
        return run_check(name, [sys.executable, "-c", "raise SystemExit(1)"] if name == "meters" else words, out, limit)

    monkeypatch.setattr(evidence, "run_check", without_tests)
    out = tmp_path / "out"
    assert evidence.main(["--experiment", str(tiny), "--device", "cpu", "--out", str(out), "--minutes", "5"]) == 1
    status = {check["check"]: check["status"] for check in json.loads((out / "summary.json").read_text())["checks"]}
    assert {name: status[name] for name in ("meters", "traces", "grid", "report")} == {
        "meters": "failed",
        "traces": "passed",
        "grid": "passed",
        "report": "passed",
    }
    text = (out / "summary.md").read_text()
    assert "no GPU" in text
    assert "| predicted allocated | not measured |" in text
    assert evidence.main(["--experiment", str(tiny), "--device", "cpu", "--out", str(out)]) == 2
