"""Cells on this machine: as many at once as there are GPUs, one on each; on a CPU one after the other. No torch.

Two cells never share a GPU while memory is measured, not even cells of two sweeps: whoever runs one holds a lock named after
the GPU in the system's folder for temporary files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pbbench.experiment.experiment import Experiment
from pbbench.records.cells import CellResult
from pbbench.sweep.grid import Cell
from pbbench.sweep.nursery import Nursery
from pbbench.sweep.process import SAVING_SECONDS, Worker, stop

GPU_POLL_SECONDS = 1.0
"""Between two looks at a GPU that another sweep holds."""


class Listener(Protocol):
    """Hears what the sweep does. Every call is cheap and may be ignored."""

    def started(self, cells: list[Cell], done: dict[str, str]) -> None: ...
    def cell_started(self, cell: Cell) -> None: ...
    def cell_event(self, cell: Cell, event: dict[str, Any]) -> None: ...
    def cell_ended(self, cell: Cell, result: CellResult, seconds: float) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where one cell at a time can run."""

    gpu: str | None = None
    """As CUDA_VISIBLE_DEVICES names it; None: whatever this process sees (the CPU)."""
    uuid: str | None = None
    """Names the lock; None: none is needed."""


def places(environment: dict[str, Any]) -> list[Place]:
    """A place for every visible GPU of the first one's kind (figures of another kind would not compare), or the CPU."""
    gpus = environment.get("gpus") or []
    if not gpus:
        return [Place()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(len(gpus))]
    alike = [(name, gpu) for name, gpu in zip(names, gpus, strict=False) if gpu["name"] == gpus[0]["name"]]
    return [Place(name, gpu["uuid"]) for name, gpu in alike]


def run_cells(
    experiment: Experiment,
    cells: Sequence[Cell],
    device: str,
    out: Path,
    listener: Listener,
    where: Sequence[Place],
    running: dict[int, Worker] | None = None,
) -> Generator[tuple[Cell, CellResult, float], None, None]:
    """Run the cells, a fresh process each; yields each as it ends, with its seconds. Close the generator to stop them all.

    ``running``: where a signal handler of the caller's finds the workers. Raises StorageError where one could not write.
    """
    waiting = deque(cells)
    running = {} if running is None else running
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector, Nursery() as nursery:
        locks = [stack.enter_context(_GpuLock(place.uuid)) for place in where]
        try:
            while waiting or running:
                blocked = False
                for number, place in enumerate(where):
                    if not waiting or number in running:
                        continue
                    if not locks[number].take():
                        blocked = True
                        note = f"GPU {place.gpu} is measuring for another sweep; waiting for it"
                        listener.cell_event(waiting[0], {"event": "note", "text": note})
                        continue
                    cell = waiting.popleft()
                    listener.cell_started(cell)
                    running[number] = Worker(experiment, cell, device, out, nursery, place.gpu)
                    selector.register(running[number], selectors.EVENT_READ, number)
                for number in _ended(selector, running, listener, GPU_POLL_SECONDS if blocked else None):
                    worker = running[number]
                    selector.unregister(worker)
                    result = worker.end()
                    del running[number]
                    locks[number].give_back()
                    yield worker.cell, result, time.monotonic() - worker.began
        finally:
            stop(running.values(), saving_seconds=SAVING_SECONDS)


def run_cell(experiment: Experiment, cell: Cell, device: str, out: Path, listener: Listener) -> CellResult:
    """One cell where this process is; its rows, whatever became of it."""
    with contextlib.closing(run_cells(experiment, [cell], device, out, listener, [Place()])) as ended:
        return next(ended)[1]


def _ended(
    selector: selectors.BaseSelector, running: dict[int, Worker], listener: Listener, wait: float | None
) -> Iterator[int]:
    """Wait until a worker says something or its time is up; yields the numbers of those that are over."""
    limits = [left for worker in running.values() if (left := worker.seconds_left()) is not None]
    nearest = min([*limits, *([] if wait is None else [wait])], default=None)
    for key, _ in selector.select(None if nearest is None else max(0.0, nearest)):
        worker = running[key.data]
        events = worker.read()
        for event in events or ():
            listener.cell_event(worker.cell, event)
        if events is None:
            yield key.data
    for number, worker in list(running.items()):
        left = worker.seconds_left()
        if left is not None and left <= 0:
            worker.timed_out = not worker.finished
            yield number


class _GpuLock:
    """One process at a time on a GPU; the system drops the lock with the process."""

    def __init__(self, uuid: str | None) -> None:
        self.handle: int | None = None
        if uuid is None:
            return
        path = Path(tempfile.gettempdir()) / f"pbbench-gpu-{uuid}.lock"
        try:  # another user's file may be opened and locked, but not opened as if to create it
            self.handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            self.handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)

    def __enter__(self) -> _GpuLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            os.close(self.handle)

    def take(self) -> bool:
        try:
            if self.handle is not None:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def give_back(self) -> None:
        if self.handle is not None:
            fcntl.flock(self.handle, fcntl.LOCK_UN)
