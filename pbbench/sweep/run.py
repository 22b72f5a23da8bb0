"""The sweep: prepare the run's folder, have every cell done once, here or by a scheduler, write the report.

A cell's file is written whole when the cell has ended, however it ended; resuming skips cells that have one. A sweep may be
shared out (``Shard``): each part does its own cells, in one folder, and the last to finish writes the report. The parent
imports no torch and touches no GPU. What is shown while it runs is a listener's business (sweep/live.py).
"""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment
from pbbench.processes import world_size
from pbbench.records import environment as environments
from pbbench.records import folder
from pbbench.records.cells import CellResult, write_cell
from pbbench.signals import terminated_like_ctrl_c
from pbbench.sweep import local, slurm
from pbbench.sweep.grid import Cell, plan, trainings
from pbbench.sweep.local import Listener
from pbbench.sweep.planning.fit import beyond_memory

Executor = Literal["local", "slurm"]
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``: its cells are number, number + count, … of the plan, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "2/8". Raises InputError for anything that is not a part of a whole."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--shard {text!r}: expected i/n with 1 ≤ i ≤ n, for example --shard 1/4")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: list[T]) -> list[T]:
        return items[self.number - 1 :: self.count]


class Ended(NamedTuple):
    """How a sweep, or its shard, ended."""

    fine: bool
    """Every cell of this shard is ok."""
    complete: bool
    """Every cell of the whole sweep is there, and so is the report."""


def run_sweep(
    experiment: Experiment,
    device: str,
    out: Path,
    *,
    resume: bool,
    any_environment: bool,
    listener: Listener,
    executor: Executor = "local",
    shard: Shard | None = None,
) -> Ended:
    """Run every cell (of the shard) that has no result yet; write the report once all cells of the sweep are there.

    A shard joins a folder that others have begun, so it is always resumed. Raises InputError before anything is written where
    the folder, the settings or the machine do not fit, and StorageError where the disk is full; KeyboardInterrupt (Ctrl-C, or
    SIGTERM) passes through after the running cells are stopped. After each of these the sweep can be resumed.
    """
    if world_size() > 1:
        raise InputError("a sweep starts its own processes, one per GPU: run it without torchrun or accelerate launch")
    if executor == "slurm" and shard is not None:
        raise InputError("--shard is for schedulers other than Slurm; --executor slurm hands out every cell by itself")
    cells = plan(experiment)
    mine = shard.of(cells) if shard else cells
    if executor == "slurm":
        slurm.check_installed()
    resume = resume or shard is not None
    with folder.Claims(out) as claims, terminated_like_ctrl_c():
        if executor == "local":
            claims.take(folder.CELLS + cells.index(cell) for cell in mine)
        else:
            claims.take([folder.SUBMITTER])
        folder.check_settings(experiment, out, resume=resume)
        environment = environments.probe(device) if executor == "local" else None
        with claims.waiting_for(folder.HEAD):
            folder.settle_settings(experiment, out, resume=resume)
            if environment is not None:
                folder.settle_environment(out, environment, any_environment=any_environment)
            done = folder.finished(out)
        left = [cell for cell in mine if cell.id not in done]
        for stale in {e.training.stale_average(): None for e in trainings(experiment, left)}:
            if stale:
                print(f"pbbench: {stale}", file=sys.stderr)
        listener.started(mine, {cell.id: done[cell.id] for cell in mine if cell.id in done})

        def keep(cell: Cell, result: CellResult, seconds: float) -> None:
            if not folder.cell_file(out, cell.id).exists():  # a job of a scheduler writes its own
                write_cell(out, result)
            done[cell.id] = result.status
            listener.cell_ended(cell, result, seconds)

        for cell in left:
            unfit = beyond_memory(experiment, cell, device)
            if unfit is not None:
                keep(cell, unfit, 0.0)
        left = [cell for cell in left if cell.id not in done]
        if environment is not None:
            ended = local.run_cells(experiment, left, device, out, listener, local.places(environment))
        else:
            ended = slurm.run_cells(experiment, left, device, out, listener, any_environment=any_environment)
        with contextlib.closing(ended):
            for cell, result, seconds in ended:
                keep(cell, result, seconds)
        with claims.waiting_for(folder.HEAD):
            complete = all(folder.cell_file(out, cell.id).exists() for cell in cells)
            if complete:
                from pbbench.report import write_report

                write_report(out)
    return Ended(all(done[cell.id] == "ok" for cell in mine), complete)
