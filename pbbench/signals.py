"""What happens at Ctrl-C and at SIGTERM, which a scheduler sends when a job's time is up.

A training (``StopSignals``) ends its step, saves a checkpoint, and then lets the signal have its usual effect. A sweep
(``terminated_like_ctrl_c``) takes both for a KeyboardInterrupt: it stops its workers (``sweep.process.stop``, which gives a
training the time to save), and every cell that has ended is kept. The command line (``cli.options.run_app``) ends with exit
code 130. Whatever was stopped goes on with ``--resume``.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class StopSignals:
    """Ctrl-C and SIGTERM noted instead of obeyed at once, so that training can save first; a second one acts at once.

    Used as a context manager; afterwards ``deliver`` lets the noted signal have its usual effect. Signals can only be
    caught in the main thread; in another one this does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def deliver(self) -> None:
        if self.received is not None:
            signal.raise_signal(self.received)


@contextlib.contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """A scheduler's SIGTERM stops a sweep as Ctrl-C does: cells are stopped, and training saves what it has.

    Signals can only be caught in the main thread; in another one this does nothing.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
