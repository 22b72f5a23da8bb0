"""What a person sees while a sweep runs: cells done, running and left, what the running one does, the time left.

Several cells may run at the same time, one on each GPU. In a terminal a small panel is redrawn in place; elsewhere (a log,
CI) there is one line per cell. Everything goes to stderr.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import CellResult
from pbbench.records.quality_names import DISTANCE_WORDS, quality_label
from pbbench.sweep.grid import Cell

WORDS = {
    "load": "starting",
    "sample_step": "measuring a sampling step",
    "train_step": "measuring a training step",
    "train": "training",
    "sample": "sampling",
    "score": "scoring",
    "job": "running as a job",
}


@dataclass
class _Running:
    """A cell that runs and what it does."""

    cell: Cell
    doing: str = "starting"
    began: float = field(default_factory=time.monotonic)
    progress: dict[str, Any] = field(default_factory=dict)


class LiveView:
    """A ``run.Listener`` that draws. Use as a context manager around the sweep."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.cells: list[Cell] = []
        self.ended: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {}
        self.running: dict[str, _Running] = {}
        self.at_once = 1
        self.notes: set[str] = set()
        self.bar = Progress(TextColumn("cells"), BarColumn(40), MofNCompleteColumn(), console=console)
        self.task = self.bar.add_task("", total=1)
        self.live: Live | None = (
            Live(self, console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        )

    def __enter__(self) -> LiveView:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def started(self, cells: list[Cell], done: dict[str, str]) -> None:
        self.cells, self.ended = cells, dict(done)
        self.bar.update(self.task, total=len(cells), completed=len(done))
        again = f", {len(done)} finished before" if done else ""
        self.console.print(f"{len(cells)} cells{again}", highlight=False)

    def cell_started(self, cell: Cell) -> None:
        self.running[cell.id] = _Running(cell)
        self.at_once = max(self.at_once, len(self.running))

    def cell_event(self, cell: Cell, event: dict[str, Any]) -> None:
        running = self.running.get(cell.id)
        if running is not None and event["event"] == "phase":
            running.doing, running.progress = WORDS.get(event["phase"], event["phase"]), {}
        elif running is not None and event["event"] == "progress":
            running.progress = event
        elif event["event"] == "note" and event["text"] not in self.notes:
            self.notes.add(event["text"])  # every quality cell reads the same images
            self.console.print(event["text"], highlight=False, markup=False)

    def cell_ended(self, cell: Cell, result: CellResult, seconds: float) -> None:
        self.running.pop(cell.id, None)
        self.ended[cell.id] = result.status
        if seconds:  # else it was not run: no prediction lets it fit
            self.seconds.setdefault(cell.kind, []).append(seconds)
        self.bar.update(self.task, completed=len(self.ended))
        mark, style = ("✓", "green") if result.status == "ok" else ("✗", "red")
        line = Text.assemble((mark, style), f" {cell.describe()}  ", (f"{_summary(result)}  {_clock(seconds)}", "dim"))
        self.console.print(line, soft_wrap=not self.console.is_terminal)

    def seconds_left(self) -> float | None:
        """From the mean time of finished cells of each kind, and how many run at once; None until one of every kind that is
        left has ended."""
        left = [cell for cell in self.cells if cell.id not in self.ended]
        if any(cell.kind not in self.seconds for cell in left):
            return None
        mean = {kind: sum(times) / len(times) for kind, times in self.seconds.items()}
        gone = sum(time.monotonic() - running.began for running in self.running.values())
        return max(0.0, sum(mean[cell.kind] for cell in left) - gone) / self.at_once

    def __rich__(self) -> RenderableType:
        if not self.cells:
            return Text("looking at the machine", style="dim")
        left = self.seconds_left()
        remaining = "time left: not known yet" if left is None else f"about {_clock(left)} left"
        lines: list[RenderableType] = [self.bar, Text(remaining, style="dim")]
        for running in self.running.values():
            what = f"▸ {running.cell.describe()} · {running.doing} · {_clock(time.monotonic() - running.began)}"
            lines.append(Text(what, style="bold", overflow="ellipsis", no_wrap=True))
            if running.progress:
                lines.append(Text("  " + _progress(running.progress), overflow="ellipsis", no_wrap=True))
        return Group(*lines)


def _progress(state: dict[str, Any]) -> str:
    unit = "images" if state["doing"] == "sample" else "steps"
    parts = [f"{state['step']:,} of {state['num_steps']:,} {unit}"]
    if state.get("loss") is not None:
        parts.append(f"loss {state['loss']:.4f}")
    if state.get("images_per_second"):
        parts.append(f"{state['images_per_second']:.1f} images/s")
    if state.get("seconds_left") is not None:
        parts.append(f"{_clock(state['seconds_left'])} left")
    return " · ".join(parts)


def _summary(result: CellResult) -> str:
    """A cell's figures in a few words, for the line it leaves behind."""
    if result.status != "ok":
        return f"{result.status}: {result.error.get('message', '')[:120]}"
    parts = []
    for row in result.rows:
        peak = row.peak_allocated_bytes or row.peak_live_bytes
        if row.temperature == "warm" and row.phase in ("sample_step", "train_step"):
            parts.append(f"{row.phase.removesuffix('_step')} {format_bytes(peak)}, {row.images_per_second or 0:.3g} images/s")
        if row.phase == "quality":
            given = [name for name in DISTANCE_WORDS if getattr(row, name, None) is not None]
            parts += [f"{quality_label(name, [row.num_images])} {getattr(row, name):.3f}" for name in given]
    return "; ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
