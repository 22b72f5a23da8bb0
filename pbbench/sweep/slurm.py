"""Cells as an array job of Slurm, one GPU each, through submitit (the extra ``slurm``). No torch in the submitting process.

Each job runs one cell as a local sweep would and writes the cell's file itself, so that a result outlives whoever submitted
it. The submitting process waits, looks for cell files and at the queue, and says what it sees. A job first locks its cell and
leaves where the file is there already: a job that is requeued, or submitted again by --resume while an older one still waits
in the queue, does nothing twice. submitit hands a job over as a pickle, which lies in the run's own ``slurm/`` folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pbbench.errors import InputError, StorageError, writing_to
from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.records import environment as environments
from pbbench.records import folder
from pbbench.records.cells import CellResult, read_cell, write_cell
from pbbench.records.rows import Row
from pbbench.sweep import local
from pbbench.sweep.cell_rows import base_row
from pbbench.sweep.grid import Cell, plan, resolve
from pbbench.sweep.local import Listener
from pbbench.sweep.process import SAVING_SECONDS, Worker, stop

CLUSTER = "slurm"
"""submitit's name of the scheduler; the tests put "local" here, which starts the same jobs as processes."""
PROGRAMS = ("sbatch", "srun", "squeue")
POLL_SECONDS = 5.0
GONE_SECONDS = 60.0
"""A job that has left the queue without a result is given up after so long: a network file system may show files late."""
PREEMPTION_SECONDS = 600.0
"""Slurm tells every process of a job by SIGTERM that it is preempted or cancelled, and ends it when the grace time is over. A
worker that SIGTERM ended is therefore no result until the job has lived on for so long."""
SIGNAL_SECONDS = 90
"""Slurm's warning before the time limit: enough to save a training."""


def check_installed() -> None:
    if importlib.util.find_spec("submitit") is None:
        raise InputError("--executor slurm: submitit is not installed; pip install 'pbbench[slurm]'")
    absent = [name for name in PROGRAMS if CLUSTER == "slurm" and shutil.which(name) is None]
    if absent:
        raise InputError(
            f"--executor slurm: {', '.join(absent)} not found here; run it where jobs are submitted, or use --shard"
        )


@dataclass
class CellJob:
    """What a job of the array does. Plain values, because it is pickled and may be run again after a preemption."""

    experiment: dict[str, Any]
    cell: str
    device: str
    out: str
    any_environment: bool
    running: dict[int, Worker] = field(default_factory=dict, repr=False)

    def __call__(self) -> None:
        try:
            self._run()
        except InputError as error:  # not a cell's failure: the sweep cannot go on, and whoever submitted it reads why
            print(f"pbbench: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    def _run(self) -> None:
        experiment, out = parse_experiment(self.experiment, "the job"), Path(self.out)
        cells = plan(experiment)
        number = next(n for n, cell in enumerate(cells) if cell.id == self.cell)
        environment = environments.probe(self.device)
        with folder.Claims(out) as claims, claims.waiting_for(folder.CELLS + number):
            if folder.cell_file(out, self.cell).exists():
                return
            with claims.waiting_for(folder.HEAD):
                folder.settle_environment(out, environment, any_environment=self.any_environment)
            ended = local.run_cells(
                experiment, [cells[number]], self.device, out, _Silent(), local.places(environment)[:1], self.running
            )
            _, result, _ = next(ended)
            if result.status == "killed" and "SIGTERM" in result.error["message"]:
                time.sleep(PREEMPTION_SECONDS)
            write_cell(out, result)
            ended.close()

    def checkpoint(self) -> Any:
        """Called by submitit before the job is requeued: let a training save, then the same cell again."""
        import submitit

        stop(self.running.values(), saving_seconds=SAVING_SECONDS)
        return submitit.helpers.DelayedSubmission(replace(self, running={}))


class _Silent:
    """A job's output is Slurm's log; only notes go there."""

    def started(self, cells: list[Cell], done: dict[str, str]) -> None: ...

    def cell_started(self, cell: Cell) -> None: ...

    def cell_event(self, cell: Cell, event: dict[str, Any]) -> None:
        if event["event"] == "note":
            print(event["text"], file=sys.stderr, flush=True)

    def cell_ended(self, cell: Cell, result: CellResult, seconds: float) -> None: ...


def run_cells(
    experiment: Experiment, cells: Sequence[Cell], device: str, out: Path, listener: Listener, *, any_environment: bool
) -> Generator[tuple[Cell, CellResult, float], None, None]:
    """Submit the cells as one array; yields each as its file appears, with the seconds since its job was seen to run.

    Closing the generator cancels the jobs that are left. Raises InputError where Slurm refuses the array, or where a job says
    that the sweep cannot go on (a full disk, nodes that are not alike).
    """
    if not cells:
        return
    values = experiment.model_dump(mode="json")
    jobs = [CellJob(values, cell.id, device, str(out.resolve()), any_environment) for cell in cells]
    submitted = dict(zip(cells, _submit(experiment, jobs, out), strict=True))
    waiting = {cell: _Waiting(job) for cell, job in submitted.items()}
    try:
        while waiting:
            queue = _queue([entry.job for entry in waiting.values()])
            for cell, entry in list(waiting.items()):
                path = folder.cell_file(out, cell.id)
                result = read_cell(path) if path.exists() else None
                if result is None and queue is not None:
                    _tell(cell, entry, queue.get(entry.job.job_id), listener)
                    if entry.gone is not None and time.monotonic() - entry.gone > GONE_SECONDS and not path.exists():
                        result = _lost(experiment, cell, device, entry.job)
                if result is not None:
                    del waiting[cell]
                    yield cell, result, time.monotonic() - entry.began
            if waiting:
                time.sleep(POLL_SECONDS)
    finally:
        for entry in waiting.values():
            entry.job.cancel(check=False)


@dataclass
class _Waiting:
    """A job as the submitting process sees it."""

    job: Any
    state: str | None = None
    began: float = field(default_factory=time.monotonic)
    gone: float | None = None
    """When it was first found to have left the queue."""


def _submit(experiment: Experiment, jobs: list[CellJob], out: Path) -> list[Any]:
    import submitit

    settings = experiment.slurm
    with writing_to(out):
        executor = submitit.AutoExecutor(out / "slurm", cluster=CLUSTER)
    options: dict[str, Any] = {
        "name": f"pbbench-{experiment.name}",
        "timeout_min": settings.minutes_per_cell,
        "cpus_per_task": settings.cpus_per_cell,
        "gpus_per_node": 0 if jobs[0].device == "cpu" else 1,
        "slurm_signal_delay_s": SIGNAL_SECONDS,
        "slurm_array_parallelism": settings.max_parallel,
        "slurm_additional_parameters": {"requeue": True, **settings.extra},  # not every cluster's default
    }
    options |= {"slurm_partition": settings.partition} if settings.partition else {}
    options |= {"mem_gb": settings.memory_gib} if settings.memory_gib else {}
    executor.update_parameters(**options)
    try:
        return executor.submit_array(jobs)
    except (submitit.core.utils.FailedJobError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = [line for line in str(error).splitlines() if "error:" in line] or str(error).split("\n")[:1]
        raise InputError(f"--executor slurm: sbatch refused the cells ({' '.join(lines)[:300]}); look at [slurm]") from None


def _queue(jobs: list[Any]) -> dict[str, str] | None:
    """Job id → state of those still in the queue, by one call for all of them; None where Slurm does not answer."""
    if CLUSTER != "slurm":
        return {job.job_id: job.state for job in jobs if job.state == "RUNNING"}
    command = ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i %T"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split()[:2] for line in told.splitlines() if len(line.split()) >= 2)


def _tell(cell: Cell, entry: _Waiting, state: str | None, listener: Listener) -> None:
    """Let the listener know of a change; note when a job was first missed."""
    if state is None:
        if entry.gone is None:
            entry.gone = time.monotonic()
            told = _last_words(entry.job)
            if told is not None:
                raise StorageError(told)
        return
    entry.gone = None
    if state != entry.state:
        if state == "RUNNING":
            entry.began = time.monotonic()
            listener.cell_started(cell)
            listener.cell_event(cell, {"event": "phase", "phase": "job"})
        elif entry.state is not None and state in ("PENDING", "REQUEUED"):
            listener.cell_event(cell, {"event": "note", "text": f"{cell.id}: its job waits in the queue again"})
        entry.state = state


def _last_words(job: Any) -> str | None:
    """Why a job says the whole sweep cannot go on; None where it does not."""
    try:
        lines = Path(job.paths.stderr).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    told = [line.removeprefix("pbbench: ") for line in lines if line.startswith("pbbench: ")]
    return told[-1] if told else None


_STATUS = {"TIMEOUT": "timed_out", "OUT_OF_MEMORY": "out_of_memory", "FAILED": "crashed"}


def _lost(experiment: Experiment, cell: Cell, device: str, job: Any) -> CellResult:
    """The rows of a cell whose job has gone without a word: killed, cancelled, out of time, the node lost."""
    state = str(job.state).upper().split(" ")[0]
    known = "" if state in ("UNKNOWN", "") else f" as {state}"
    why = f"Slurm's job {job.job_id} ended{known} without a result; its log is {Path(job.paths.stderr).name} in slurm/"
    status: Any = _STATUS.get(state, "killed")
    phase = "quality" if cell.kind == "quality" else "load"
    row = {**base_row(resolve(experiment, cell), cell, device), "status": status, "phase": phase}
    return CellResult(
        id=cell.id,
        kind=cell.kind,
        status=status,
        axes=cell.axes(),
        rows=[Row.model_validate({**row, "reasons": {"seconds_per_step": why}})],
        error={"phase": phase, "type": status, "message": why},
    )
