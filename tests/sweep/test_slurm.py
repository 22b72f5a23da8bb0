"""Cells as jobs of a scheduler: what a job does whatever happens to it, what the submitting process makes of the queue.

The whole of it runs once through submitit's own "local" cluster, which starts the same jobs as processes.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_sweeps import ENVIRONMENT, Ears, command, experiment, held_elsewhere, read_diary

from pbbench.errors import InputError
from pbbench.records import folder
from pbbench.records.cells import CellResult, read_cells, write_cell
from pbbench.sweep import process, run, slurm
from pbbench.sweep.grid import plan
from pbbench.sweep.run import Shard, run_sweep

submitit = pytest.importorskip("submitit")


@pytest.fixture
def diary(diary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's programs seem to be there, and nothing waits long for them."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(slurm, "GONE_SECONDS", 0.05)
    return diary


def job_of(out: Path, number: int = 0, **more: Any) -> slurm.CellJob:
    settings = experiment()
    values = {"any_environment": False, **more}
    return slurm.CellJob(settings.model_dump(mode="json"), plan(settings)[number].id, "cpu", str(out), **values)


class FakeQueue:
    """Jobs that a test moves through the queue by hand, one state per look; "runs" does the cell, "says" leaves a last word."""

    def __init__(self, tmp_path: Path, *course: str) -> None:
        self.tmp_path, self.course, self.cancelled = tmp_path, list(course), 0

    def submit(self, experiment: Any, jobs: list[slurm.CellJob], out: Path) -> list[Any]:
        self.jobs = jobs
        errors = self.tmp_path / "job.err"
        errors.write_text("")
        handles = [
            SimpleNamespace(job_id=f"7_{n}", state="UNKNOWN", cancel=self.cancel, paths=SimpleNamespace(stderr=errors))
            for n in range(len(jobs))
        ]
        self.handles = handles
        return handles

    def cancel(self, check: bool) -> None:
        self.cancelled += 1

    def look(self, handles: list[Any]) -> dict[str, str] | None:
        step = self.course.pop(0) if len(self.course) > 1 else self.course[0]
        if step == "silent":
            return None
        if step.startswith("gone"):
            for handle in handles:
                handle.state = step.partition(" ")[2] or "UNKNOWN"
            return {}
        if step == "says":
            (self.tmp_path / "job.err").write_text("submitit INFO\npbbench: the disk is full\nsrun: error: Exited with 2\n")
            return {}
        if step == "runs":
            for job in self.jobs:
                job()
            return {}
        return {handle.job_id: step for handle in handles}


def sweep(out: Path, listener: Any = None, **more: Any) -> Any:
    words = {"resume": False, "any_environment": False, "executor": "slurm", **more}
    return run_sweep(experiment(), "cpu", out, listener=listener or Ears(), **words)


@pytest.fixture
def queue(tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def begin(*course: str) -> FakeQueue:
        fake = FakeQueue(tmp_path, *course)
        monkeypatch.setattr(slurm, "_submit", fake.submit)
        monkeypatch.setattr(slurm, "_queue", fake.look)
        return fake

    return begin


@pytest.mark.slow
def test_a_sweep_through_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real cells as jobs; then, resumed with another time limit, nothing is left to do."""
    monkeypatch.setattr(slurm, "CLUSTER", "local")
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.2)
    settings, ears, out = experiment(dividers=[1, 2], measured_steps=1), Ears(), tmp_path / "out"
    words: dict[str, Any] = {"any_environment": False, "listener": ears, "executor": "slurm"}
    assert run_sweep(settings, "cpu", out, resume=False, **words) == (True, True)
    assert [cell.status for cell in read_cells(out)] == ["ok", "ok"]
    assert sorted(cell for what, cell in ears.heard if what == "ok") == [cell.id for cell in plan(settings)]
    assert (out / "environment.json").is_file()  # of the machine the jobs ran on: they write it
    assert (out / "report.html").is_file()
    jobs = len(list((out / "slurm").iterdir()))
    longer = settings.model_copy(update={"slurm": settings.slurm.model_copy(update={"minutes_per_cell": 7})})
    assert run_sweep(longer, "cpu", out, resume=True, **words) == (True, True)
    assert len(list((out / "slurm").iterdir())) == jobs


def test_results_are_told_as_they_come(tmp_path: Path, queue: Any, diary: Path) -> None:
    queue("PENDING", "silent", "RUNNING", "runs")
    ears = Ears()
    assert sweep(tmp_path / "out", ears) == (True, True)
    names = [cell.id for cell in plan(experiment())]
    assert [cell for what, cell in ears.heard if what == "began"] == names
    assert [cell for what, cell in ears.heard if what == "ok"] == names
    assert len(read_diary(diary)) == 6  # the submitting process ran none


@pytest.mark.parametrize(
    ("state", "status"), [("UNKNOWN", "killed"), ("TIMEOUT", "timed_out"), ("OUT_OF_MEMORY", "out_of_memory")]
)
def test_a_job_that_vanishes_is_a_row_with_its_cause(tmp_path: Path, queue: Any, state: str, status: str) -> None:
    queue("RUNNING", f"gone {state}")
    assert sweep(tmp_path / "out") == (False, True)
    cells = read_cells(tmp_path / "out")
    assert {cell.status for cell in cells} == {status}
    assert all("Slurm's job 7_" in cell.error["message"] for cell in cells)
    assert all((state in cell.error["message"]) == (state != "UNKNOWN") for cell in cells)


def test_a_job_that_is_queued_again_is_waited_for(tmp_path: Path, queue: Any) -> None:
    queue("RUNNING", "COMPLETING", "PENDING", "RUNNING", "runs")
    ears = Ears()
    assert sweep(tmp_path / "out", ears).fine
    first = plan(experiment())[0]
    assert ("note", f"{first.id}: its job waits in the queue again") in ears.heard


def test_a_result_that_shows_after_its_job_has_gone_is_waited_for(
    tmp_path: Path, queue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may show the file late."""
    queue("RUNNING", "gone", "gone", "runs")
    monkeypatch.setattr(slurm, "GONE_SECONDS", 60)
    assert sweep(tmp_path / "out") == (True, True)


def test_a_job_that_cannot_go_on_ends_the_sweep_and_the_other_jobs(tmp_path: Path, queue: Any) -> None:
    fake = queue("RUNNING", "says")
    with pytest.raises(InputError, match="the disk is full"):
        sweep(tmp_path / "out")
    assert fake.cancelled == 3
    assert not (tmp_path / "out" / "cells").exists()
    fake.course = ["runs"]
    assert sweep(tmp_path / "out", resume=True) == (True, True)


def test_ctrl_c_cancels_what_is_left_and_the_sweep_goes_on_from_there(
    tmp_path: Path, queue: Any, diary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = queue("RUNNING")
    ears = Ears()

    def stop(cell: Any, event: Any) -> None:
        fake.jobs[0]()
        raise KeyboardInterrupt

    monkeypatch.setattr(ears, "cell_event", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "out", ears)
    assert fake.cancelled == 3
    fake.course = ["runs"]
    assert sweep(tmp_path / "out", resume=True) == (True, True)
    assert len(fake.jobs) == 2
    assert [line["what"] for line in read_diary(diary)].count("began") == 3


def test_a_job_does_nothing_twice(tmp_path: Path, diary: Path) -> None:
    """Requeued after its cell was written, or submitted again while an older job waits in the queue."""
    job_of(tmp_path / "out")()
    before = (tmp_path / "out/cells").stat().st_mtime_ns
    job_of(tmp_path / "out")()
    assert (tmp_path / "out/cells").stat().st_mtime_ns == before
    assert len(read_diary(diary)) == 2


def test_a_job_waits_while_another_does_its_cell(tmp_path: Path, diary: Path) -> None:
    out = tmp_path / "out"
    holder = held_elsewhere(out, folder.CELLS)
    holder.__enter__()

    def finish(*_: Any) -> None:  # the other one writes the cell and lets go
        cell = plan(experiment())[0]
        write_cell(out, CellResult(id=cell.id, kind="measure", status="ok", axes=cell.axes(), rows=[]))
        holder.__exit__(None, None, None)

    previous = signal.signal(signal.SIGALRM, finish)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        job_of(out)()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not read_diary(diary)
    assert len(read_cells(out)) == 1


def test_nodes_that_are_not_alike_are_told_to_the_submitter(
    tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    job_of(out)()
    monkeypatch.setattr(run.environments, "probe", lambda device: {**ENVIRONMENT, "torch": "9.9"})
    with pytest.raises(SystemExit) as left:
        job_of(out, 1)()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("pbbench: --resume: this is not the environment")
    job_of(out, 1, any_environment=True)()
    assert len(read_cells(out)) == 2


def test_before_a_job_is_requeued_its_training_saves(tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As submitit does it: the handler of its signal calls ``checkpoint`` and leaves by SystemExit."""
    monkeypatch.setattr(process, "COMMAND", command(diary, "saves"))
    job = job_of(tmp_path / "out")
    again: list[Any] = []

    def preempted(*_: Any) -> None:
        again.append(job.checkpoint())
        sys.exit(-1)

    previous = signal.signal(signal.SIGUSR2, preempted)
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-c", "import os,sys,time\nwhile not os.path.exists(sys.argv[1]): time.sleep(.02)\n"
         "time.sleep(.3); os.kill(os.getppid(), 12)", str(diary)]
    )  # fmt: skip
    try:
        with pytest.raises(SystemExit):
            job()
    finally:
        signal.signal(signal.SIGUSR2, previous)
        watcher.wait()
    assert [line["what"] for line in read_diary(diary)] == ["began", "saved"]
    assert not (tmp_path / "out/cells").exists()  # an interrupted cell is no result
    assert again[0].function == replace(job, running={})


def test_a_worker_that_a_preemption_ended_is_no_result(tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's SIGTERM reaches the worker first; the job itself is ended later, and is queued again."""
    monkeypatch.setattr(process, "COMMAND", command(diary, "ended by SIGTERM"))
    waited: list[float] = []

    def ended_by_slurm(seconds: float) -> None:
        waited.append(seconds)
        sys.exit(-1)

    monkeypatch.setattr(slurm.time, "sleep", ended_by_slurm)
    with pytest.raises(SystemExit):
        job_of(tmp_path / "out")()
    assert waited == [slurm.PREEMPTION_SECONDS]
    assert not (tmp_path / "out/cells").exists()


def test_a_worker_outlives_the_signal_that_warns_its_job() -> None:
    """Slurm sends it to every process of the job; a worker it killed would be taken for a cell that failed."""
    worker = subprocess.Popen([sys.executable, "-m", "pbbench.sweep.worker"], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        ignored = 0
        while not ignored and time.monotonic() < deadline:
            time.sleep(0.05)
            line = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{worker.pid}/status").read_text())
            ignored = int(line[1], 16) & 1 << (signal.SIGUSR2 - 1) if line else 0
        assert ignored
    finally:
        worker.kill()
        worker.communicate()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand-ins for Slurm's programs, as shell scripts that come first on the path."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (tmp_path / "bin").mkdir()

    def write(name: str, script: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return write


def test_slurm_is_asked_for_what_the_experiment_says(tmp_path: Path, program: Any) -> None:
    """In the very file that submitit gives to sbatch."""
    settings = experiment()
    section = {"partition": "gpu", "minutes_per_cell": 90, "memory_gib": 64, "cpus_per_cell": 8, "extra": {"qos": "low"}}
    settings = settings.model_copy(update={"slurm": settings.slurm.model_copy(update=section)})
    jobs = [replace(job_of(tmp_path, number), device="cuda") for number in range(3)]
    program("srun", "exit 1")
    program("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(InputError, match=r"refused the cells \(sbatch: error: invalid partition specified: gpu\)"):
        slurm._submit(settings, jobs, tmp_path)
    program("sbatch", "cp $1 $(dirname $0)/asked; echo Submitted batch job 7")
    assert [job.job_id for job in slurm._submit(settings, jobs, tmp_path)] == ["7_0", "7_1", "7_2"]
    asked = set(re.findall(r"^#SBATCH --(\S+)", (tmp_path / "bin/asked").read_text(), re.MULTILINE))
    assert asked >= {"array=0-2%3", "gpus-per-node=1", "nodes=1", "partition=gpu", "time=90", "mem=64GB", "cpus-per-task=8"}
    assert asked >= {"qos=low", "requeue", "signal=USR2@90", "job-name=pbbench-fake"}


def test_the_queue_is_read_in_one_call(program: Any) -> None:
    program("squeue", "echo '7_0 RUNNING'; echo '7_1 PENDING'")
    assert slurm._queue([]) == {"7_0": "RUNNING", "7_1": "PENDING"}
    program("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert slurm._queue([]) is None  # unknown is not gone: the sweep goes on waiting


def test_without_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"submitit is not installed; pip install 'pbbench\[slurm\]'"):
        sweep(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("absent", slurm.PROGRAMS)
def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name == absent else f"/usr/bin/{name}")
    with pytest.raises(InputError, match=f"{absent} not found here"):
        sweep(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_are_for_other_schedulers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--shard is for schedulers other than Slurm"):
        sweep(tmp_path / "out", shard=Shard(1, 2))


def test_two_submitters_the_second_is_refused(tmp_path: Path, queue: Any) -> None:
    fake = queue("runs")
    with held_elsewhere(tmp_path / "out", folder.SUBMITTER), pytest.raises(InputError, match="another sweep"):
        sweep(tmp_path / "out")
    assert not hasattr(fake, "jobs")
