"""Fresh processes that begin with everything imported: a nursery imports once and forks a process for each cell. No torch here.

Importing torch and what a cell needs takes a process 2 to 5 s, longer than many a cell's work. The nursery (this file, run as a
program) has imported it, has touched no GPU and started no thread, and does nothing but fork: each child is in its own
session, with the environment, the folder and the channels that it was given, and shares nothing that it changes. Its resident
memory begins with the imports, as that of a process that has imported them itself.

A child that ended stays a zombie until its ``Forked`` is closed, so that its number cannot be another's when it is killed;
for that it has a guardian, which tells how it ended. The nursery leaves when the sweep that started it does, however that
ends.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import IO

MODULE = "pbbench.sweep.nursery"
PREPARED = (
    "pbbench.sweep.worker",
    "pbbench.sweep.workload",
    "pbbench.sweep.quality_cell",
    "pbbench.sweep.planning.forecast",
    "pbbench.memory.meters.phases",
    "pbbench.memory.tracer.timeline",
    "pbbench.training.train",
    "torch._subclasses.fake_tensor",
    "torch._dynamo",
    "accelerate",
)
"""What cells import. None of it may start a thread or look for a GPU."""
PER_PROCESS = ("CUDA_VISIBLE_DEVICES",)
"""Variables that a child may have its own of: nothing reads them on import."""


class Nursery:
    """Starts processes for ``sweep.process``; started itself with the first of them. Use as a context manager."""

    def __init__(self) -> None:
        self._program: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._environment: dict[str, str] = {}

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the nursery; processes it has started go on."""
        if self._channel is not None and self._program is not None:
            self._channel.close()
            self._program.kill()  # it may be importing
            self._program.wait()
        self._program = self._channel = None

    def start(self, errors: IO[str], environment: dict[str, str]) -> Forked:
        """A process that runs ``sweep.worker``, with ``errors`` as its standard error."""
        kept = {name: value for name, value in environment.items() if name not in PER_PROCESS}
        if self._program is None or self._program.poll() is not None or kept != self._environment:
            self.close()
            self._open(kept)
        assert self._channel is not None
        return Forked(self._channel, errors.fileno(), environment)

    def _open(self, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._program = subprocess.Popen(
                (sys.executable, "-m", MODULE, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )
        self._channel, self._environment = ours, environment


class Forked:
    """A child of the nursery, with as much of ``subprocess.Popen`` as ``sweep.process`` uses. Raises OSError where there is
    none."""

    def __init__(self, channel: socket.socket, errors: int, environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        (read_job, write_job), (read_events, write_events) = os.pipe(), os.pipe()
        self._guardian, theirs = socket.socketpair()
        self.stdin, self.stdout = os.fdopen(write_job, "wb"), os.fdopen(read_events, "rb", buffering=0)
        given = [read_job, write_events, errors, theirs.fileno()]
        try:
            request = json.dumps({"environment": environment, "folder": os.getcwd()}).encode()
            head = len(request).to_bytes(8, "big")
            channel.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given))])
            channel.sendall(request)
        finally:
            theirs.close()
            os.close(read_job)
            os.close(write_events)
        self.pid = _number(self._guardian)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its return code, as Popen's: −N where signal N ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._guardian.settimeout(max(timeout, 1e-6) if timeout is not None else None)
            try:
                self.returncode = _number(self._guardian)
            except TimeoutError:
                raise subprocess.TimeoutExpired(MODULE, timeout or 0) from None
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def close(self) -> None:
        """Its number may be another's from now on."""
        self._guardian.close()


def _number(channel: socket.socket) -> int:
    data = channel.recv(8, socket.MSG_WAITALL)
    if len(data) < 8:
        raise OSError("the process that starts cells has ended; see the system's log for what killed it")
    return int.from_bytes(data, "big", signed=True)


# The nursery's own side


def serve(channel: socket.socket, run: Callable[[], None]) -> None:
    """Fork a process that does ``run`` for every request, until the other side is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # guardians are nobody's business
    while True:
        head, ancillary, _, _ = channel.recvmsg(8, socket.CMSG_SPACE(4 * 4))
        if not head:
            return
        handles = array.array("i", ancillary[0][2][:16]).tolist()
        request = json.loads(channel.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
        if os.fork() == 0:
            channel.close()
            _guard(handles, request, run)
        for handle in handles:
            os.close(handle)


def _guard(handles: list[int], request: dict, run: Callable[[], None]) -> None:
    """In a process of its own: start the child, say its number, and how it ended; keep it until the other side has had
    enough."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    told = socket.socket(fileno=handles.pop())
    child = os.fork()
    if child == 0:
        told.close()
        _become(handles, request, run)
    for handle in handles:
        os.close(handle)
    with contextlib.suppress(OSError):  # nobody listens any more
        told.sendall(child.to_bytes(8, "big", signed=True))
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        told.sendall(code.to_bytes(8, "big", signed=True))
        told.recv(1)
    os._exit(0)


def _become(handles: list[int], request: dict, run: Callable[[], None]) -> None:
    """In the child: a session, an environment, a folder and channels of its own, then the work."""
    import random

    import numpy as np

    os.setsid()
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin = os.fdopen(os.dup(0), encoding="utf-8")
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", encoding="utf-8", buffering=1) for n in (1, 2))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    np.random.seed()
    try:
        run()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def main() -> None:
    import gc
    import importlib

    for name in PREPARED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what was imported is not looked through in every child, which would copy it
    from pbbench.sweep.worker import main as work

    serve(socket.socket(fileno=int(sys.argv[1])), work)


if __name__ == "__main__":
    main()
