"""What goes wrong while people train and sweep, and what is left afterwards. docs/faults.md is the table.

Faults of the machine are brought about where that is possible (a small or read-only disk is mounted where the test may) and
played where it is not (a GPU that has no memory left).
"""

from __future__ import annotations

import ast
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_sweeps import Ears, command, experiment, other_process, read_diary, sweep
from tiny_training import files_of, tiny

from pbbench.cli.options import run_app
from pbbench.errors import InputError, StorageError, is_storage_failure
from pbbench.experiment.experiment import parse_experiment
from pbbench.records.cells import read_cells
from pbbench.sweep import local, process, worker
from pbbench.sweep.grid import plan
from pbbench.training import train as training
from pbbench.training.checkpoint import checkpoints_of, find_checkpoint, last_good, load_model
from pbbench.training.train import train, train_step

ROOT = Path(__file__).parents[2]
FULL = OSError(28, "No space left on device")
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free. "
    "Of the allocated memory 6.00 GiB is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated."
)


def fails(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str, suffix: str, call: int = 1) -> None:
    """From the ``call``-th time on, ``os.<name>`` of a path that ends like this finds no room."""
    real, count = getattr(os, name), 0

    def act(*words: Any) -> Any:
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{words[0]}") if isinstance(words[0], int) else str(words[-1])
        count += suffix in path
        if suffix in path and count >= call:
            raise FULL
        return real(*words)

    monkeypatch.setattr(os, name, act)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Any]:
    """A disk of a given size, or a read-only one; skipped where the test may not mount."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting a file system is not allowed here")
        places.append(path)
        return path

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing befell, with checkpoints at its steps 3 and 6."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(tiny(), out)
    return out


# Memory


@pytest.mark.parametrize("phase", ["load", "sample_step", "train_step"])
def test_out_of_gpu_memory_while_measuring(phase: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The step it befalls is a row; the other step is still measured."""
    from types import SimpleNamespace

    from pbbench.sweep import workload

    fine = SimpleNamespace(run=lambda: None)
    failing = SimpleNamespace(run=fails)
    monkeypatch.setattr(workload, "sampling_workload", fails if phase == "load" else lambda *_: fine)
    monkeypatch.setattr(workload, "training_workload", lambda *_: fine)
    which = "sampling_workload" if phase == "sample_step" else "training_workload"
    if phase != "load":
        monkeypatch.setattr(workload, which, lambda *_: failing)
    monkeypatch.setattr(worker, "predicted", lambda experiment, cell, name: {name: {}})
    measured: list[str] = []

    def measure(experiment: Any, cell: Any, work: Any, name: str, *_: Any) -> None:
        work.run()
        measured.append(name)

    monkeypatch.setattr(worker, "_measure_step", measure)
    rows, errors, said = told_by_worker(tmp_path, "measure")
    row = next(row for row in rows if "status" in row)
    assert row["status"] == "out_of_memory"
    assert row["phase"] == ("sample_step" if phase == "load" else phase)
    assert errors[0]["phase"] == phase
    assert (errors[0]["requested"], errors[0]["free"]) == (2 * 2**30, 2**30)
    assert measured == ["sample_step" if phase == "train_step" else "train_step"]
    assert said == "done"


@pytest.mark.parametrize("phase", ["train", "sample", "score"])
def test_out_of_gpu_memory_in_a_quality_cell(phase: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    where = {"train": "pbbench.training.train.train", "sample": "pbbench.training.generate.generate"}
    monkeypatch.setattr(where.get(phase, "pbbench.quality.scorecard.score"), fails)
    rows, errors, said = told_by_worker(tmp_path, "quality")
    assert [(row["status"], row["phase"]) for row in rows] == [("out_of_memory", "quality")]
    assert (errors[0]["phase"], errors[0]["allocated"]) == (phase, 6 * 2**30)
    assert said == "done"


def told_by_worker(tmp_path: Path, kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """What a tiny cell's worker says: its rows, its errors, the last word."""
    values = {
        "name": "tiny", "device": "cpu", "model": {"dim": 8, "dim_mults": [1, 2], "image_size": 16},
        "training": {"batch_size": 2, "num_steps": 1, "sample_every": 0, "ema_start_step": 1}, "data": {"num_images": 30},
        "sampling": {"sampler": "ddim", "num_inference_steps": 1}, "quality": {"num_images": 4}, "sweep": {"dividers": [1]},
    }  # fmt: skip
    settings = parse_experiment(values, "the test")
    cell = next(cell for cell in plan(settings) if cell.kind == kind)
    said: list[dict[str, Any]] = []
    job = {"experiment": settings.model_dump(mode="json"), "cell": cell.__dict__, "device": "cpu", "run": str(tmp_path)}
    worker.run_job(job, lambda event, **told: said.append({"event": event, **told}))
    rows = [event["row"] for event in said if event["event"] == "row"]
    return rows, [event["error"] for event in said if event["event"] == "error"], said[-1]["event"]


# Processes


def test_a_hung_cell_is_stopped_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hung: it says nothing and does not end. Its limit is a setting, because only its owner knows how long is too long."""
    path, ears = tmp_path / "diary.jsonl", Ears()
    monkeypatch.setattr(process, "COMMAND", command(path, "hangs"))
    settings = experiment(cell_timeout_seconds=0.5)
    ended = list(local.run_cells(settings, plan(settings)[:2], "cpu", tmp_path, ears, [local.Place()]))
    assert [result.status for _, result, _ in ended] == ["timed_out", "timed_out"]
    assert all("cell_timeout_seconds = 0.5 s" in result.error["message"] for _, result, _ in ended)
    lines = read_diary(path)
    assert [line["what"] for line in lines] == ["began", "child"] * 2
    deadline = time.monotonic() + 5  # a killed process is gone a moment later
    while any(alive(line["pid"]) for line in lines) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [line for line in lines if alive(line["pid"])]


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and that nobody has asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_schedulers_sigterm_stops_like_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "diary.jsonl"
    running = other_process(tmp_path / "out", "all", path, "saves")
    while not path.exists() and running.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)  # its worker says next that it trains
    running.send_signal(signal.SIGTERM)
    told, errors = running.communicate(timeout=30)
    assert told.strip() == "stopped", errors
    assert [line["what"] for line in read_diary(path)] == ["began", "saved"]
    assert not (tmp_path / "out" / "cells").exists()


# Disks


def test_a_full_disk_while_a_cell_is_written(tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch, "fsync", "/cells/", call=3)
        with pytest.raises(StorageError, match=r"cells/\S+\.json \(.*No space left.*\); make room, then go on") as caught:
            sweep(tmp_path / "out")
    assert "\n" not in str(caught.value)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/cells").iterdir()}
    assert len(before) == 2  # the finished ones, whole, and no third
    assert sweep(tmp_path / "out", resume=True) == (True, True)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_a_worker_that_cannot_write_ends_the_sweep(tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would befall every cell after it: one line, and no cell is recorded as failed."""
    monkeypatch.setattr(process, "COMMAND", command(diary, "disk"))
    with pytest.raises(StorageError, match="No space left"):
        sweep(tmp_path / "out")
    assert len(read_diary(diary)) == 1
    assert not (tmp_path / "out" / "cells").exists()
    monkeypatch.setattr(process, "COMMAND", command(diary))
    assert sweep(tmp_path / "out", resume=True) == (True, True)


def test_a_worker_tells_a_full_disk_from_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise FULL

    monkeypatch.setattr("pbbench.training.train.train", write)
    rows, errors, said = told_by_worker(tmp_path, "quality")
    assert (rows, errors, said) == ([], [], "disk")


@pytest.mark.parametrize(("call", "suffix"), [("fsync", "optimizer.safetensors"), ("replace", "step-00000006")])
def test_a_full_disk_while_a_checkpoint_is_written(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, call: str, suffix: str
) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch, call, suffix, call=2 if call == "fsync" else 1)
        with pytest.raises(StorageError, match=r"step-00000006 \(.*No space left.*\); make room"):
            train(tiny(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]  # the good one, no half one
    train(tiny(), tmp_path / "run", resume=True)
    assert files_of(tmp_path / "run") == files_of(straight)


def test_a_disk_that_is_really_full(straight: Path, mounted: Any) -> None:
    size = sum(path.stat().st_size for path in checkpoints_of(straight)[-1].iterdir())
    disk = mounted(f"size={int(size * 1.6)}")  # room for one checkpoint and a half
    with pytest.raises(StorageError, match=r"No space left on device.*make room") as caught:
        train(tiny(), disk / "run")
    assert is_storage_failure(caught.value)
    assert last_good(disk / "run") == disk / "run/checkpoints/step-00000003"
    subprocess.run(["mount", "-o", f"remount,size={size * 4}", disk], check=True)
    train(tiny(), disk / "run", resume=True)
    assert files_of(disk / "run") == files_of(straight)


def test_a_read_only_results_folder(diary: Path, mounted: Any) -> None:
    disk = mounted("ro")
    for out in (disk, disk / "out"):
        with pytest.raises(StorageError, match=r"cannot write to .*Read-only file system.*choose another folder"):
            sweep(out)
    assert not read_diary(diary)


def test_a_results_folder_that_turns_read_only(tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(StorageError, match=r"Read-only file system.*choose another folder"):
            sweep(tmp_path / "out")
    assert sweep(tmp_path / "out", resume=True) == (True, True)


@pytest.mark.parametrize("error", [StorageError("cannot write to out (full); make room"), InputError("bad")])
def test_the_command_ends_with_2_and_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    from pbbench.cli import app

    monkeypatch.setattr("pbbench.sweep.run.run_sweep", refuse)
    monkeypatch.setattr("pbbench.records.environment.probe", lambda device: {"device": "cpu"})
    assert run_app(app, ["sweep", "--memory-only", "--out", "somewhere"]) == 2
    assert capsys.readouterr().err == f"pbbench: {error}\n"


# Files that are not what was written


def test_a_corrupt_cell_file_is_named_and_done_again_when_moved_away(tmp_path: Path, diary: Path) -> None:
    settings = experiment()
    sweep(tmp_path / "out", settings=settings)
    broken = sorted((tmp_path / "out/cells").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:-40])
    with pytest.raises(InputError, match=rf"{broken.name} is not a cell's result .*move it away and resume") as caught:
        sweep(tmp_path / "out", resume=True, settings=settings)
    assert "\n" not in str(caught.value)
    broken.unlink()
    assert sweep(tmp_path / "out", resume=True, settings=settings) == (True, True)
    assert len(read_diary(diary)) == 2 * (3 + 1)
    assert len(read_cells(tmp_path / "out")) == 3


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path) -> None:
    """One bit, in the last tensor: the file is as long as it was and can be read."""
    content = bytearray(path.read_bytes())
    content[-20] ^= 4
    path.write_bytes(content)


DAMAGE = {
    **{f"torn {name}": (name, torn) for name in ("model.safetensors", "optimizer.safetensors", "training_state.json")},
    **{f"a bit of {name}": (name, changed) for name in ("ema.safetensors", "optimizer.safetensors", "training_state.json")},
    **{f"no {name}": (name, Path.unlink) for name in ("model.safetensors", "config.json")},
    "torn config.json": ("config.json", torn),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_broken_checkpoint_is_passed_over_and_training_ends_the_same(
    tmp_path: Path, straight: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage = DAMAGE[what]
    run = shutil.copytree(straight, tmp_path / "run")
    newest = checkpoints_of(run)[-1]
    damage(newest / name)
    assert find_checkpoint(run).name == "step-00000003"
    assert train(tiny(), run, resume=True).checkpoint == newest
    assert files_of(run) == files_of(straight)
    assert (run / "checkpoints/broken-step-00000006").is_dir()  # kept for whoever wants to look
    if what != "no config.json":  # without one it never passed for a checkpoint
        assert f"step-00000006/{name}" in capsys.readouterr().err


def test_a_checkpoint_that_is_named_is_never_passed_over(tmp_path: Path, straight: Path) -> None:
    newest = checkpoints_of(shutil.copytree(straight, tmp_path / "run"))[-1]
    changed(newest / "ema.safetensors")
    with pytest.raises(InputError, match=r"ema\.safetensors is broken: .*checksum"):
        load_model(newest)


def test_no_checkpoint_is_whole(tmp_path: Path, straight: Path) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    for folder in checkpoints_of(run):
        torn(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"none of the checkpoints .* is whole"):
        train(tiny(), run, resume=True)
    assert len(checkpoints_of(run)) == 2  # nothing was thrown away


# Numbers and clocks


def test_after_a_nan_loss_training_goes_on_from_the_last_good_checkpoint(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def poison(model: Any, x_start: Any, *tensors: Any, **arguments: Any) -> Any:
            steps.append(1)
            return train_step(model, x_start * (math.nan if len(steps) == 5 else 1), *tensors, **arguments)

        steps: list[int] = []
        patch.setattr(training, "train_step", poison)
        stopped = train(tiny(), tmp_path / "run")
    assert (stopped.status, stopped.steps) == ("nan_loss", 5)
    assert len(steps) == 5  # it stopped there, not when it was to save next
    assert stopped.checkpoint == tmp_path / "run/checkpoints/step-00000003"
    assert train(tiny(), tmp_path / "run", resume=True).status == "ok"
    assert files_of(tmp_path / "run") == files_of(straight)


def test_a_clock_that_jumps_back(tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durations come from a clock that never does, and neither names nor order of cells come from the time at all."""
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(hours) * 3600.0)
    seconds: list[float] = []
    ears = Ears()
    monkeypatch.setattr(ears, "cell_ended", lambda cell, result, took: seconds.append(took))
    assert sweep(tmp_path / "out", ears, settings=experiment(repeats=1)) == (True, True)
    assert all(0 < took < 60 for took in seconds)
    result = train(tiny(), tmp_path / "run", progress=lambda state: seconds.append(state["seconds_left"] or 0))
    assert 0 < result.seconds < 600
    assert all(took >= 0 for took in seconds)


def test_nothing_measures_with_a_clock_that_can_jump() -> None:
    used = [
        f"{path.name}:{node.lineno}"
        for path in (ROOT / "pbbench").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns", "datetime.utcnow")
    ]
    assert used == []
