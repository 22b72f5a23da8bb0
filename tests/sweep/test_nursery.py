"""Forked cells: a session, an environment and channels of their own, nothing shared, told how they ended, no orphan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import tiny

from pbbench.sweep import nursery, process
from pbbench.sweep.grid import plan
from pbbench.sweep.nursery import Forked, Nursery

PROGRAM = """
import json, os, random, socket, sys, threading
from pbbench.sweep.nursery import serve

def run():
    for line in sys.stdin:
        if line.strip() == "die":
            os.kill(os.getpid(), 11)
        if line.strip() == "leave":
            os._exit(7)
        told = {"pid": os.getpid(), "session": os.getsid(0), "folder": os.getcwd(), "environment": dict(os.environ)}
        print(json.dumps(told | {"random": random.random(), "threads": threading.active_count()}), flush=True)

serve(socket.socket(fileno=int(sys.argv[1])), run)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nursery that imports nothing and whose children answer lines: what is tested is the forking."""
    file = tmp_path_factory.mktemp("nursery") / "small_nursery.py"
    file.write_text(PROGRAM)
    return file


@pytest.fixture
def small(program: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    monkeypatch.setattr(nursery, "MODULE", program.stem)
    monkeypatch.setenv("PYTHONPATH", f"{program.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with Nursery() as found:
        yield found


def start(found: Nursery, tmp_path: Path, **more: str) -> Forked:
    with (tmp_path / "log").open("w") as errors:
        return found.start(errors, {**os.environ, **more})


def ask(child: Forked, line: str = "hello") -> dict[str, Any]:
    child.stdin.write(f"{line}\n".encode())
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def test_children_have_all_of_their_own(small: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = start(small, tmp_path, CUDA_VISIBLE_DEVICES="1"), start(small, tmp_path, CUDA_VISIBLE_DEVICES="2")
    first, second = ask(one), ask(two)
    assert (first["pid"], second["pid"]) == (one.pid, two.pid)
    assert first["session"] == one.pid != second["session"]
    assert [told["environment"]["CUDA_VISIBLE_DEVICES"] for told in (first, second)] == ["1", "2"]
    assert first["folder"] == str(tmp_path)
    assert first["random"] != second["random"]
    assert first["threads"] == 1
    for child in (one, two):
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(10) == 0
        child.close()


def test_another_environment_takes_another_nursery(small: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some variables are read on import; the number of threads is one."""
    for value in ("3", "4"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        child = start(small, tmp_path)
        assert ask(child)["environment"]["OMP_NUM_THREADS"] == value
        assert small._environment["OMP_NUM_THREADS"] == value
        child.stdin.close()
        child.wait(10)


@pytest.mark.parametrize(("word", "code"), [("leave", 7), ("die", -signal.SIGSEGV)])
def test_how_a_child_ended_is_known_and_its_number_kept(small: Nursery, tmp_path: Path, word: str, code: int) -> None:
    child = start(small, tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    child.stdin.write(f"{word}\n".encode())
    child.stdin.flush()
    assert child.wait(10) == child.poll() == code
    os.kill(child.pid, 0)  # a zombie, until it is closed
    child.close()
    wait_until_gone(child.pid)


def test_no_child_outlives_the_sweep(small: Nursery, tmp_path: Path) -> None:
    """A worker sees its standard input close; the nursery and the guardian leave by themselves."""
    child = start(small, tmp_path)
    ask(child)
    assert small._program is not None
    program = small._program.pid
    os.kill(program, signal.SIGKILL)
    assert ask(child)["pid"] == child.pid  # it does not need the nursery
    child.stdin.close()
    assert child.wait(10) == 0
    child.close()
    again = start(small, tmp_path)  # and a new one is made
    assert small._program.pid != program
    again.terminate()
    assert again.wait(10) == -signal.SIGTERM
    again.close()


def wait_until_gone(number: int) -> None:
    for _ in range(200):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("it is still there")


def test_where_the_nursery_cannot_start_a_process_of_its_own_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "MODULE", "pbbench.no_such_module")
    monkeypatch.setattr(process, "PLAIN", (sys.executable, "-c", "raise SystemExit('torch is broken')"))
    settings = tiny()
    with Nursery() as found:
        worker = process.Worker(settings, plan(settings)[0], "cpu", tmp_path, found)
        while worker.read() is not None:
            pass
        ended = worker.end()
    assert ended.status == "crashed"
    assert ended.error is not None
    assert "torch is broken" in ended.error["message"]


@pytest.mark.slow
def test_what_is_prepared_starts_no_thread_and_looks_for_no_gpu() -> None:
    """A thread would be lost in the children, and CUDA, once started, does not work in them."""
    code = (
        "import importlib, threading, os\n"
        f"[importlib.import_module(name) for name in {nursery.PREPARED!r}]\n"
        "import torch\n"
        "tasks = len(os.listdir('/proc/self/task'))\n"
        "print(threading.active_count(), torch.cuda.is_initialized(), tasks)"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # NumPy's library takes care of its own at a fork
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["1", "False", "1"]
