"""The sweep's parent: prepare the run folder, start a fresh process per cell, collect what it says, write each cell once.

A cell's file is written whole when the cell has ended, however it ended; resuming skips cells that have one. The parent
imports no torch and touches no GPU. What is shown while it runs is a listener's business (sweep/live.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pbbench import environment as environments
from pbbench.config import Experiment, differences, parse_experiment, read_toml
from pbbench.errors import InputError, one_line
from pbbench.records import CellResult, Row, read_cell, write_cell, write_json, write_text
from pbbench.sweep.grid import Cell, plan, resolve
from pbbench.sweep.rows import base_row


class Listener(Protocol):
    """Hears what the sweep does. Every call is cheap and may be ignored."""

    def started(self, cells: list[Cell], done: dict[str, str]) -> None: ...
    def cell_started(self, cell: Cell) -> None: ...
    def cell_event(self, cell: Cell, event: dict[str, Any]) -> None: ...
    def cell_ended(self, cell: Cell, result: CellResult, seconds: float) -> None: ...


def run_sweep(
    experiment: Experiment, device: str, out: Path, *, resume: bool, any_environment: bool, listener: Listener
) -> bool:
    """Run every cell that has no result yet, then write the report. True where every cell is ok.

    Raises InputError before anything is written where the folder, the settings or the machine do not fit; KeyboardInterrupt
    passes through after the running cell's process is stopped, and the sweep can be resumed.
    """
    cells = plan(experiment)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _locked(out)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {one_line(error)}; choose another --out") from None
    with lock:
        done = _prepare(experiment, device, out, resume=resume, any_environment=any_environment)
        listener.started(cells, {cell.id: done[cell.id] for cell in cells if cell.id in done})
        for cell in cells:
            if cell.id in done:
                continue
            listener.cell_started(cell)
            began = time.monotonic()
            result = run_cell(experiment, cell, device, out, listener)
            write_cell(out, result)
            done[cell.id] = result.status
            listener.cell_ended(cell, result, time.monotonic() - began)
        from pbbench.report import write_report

        write_report(out)
    return all(done[cell.id] == "ok" for cell in cells)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Two sweeps on one folder would do cells twice: the second is refused. The lock goes with the process."""
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another sweep is writing to {out}; wait for it, or choose another --out") from None
        yield


def _prepare(experiment: Experiment, device: str, out: Path, *, resume: bool, any_environment: bool) -> dict[str, str]:
    """Write or check what heads the folder; returns cell id → status of the cells that are finished.

    Resuming a folder that is absent, empty or was left before its settings were written starts the sweep.
    """
    settings, described = out / "experiment.toml", out / "environment.json"
    occupied = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if occupied and not resume:
        raise InputError(f"{out} is not empty ({', '.join(occupied[:4])}); continue it with --resume, or choose another --out")
    if occupied not in ([], [described.name]) and not settings.exists():
        raise InputError(
            f"--resume: {out} holds no sweep (no experiment.toml, but {', '.join(occupied[:4])}); choose another --out"
        )
    if not settings.exists():
        write_json(described, environments.probe(device))
        write_text(settings, experiment.to_toml())
        return {}
    changed = differences(parse_experiment(read_toml(settings), str(settings)), experiment)
    if changed:
        raise InputError(f"--resume: {out} was started with other settings: {'; '.join(changed[:6])}")
    _check_environment(described, environments.probe(device), any_environment)
    found = {path.stem: read_cell(path) for path in sorted((out / "cells").glob("*.json"))}
    return {name: cell.status for name, cell in found.items()}


def _check_environment(path: Path, now: dict[str, Any], any_environment: bool) -> None:
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
        write_json(path, {**before, "continued_in": [*before.get("continued_in", []), now]})


def run_cell(experiment: Experiment, cell: Cell, device: str, out: Path, listener: Listener) -> CellResult:
    """One fresh process; its rows, whatever became of it."""
    resolved = resolve(experiment, cell)
    job = {
        "experiment": resolved.model_dump(mode="json"),
        "cell": {"id": cell.id, "kind": cell.kind, **cell.axes()},
        "device": device,
        "run": str(out.resolve()),
    }
    result = CellResult(id=cell.id, kind=cell.kind, status="ok", axes=cell.axes(), rows=[])
    log = out / "logs" / f"{cell.id}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as errors:
        worker = subprocess.Popen(
            [sys.executable, "-m", "pbbench.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            # Threads that spin while they wait are ruinous where another process wants the core, too.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
        try:
            assert worker.stdin is not None
            worker.stdin.write((json.dumps(job) + "\n").encode())
            worker.stdin.flush()
            phase, finished, timed_out = _listen(worker, experiment.sweep.cell_timeout_seconds, result, cell, listener)
        except BrokenPipeError:
            phase, finished, timed_out = "load", False, False
        finally:
            _stop(worker)
    if not finished:
        status, why = _ending(worker.returncode, timed_out, experiment.sweep.cell_timeout_seconds, log)
        row_phase = phase if phase in ("load", "sample_step", "train_step") else "quality" if cell.kind == "quality" else "load"
        row = {**base_row(resolved, cell, device), "status": status, "phase": row_phase, "reasons": {"seconds_per_step": why}}
        result.rows.append(Row.model_validate(row))
        result.status, result.error = status, {"phase": phase, "type": status, "message": why}
    if not log.stat().st_size:
        log.unlink()
        with contextlib.suppress(OSError):  # it holds another cell's log
            log.parent.rmdir()
    return result


def _listen(
    worker: subprocess.Popen[bytes], limit: float | None, result: CellResult, cell: Cell, listener: Listener
) -> tuple[str, bool, bool]:
    """Read events until the worker ends: (the phase it was in, whether it finished, whether it ran out of time)."""
    assert worker.stdout is not None
    deadline = time.monotonic() + limit if limit else None
    phase, finished, pending = "load", False, b""
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while True:
            wait = None if deadline is None else deadline - time.monotonic()
            if wait is not None and wait <= 0:
                return phase, False, True
            if not selector.select(wait):
                continue
            block = os.read(worker.stdout.fileno(), 65536)
            if not block:
                worker.wait()
                return phase, finished, False
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                event = json.loads(line)
                phase = event["phase"] if event["event"] == "phase" else phase
                finished = finished or event["event"] == "done"
                _take(event, result)
                listener.cell_event(cell, event)


def _take(event: dict[str, Any], result: CellResult) -> None:
    if event["event"] == "row":
        result.rows.append(Row.model_validate(event["row"]))
    elif event["event"] == "error":
        result.status, result.error = event["status"], event["error"]
    elif event["event"] == "detail":
        for key, value in event.items():
            both = isinstance(value, dict) and isinstance(result.details.get(key), dict)
            if key != "event":
                result.details[key] = {**result.details[key], **value} if both else value


def _stop(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and everything it started (data-loading processes share its session)."""
    with contextlib.suppress(ProcessLookupError):  # it had ended, and all of its children with it
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with contextlib.suppress(
                BrokenPipeError
            ):  # the job could not be handed over because the worker was gone; its return code tells why
                stream.close()


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
