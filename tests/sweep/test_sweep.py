"""The sweep: which cells, each in a process of its own, each once whatever is killed and whenever; failure is a row."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import command, pbbench, tiny
from PIL import Image

from pbbench.errors import InputError
from pbbench.records.cells import read_cells
from pbbench.sweep.grid import plan
from pbbench.sweep.local import run_cell
from pbbench.sweep.run import run_sweep


class Deaf:
    """A listener that hears nothing."""

    def started(self, cells, done): ...
    def cell_started(self, cell): ...
    def cell_event(self, cell, event): ...
    def cell_ended(self, cell, result, seconds): ...


def cell_of(experiment, kind="measure"):
    return next(cell for cell in plan(experiment) if cell.kind == kind)


def test_settings_that_come_to_the_same_are_one_cell():
    names = [cell.id for cell in plan(tiny())]
    assert names == ["d1-p2-b2-no", "d2-p2-b2-no", "d2-p8-b2-no", "d1-quality", "d2-quality"]


def test_axes_multiply_and_repeats_get_names_of_their_own():
    sweep = {
        "batch_sizes": [1, 4],
        "mixed_precisions": ["no", "bf16"],
        "patch_batch_sizes": ["all"],
        "repeats": 2,
        "quality": False,
    }
    names = [cell.id for cell in plan(tiny(sweep=sweep))]
    assert len(names) == len(set(names)) == 2 * 2 * 2 * 2
    assert "d2-p16-b4-bf16-r1" in names


@pytest.mark.parametrize("dividers", [[3], [1, 1000]])
def test_a_divider_that_does_not_fit_is_refused_before_anything_runs(dividers):
    with pytest.raises(InputError, match="would fit"):
        plan(tiny().model_copy(update={"sweep": tiny().sweep.model_copy(update={"dividers": tuple(dividers)})}))


def test_checkpoints_for_a_divider_that_is_not_swept_are_refused():
    with pytest.raises(InputError, match="divider 8"):
        plan(tiny(sweep={"checkpoints": {"8": "somewhere"}}))


def test_what_quality_cells_will_need_is_looked_at_before_anything_runs(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("damaged")
    broken = tiny(data={"source": str(tmp_path)})
    with pytest.raises(InputError, match=r"holds no readable image \(\d\.png: not a JPEG, PNG or WebP image\)"):
        plan(broken)
    plan(broken.model_copy(update={"sweep": broken.sweep.model_copy(update={"quality": False})}))
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    plan(broken)
    half = tmp_path / "half" / "checkpoints" / ".step-00000003.unfinished-1"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"checkpoints.1: .*half is not a folder that pbbench train or convert wrote"):
        plan(tiny(sweep={"checkpoints": {"1": str(tmp_path / "half")}}))


@pytest.mark.slow
def test_kill_9_at_any_moment_then_resume_does_every_cell_once(tiny_file, tmp_path):
    """Two cells that measure and one that trains, and the report."""
    out, words = tmp_path / "out", ["sweep", "--experiment", tiny_file, "--dividers", "2", "--resume", "--out"]
    cells = out / "cells"
    stamps: dict[Path, int] = {}
    # before anything is written; in the first cell; in the first quality cell, while it trains
    moments = [lambda: True, out.exists, lambda: len(list(cells.glob("*.json"))) == 2 and (out / "checkpoints").exists()]
    for moment in moments:
        process = subprocess.Popen(command(*words, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not moment() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, "the sweep ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path, stamp in stamps.items():
            assert path.stat().st_mtime_ns == stamp, f"{path.name} was done twice"
        stamps = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    done = pbbench(*words, out)
    assert done.returncode == 0, done.stderr
    assert {cell.id for cell in read_cells(out)} == {cell.id for cell in plan(tiny(sweep={"dividers": [2]}))}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_worker_leaves_when_its_parent_is_killed(tmp_path):
    """A parent that dies by kill -9 cannot tell its worker; the worker sees its stdin close."""
    job = {
        "experiment": tiny().model_dump(mode="json"),
        "cell": {**cell_of(tiny()).__dict__},
        "device": "cpu",
        "run": str(tmp_path),
    }
    job["experiment"]["sweep"]["measured_steps"] = 10_000_000
    worker = subprocess.Popen(
        [sys.executable, "-m", "pbbench.sweep.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    worker.stdin.write((json.dumps(job) + "\n").encode())
    worker.stdin.flush()
    for line in worker.stdout:
        if json.loads(line).get("phase") == "sample_step":
            break
    worker.stdin.close()
    assert worker.wait(timeout=20) == 1
    worker.stdout.close()


def cells_process():
    """The number of the process that does a cell of a sweep run here: the nursery's guardian's child."""
    number = os.getpid()
    for _ in range(3):
        found = subprocess.run(["pgrep", "-P", str(number), "-f", "pbbench.sweep.nursery"], capture_output=True, text=True)
        number = int(found.stdout.split()[0])
    return number


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("four years")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"thesis\.txt"):
            run_sweep(tiny(), "cpu", tmp_path, resume=resume, any_environment=False, listener=Deaf())
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["thesis.txt"]


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        run_sweep(tiny(), "cpu", tmp_path / "file" / "out", resume=False, any_environment=False, listener=Deaf())


def test_out_of_memory_is_a_row_for_each_step(tmp_path):
    experiment = tiny(training={"batch_size": 10**9}, sweep={"dividers": [1]})
    result = run_cell(experiment, cell_of(experiment), "cpu", tmp_path, Deaf())
    assert result.status == "out_of_memory"
    failed = [row for row in result.rows if row.status == "out_of_memory"]
    assert [row.phase for row in failed] == ["sample_step", "train_step"]
    assert result.error["requested"] > 10**9
    assert all(row.peak_live_bytes is None and "out_of_memory" in row.reasons["peak_live_bytes"] for row in failed)


def test_a_cell_that_takes_too_long_is_a_row(tmp_path):
    experiment = tiny(sweep={"measured_steps": 10_000_000, "cell_timeout_seconds": 8})
    result = run_cell(experiment, cell_of(experiment), "cpu", tmp_path, Deaf())
    assert result.status == "timed_out"
    assert result.rows[-1].status == "timed_out"
    assert "cell_timeout_seconds" in result.error["message"]


def test_a_killed_worker_is_a_row_and_keeps_what_it_had_measured(tmp_path):
    experiment = tiny(sweep={"measured_steps": 200})

    class Killer(Deaf):
        def cell_event(self, cell, event):
            if event.get("phase") == "train_step":
                os.kill(cells_process(), signal.SIGKILL)

    result = run_cell(experiment, cell_of(experiment), "cpu", tmp_path, Killer())
    assert result.status == "killed"
    assert "SIGKILL" in result.error["message"]
    assert [row.phase for row in result.rows if row.status == "ok"] == ["load", "sample_step", "sample_step"]
    assert result.rows[-1].phase == "train_step"


def test_a_loss_that_is_no_number_is_a_row(tmp_path):
    experiment = tiny(training={"learning_rate": 1e30, "num_steps": 30}, sweep={"dividers": [1]})
    result = run_cell(experiment, cell_of(experiment, "quality"), "cpu", tmp_path, Deaf())
    assert result.status == "nan_loss"
    assert "at step" in result.error["message"]
    assert result.rows[-1].phase == "quality"


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_can_be_resumed(tiny_file, tmp_path):
    out = tmp_path / "out"
    words = ["sweep", "--experiment", tiny_file, "--memory-only", "--dividers", "1", "--out", out]
    process = subprocess.Popen(
        command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it, and so would it
    )
    while not out.exists() or not (out / "logs").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert pbbench("sweep", "--resume", "--out", out).returncode == 0


@pytest.mark.parametrize("step", ["sampling_workload", "training_workload"])
def test_operations_are_counted_as_torch_counts_them(step):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pbbench.sweep import workload

    experiment = tiny()
    work = getattr(workload, step)(experiment.with_divider(1), cell_of(experiment), torch.device("cpu"))
    work.run()
    with FlopCounterMode(display=False) as torchs:
        work.run()
    with workload.FlopCount() as ours:
        work.run()
    assert ours.total == torchs.get_total_flops() > 0
