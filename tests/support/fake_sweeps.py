"""Sweeps without torch: a stand-in for the worker that says what a real one says, for tests of what happens around it.

Run as ``python fake_sweeps.py worker DIARY BEHAVIOUR`` it is a cell's process; as ``python fake_sweeps.py sweep OUT SHARD
DIARY BEHAVIOUR`` a sweep of its own in another process. Every cell writes a line into the diary when it begins, another when
it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {"device": "cpu", "gpus": [], "torch": "none"}
SECONDS = 0.08
"""How long a cell takes."""


class Ears:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def started(self, cells: list[Any], done: dict[str, str]) -> None:
        self.heard.append(("started", f"{len(cells)} cells, {len(done)} done"))

    def cell_started(self, cell: Any) -> None:
        self.heard.append(("began", cell.id))

    def cell_event(self, cell: Any, event: dict[str, Any]) -> None:
        self.heard.append((event["event"], event.get("text", "")))

    def cell_ended(self, cell: Any, result: Any, seconds: float) -> None:
        self.heard.append((result.status, cell.id))


def command(diary: Path, behaviour: str = "ok") -> tuple[str, ...]:
    """For ``pbbench.sweep.process.COMMAND``."""
    return (sys.executable, "-S", __file__, "worker", str(diary), behaviour)


def read_diary(diary: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in diary.read_text().splitlines()] if diary.exists() else []


def experiment(**sweep: Any) -> Any:
    from pbbench.experiment.experiment import parse_experiment

    section = {"dividers": [1, 2, 4], "quality": False, "patch_batch_sizes": ["all"], **sweep}
    model = {"dim": 8, "dim_mults": [1, 2], "image_size": 16}
    return parse_experiment({"name": "fake", "device": "cpu", "model": model, "sweep": section}, "the test")


def sweep(out: Path, listener: Any = None, **words: Any) -> Any:
    """A sweep in this process; 12 cells unless ``settings`` are given."""
    from pbbench.sweep.run import run_sweep

    settings = words.pop("settings", None) or experiment(repeats=4)
    words = {"resume": False, "any_environment": False, **words}
    return run_sweep(settings, "cpu", out, listener=listener or Ears(), **words)


def other_process(out: Path, shard: str, diary: Path, behaviour: str = "ok") -> subprocess.Popen[str]:
    """The same sweep, or a shard of it, in a process of its own; it prints how it ended."""
    words = [sys.executable, __file__, "sweep", str(out), shard, str(diary), behaviour]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def held_elsewhere(out: Path, byte: int) -> Any:
    """Another process has locked a byte of the folder's lock file."""
    lock = "f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX, 1, int(sys.argv[2]))"
    code = f"import fcntl, sys; {lock}; print(flush=True); input()"
    out.mkdir(exist_ok=True)
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(out / ".lock"), str(byte)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        yield
    finally:
        holder.communicate(b"\n")


def _worker(diary: Path, behaviour: str) -> None:
    job = json.loads(sys.stdin.readline())
    name = job["cell"]["id"]

    def say(**event: Any) -> None:
        print(json.dumps(event), flush=True)

    def note(what: str, pid: int = os.getpid()) -> None:
        line = {"cell": name, "what": what, "time": time.monotonic(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
        with diary.open("a") as file:  # one short write to a file opened for appending: lines do not mix
            file.write(json.dumps(line | {"pid": pid, "sweep": os.getppid()}) + "\n")

    note("began")
    if behaviour == "meets":  # until another sweep's cell runs, too: else whether they overlap would be chance
        deadline = time.monotonic() + 30
        while len({line["sweep"] for line in read_diary(diary)}) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    if behaviour == "disk":
        say(event="disk", message="cannot write to somewhere (No space left on device); make room")
        return
    if behaviour == "saves":
        signal.signal(signal.SIGTERM, lambda *_: (note("saved"), os._exit(0)))
        say(event="phase", phase="train")
    if behaviour == "ended by SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    if behaviour == "hangs":  # as a process does that a driver holds, with a data-loading process of its own
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note("child", subprocess.Popen(["sleep", "600"]).pid)
    if behaviour in ("hangs", "saves"):
        time.sleep(600)
    say(event="phase", phase="sample_step")
    time.sleep(SECONDS)
    row = {"cell": name, "phase": "sample_step", "temperature": "warm", "device": "cpu", "peak_live_bytes": 512}
    say(event="row", row=row | {"patch_divider": job["cell"]["patch_divider"], "images_per_second": 1.0})
    note("ended")
    say(event="done")


def _sweep(out: Path, shard: str, diary: Path, behaviour: str) -> None:
    from pbbench.errors import InputError
    from pbbench.sweep import process, run

    process.COMMAND = command(diary, behaviour)  # type: ignore[assignment]
    run.environments.probe = lambda device: ENVIRONMENT  # type: ignore[assignment]
    part = None if shard == "all" else run.Shard.parse(shard)
    try:
        done = run.run_sweep(
            experiment(repeats=4), "cpu", out, resume=False, any_environment=False, listener=Ears(), shard=part
        )
    except InputError as error:
        print(f"refused: {error}")
        return
    except KeyboardInterrupt:
        print("stopped")
        return
    print(f"fine {done.fine} complete {done.complete}")


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        _worker(Path(sys.argv[2]), sys.argv[3])
    else:
        _sweep(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5])
