"""One cell's process, seen from the parent: start it, hear what it says, say what became of it. No torch.

The worker (sweep/worker.py) writes no results; what it had said before it ended, however it ended, is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from pbbench.errors import StorageError, writing_to
from pbbench.experiment.experiment import Experiment
from pbbench.records.cells import CellResult
from pbbench.records.rows import Row
from pbbench.sweep.cell_rows import base_row
from pbbench.sweep.grid import Cell, resolve
from pbbench.sweep.nursery import Forked, Nursery

COMMAND: tuple[str, ...] | None = None
"""What is run in a cell's place where the program is tested or cannot fork; None: a child of the nursery, which has imported
it all."""
PLAIN = (sys.executable, "-m", "pbbench.sweep.worker")
SAVING_SECONDS = 20.0
"""How long a training that is told to stop may take to save what it has."""


class Worker:
    """A running cell. Read it (``fileno`` is its channel) until ``read`` says None, then ``end`` it; always ``stop`` it."""

    def __init__(
        self, experiment: Experiment, cell: Cell, device: str, out: Path, nursery: Nursery, gpu: str | None = None
    ) -> None:
        """``gpu``: the only one the process may see, as CUDA_VISIBLE_DEVICES names it; None: what this process sees."""
        self.cell, self.device, self.limit = cell, device, experiment.sweep.cell_timeout_seconds
        self.experiment = resolve(experiment, cell)
        self.result = CellResult(id=cell.id, kind=cell.kind, status="ok", axes=cell.axes(), rows=[])
        self.phase, self.finished, self.timed_out, self._pending = "load", False, False, b""
        self.log = out / "logs" / f"{cell.id}.log"
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with writing_to(self.log):
            self.log.parent.mkdir(exist_ok=True)
            errors = self.log.open("w")
        with errors:
            self.process = _start(nursery, errors, environment)
        self.began = time.monotonic()
        job = {
            "experiment": self.experiment.model_dump(mode="json"),
            "cell": {"id": cell.id, "kind": cell.kind, **cell.axes()},
            "device": device,
            "run": str(out.resolve()),
        }
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already; its return code will tell why
            self.process.stdin.write((json.dumps(job) + "\n").encode())
            self.process.stdin.flush()

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def seconds_left(self) -> float | None:
        """Until the cell's time limit; None without one."""
        return None if self.limit is None else self.began + self.limit - time.monotonic()

    def read(self) -> list[dict[str, Any]] | None:
        """What it has said since (blocks until it says something); None when it has ended.

        Raises StorageError where it could not write: that would befall every cell after it.
        """
        block = os.read(self.fileno(), 65536)
        if not block:
            self.process.wait()
            return None
        *lines, self._pending = (self._pending + block).split(b"\n")
        events = [json.loads(line) for line in lines]
        for event in events:
            self._take(event)
        return events

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "phase":
            self.phase = event["phase"]
        elif event["event"] == "done":
            self.finished = True
        elif event["event"] == "row":
            self.result.rows.append(Row.model_validate(event["row"]))
        elif event["event"] == "error":
            self.result.status, self.result.error = event["status"], event["error"]
        elif event["event"] == "disk":
            raise StorageError(event["message"])
        elif event["event"] == "detail":
            details = self.result.details
            for key, value in event.items():
                both = isinstance(value, dict) and isinstance(details.get(key), dict)
                if key != "event":
                    details[key] = {**details[key], **value} if both else value

    def end(self) -> CellResult:
        """Its rows, whatever became of it; it is stopped if it still runs."""
        stop([self])
        if not self.finished:
            assert self.process.returncode is not None
            status, why = _ending(self.process.returncode, self.timed_out, self.limit, self.log)
            known = self.phase in ("load", "sample_step", "train_step")
            phase = self.phase if known else "quality" if self.cell.kind == "quality" else "load"
            row = {**base_row(self.experiment, self.cell, self.device), "status": status, "phase": phase}
            self.result.rows.append(Row.model_validate({**row, "reasons": {"seconds_per_step": why}}))
            self.result.status, self.result.error = status, {"phase": self.phase, "type": status, "message": why}
        if not self.log.stat().st_size:
            self.log.unlink()
            with contextlib.suppress(OSError):  # it holds another cell's log
                self.log.parent.rmdir()
        return self.result


def _start(nursery: Nursery, errors: IO[str], environment: dict[str, str]) -> Forked | subprocess.Popen[bytes]:
    if COMMAND is None and hasattr(socket, "SCM_RIGHTS"):
        with contextlib.suppress(OSError):  # what ended the nursery will end the process, too, and leave a word in its log
            return nursery.start(errors, environment)
    return subprocess.Popen(
        COMMAND or PLAIN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
        env=environment,
    )


def stop(workers: Iterable[Worker], *, saving_seconds: float = 0.0) -> None:
    """End the workers and everything they started (data-loading processes share a worker's session).

    With ``saving_seconds`` those that train are asked first, and saved checkpoints are what a resumed sweep goes on from.
    """
    workers = list(workers)
    if saving_seconds:
        for worker in workers:
            if worker.phase == "train" and worker.process.poll() is None:
                worker.process.terminate()
        deadline = time.monotonic() + saving_seconds
        for worker in workers:
            if worker.phase == "train":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):  # it had ended, and all of its children with it
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        for stream in (worker.process.stdin, worker.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # the job could not be handed over
                    stream.close()
        if isinstance(worker.process, Forked):
            worker.process.close()


def _ending(returncode: int, timed_out: bool, limit: float | None, log: Path) -> tuple[Any, str]:
    """Status and cause of a worker that did not finish."""
    if timed_out:
        return "timed_out", f"took longer than sweep.cell_timeout_seconds = {limit:g} s and was stopped"
    if returncode < 0:
        name = signal.Signals(-returncode).name
        guess = "; the system may have been out of memory" if name == "SIGKILL" else ""
        return ("killed" if name in ("SIGKILL", "SIGTERM") else "crashed"), f"ended by signal {-returncode} ({name}){guess}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "crashed", f"exit code {returncode}; last line of logs/{log.name}: {lines[-1] if lines else '(empty)'}"
