"""A run's folder, shared by everything that writes to it: who does which cell, the settings, the environment.

Any number of processes, on any machines, may work in one folder. Each holds a lock on every cell that is its to do, and for a
moment one on the folder's head (settings, environment, report). The locks are byte ranges of one file, ``.lock``: they need
no cleaning up, because the system drops them with the process, and they hold across machines on a network file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from pbbench.errors import InputError, one_line, writing_to
from pbbench.experiment.experiment import Experiment, differences, parse_experiment
from pbbench.experiment.presets import read_toml
from pbbench.experiment.sweep_settings import Fitted
from pbbench.records import environment as environments
from pbbench.records.cells import read_cell
from pbbench.records.files import write_json, write_text

HEAD, SUBMITTER, CELLS = 0, 1, 2
"""Bytes of the lock file: the folder's head, the process that submits to a scheduler, and from 2 on the cells as planned."""
_MAY_DIFFER = "slurm."
"""Settings that a resumed sweep may change: how cells are queued says nothing about what they measure."""


class Claims:
    """This process's locks on a run's folder, which is made where it is absent. Use as a context manager.

    Raises StorageError where the folder cannot be written to. One at a time in a process and folder: closing the file drops
    every lock the process has on it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        with writing_to(out):
            out.mkdir(parents=True, exist_ok=True)
            self.handle = (out / ".lock").open("a+")

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.handle.close()

    def take(self, numbers: Iterable[int]) -> None:
        """Hold these bytes until the end. Raises InputError where another process holds one."""
        for number in numbers:
            try:
                fcntl.lockf(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):
                raise InputError(
                    f"another sweep is writing to {self.out} (the same cells); wait for it, or choose another --out"
                ) from None
            except OSError as error:
                raise InputError(f"cannot lock {self.out / '.lock'} ({one_line(error)}); choose another --out") from None

    @contextlib.contextmanager
    def waiting_for(self, number: int) -> Iterator[None]:
        """Hold one byte within the block; wait while another process has it."""
        fcntl.lockf(self.handle, fcntl.LOCK_EX, 1, number)
        try:
            yield
        finally:
            fcntl.lockf(self.handle, fcntl.LOCK_UN, 1, number)


def cell_file(out: Path, name: str) -> Path:
    return out / "cells" / f"{name}.json"


def finished(out: Path) -> dict[str, str]:
    """Cell id → status of the cells that are there. Raises InputError where one is broken."""
    return {path.stem: read_cell(path).status for path in sorted((out / "cells").glob("*.json"))}


def check_settings(experiment: Experiment, out: Path, *, resume: bool) -> None:
    """Raises InputError where the folder holds anything but the beginning of this very sweep; writes nothing."""
    settings = out / "experiment.toml"
    occupied = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if occupied and not resume:
        raise InputError(f"{out} is not empty ({', '.join(occupied[:4])}); continue it with --resume, or choose another --out")
    if occupied not in ([], ["environment.json"]) and not settings.exists():
        raise InputError(
            f"--resume: {out} holds no sweep (no experiment.toml, but {', '.join(occupied[:4])}); choose another --out"
        )
    if settings.exists():
        changed = _changed(parse_experiment(read_toml(settings), str(settings)), experiment)
        changed = [line for line in changed if not line.startswith("sweep.fitted")] or changed  # it follows from the others
        if changed:
            raise InputError(f"--resume: {out} was started with other settings: {'; '.join(changed[:6])}")


def _changed(before: Experiment, now: Experiment) -> list[str]:
    return [line for line in differences(before, now) if not line.startswith(_MAY_DIFFER)]


def fitted_before(experiment: Experiment, out: Path) -> dict[str, Fitted]:
    """``sweep.fitted`` of a folder that was begun with these very settings, whatever of it they hold; else empty."""
    settings = out / "experiment.toml"
    if not settings.exists():
        return {}
    before = parse_experiment(read_toml(settings), str(settings))
    bare = before.model_copy(update={"sweep": before.sweep.model_copy(update={"fitted": experiment.sweep.fitted})})
    return {} if _changed(bare, experiment) else before.sweep.fitted


def settle_settings(experiment: Experiment, out: Path, *, resume: bool) -> None:
    """Write the settings, or check that the folder was begun with the same. The head is locked by the caller.

    Resuming a folder that is absent, empty or was left before its settings were written starts the sweep.
    """
    check_settings(experiment, out, resume=resume)
    if not (out / "experiment.toml").exists():
        write_text(out / "experiment.toml", experiment.to_toml())


def settle_environment(out: Path, now: dict[str, Any], *, any_environment: bool) -> None:
    """Write the environment of the machine that measures, or check that the cells so far were measured on a like one."""
    path = out / "environment.json"
    if not path.exists() and not any((out / "cells").glob("*.json")):
        write_json(path, now)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from None
    old, new = environments.fingerprint(before), environments.fingerprint(now)
    changed = [f"{key}: {old[key]} → {new[key]}" for key in old if old[key] != new[key]]
    if changed and not any_environment:
        raise InputError(
            f"--resume: this is not the environment the run was started in ({'; '.join(changed)}); figures would not compare. "
            "Add --any-environment to go on all the same"
        )
    if changed:
        known = [before, *before.get("continued_in", [])]
        if new not in [environments.fingerprint(one) for one in known]:
            write_json(path, {**before, "continued_in": [*before.get("continued_in", []), now]})
