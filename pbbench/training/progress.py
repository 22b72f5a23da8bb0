"""How training stands: a callback at most twice a second, and a bar on stderr."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

INTERVAL = 0.5
"""Seconds between two reports."""
LINE_INTERVAL = 30.0
"""Seconds between two lines where stderr is no terminal (a batch system's log)."""


class Progress:
    """Reports {step, num_steps, loss, images_per_second, seconds_left} to a callback and, if asked, draws a bar.

    The rate is that of the last reports (some ten seconds). Where ``ends_at`` (of the monotonic clock) comes first, num_steps
    is the step it should come at. Used as a context manager.
    """

    def __init__(
        self,
        callback: Callable[[dict[str, Any]], None] | None,
        show_bar: bool,
        num_steps: int,
        step: int,
        images_per_step: int,
        ends_at: float = math.inf,
    ) -> None:
        self.ends_at = ends_at
        self.callback, self.num_steps, self.images_per_step = callback, num_steps, images_per_step
        self.marks: deque[tuple[float, int]] = deque([(time.monotonic(), step)], maxlen=20)
        self.bar = _Bar(num_steps, step) if show_bar else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def report(self, step: int, loss: float, *, force: bool = False) -> None:
        """Costs a clock reading unless a report is due; ``force`` for the last step."""
        now = time.monotonic()
        if (now - self.marks[-1][0] < INTERVAL and not force) or (self.callback is None and self.bar is None):
            return
        since, first = self.marks[0]
        steps_per_second = (step - first) / max(now - since, 1e-9)
        self.marks.append((now, step))
        possible = steps_per_second * max(self.ends_at - now, 0)
        num_steps = min(self.num_steps, step + math.ceil(possible)) if math.isfinite(possible) else self.num_steps
        state = {
            "step": step,
            "num_steps": num_steps,
            "loss": loss,
            "images_per_second": steps_per_second * self.images_per_step,
            "seconds_left": (num_steps - step) / steps_per_second if steps_per_second > 0 else None,
        }
        if self.callback is not None:
            self.callback(state)
        if self.bar is not None:
            self.bar.update(state)


class _Bar:
    """A rich progress bar on stderr; plain lines where that is not a terminal."""

    def __init__(self, num_steps: int, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self.console = Console(stderr=True)
        self.last_line = time.monotonic()
        self.bar: RichProgress | None = None
        if self.console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self.bar = RichProgress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=num_steps, completed=step, note="")
            self.bar.start()

    def update(self, state: dict[str, Any]) -> None:
        left = state["seconds_left"]
        time_left = "" if left is None else f" · {timedelta(seconds=round(left))} left"
        note = f"loss {state['loss']:.4f} · {state['images_per_second']:,.1f} images/s{time_left}"
        if self.bar is not None:
            self.bar.update(self.task, completed=state["step"], total=state["num_steps"], note=note)
        elif time.monotonic() - self.last_line >= LINE_INTERVAL or state["step"] == state["num_steps"]:
            self.last_line = time.monotonic()
            self.console.print(
                f"training: step {state['step']} of {state['num_steps']} · {note}", soft_wrap=True, highlight=False
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
