"""Which figures a run gets: one entry of ``FIGURES`` each, drawn, named and captioned, or left out with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pbbench.records.cells import CellResult
from pbbench.records.quality_names import quality_label
from pbbench.report.figures.bars import peak_by_category
from pbbench.report.figures.samples import samples
from pbbench.report.figures.scatter import memory_against_quality, speed_against_memory, time_against_quality
from pbbench.report.figures.style import STEP_NAMES
from pbbench.report.figures.timelines import live_bytes_over_a_step, representative
from pbbench.report.tables.configurations import METERS, STEPS, axis, memory_given
from pbbench.report.tables.held_equal import held_equal, trained_from
from pbbench.report.tables.layout import fixed_settings
from pbbench.report.tables.memory import split
from pbbench.report.tables.scores import distance_column, sample_counts
from pbbench.report.tables.tradeoff import tradeoff


@dataclass(frozen=True)
class Picture:
    """One figure of a report."""

    name: str
    """Of its files, without the suffix."""
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Shown:
    """What one set of figures is drawn from: what was measured at one batch size and precision, and the variants that are to be
    seen beside it."""

    cells: Sequence[CellResult]
    """Of the whole run."""
    measured: Sequence[CellResult]
    """Of this batch size and precision."""
    lines: pd.DataFrame
    """Of the trade-off."""
    parts: pd.DataFrame
    """What fills the peaks, of the experiment itself."""
    suffix: str = ""
    """Of the figures' names: none where the run has but one set."""

    @property
    def at_equal_memory(self) -> bool:
        """Each divider has a batch size of its own."""
        return memory_given(self.cells) is not None

    @property
    def settings(self) -> str:
        return fixed_settings(self.lines[self.lines["variant"].eq("")])

    @property
    def meter(self) -> str:
        return METERS[self.lines.attrs["memory_column"]]

    @property
    def variants(self) -> str:
        names = ", ".join(dict.fromkeys(name for name in self.lines["variant"] if name))
        return f" Beside it its variants, each with settings of its own: {names}." if names else ""


@dataclass(frozen=True)
class Entry:
    """One kind of figure."""

    name: str
    title: str
    draw: Callable[[Shown], Figure | None]
    """None where there is nothing to draw."""
    caption: Callable[[Shown], str]
    absent: Callable[[Shown], str]
    """Of the whole run: why there is none; empty where none is to be expected. Entries that say the same stand in for each
    other."""


def _quality_caption(shown: Shown) -> str:
    axes = f"Memory against quality: peak of a warm training step and of a warm sampling step by {shown.meter}"
    ways = "every way to pass its patches has its quality"
    if shown.at_equal_memory:
        axes, ways = "Time against quality: seconds that the training took", "in the quickest way that was predicted to fit"
    named = quality_label(distance_column(shown.lines) or "", sample_counts(shown.lines))
    judged = shown.lines.attrs["verdict"]
    front = "the dark points on the dashed line are beaten by no other"
    if judged is not None and not judged.ranks:
        front = "no front is drawn, because this run does not rank its dividers"
    caption = (
        f"{axes}, {shown.settings}; quality as {named}. Smaller is better on both axes; {front}. A divider "
        f"is trained {trained_from(shown.cells)}: {ways}. "
        f"{held_equal(shown.cells) or ''}"
    )
    return caption.rstrip() + shown.variants


def _no_quality(shown: Shown, at_equal_memory: bool) -> str:
    if shown.at_equal_memory != at_equal_memory:
        return ""
    if not any(cell.kind == "quality" for cell in shown.cells):
        why = "this run scored no images (memory and speed only)"
    elif distance_column(shown.lines) is None:
        why = "no divider has a quality figure"
    else:
        why = "no scored divider has a measured peak"
    return f"{'Time' if at_equal_memory else 'Memory'} against quality: {why}."


def _split_caption(shown: Shown) -> str:
    ways = "in the way it was trained" if shown.at_equal_memory else "all patches in one pass beside one patch index a pass"
    read = shown.parts["workspace_bytes"].notna().any()
    workspaces = "Workspaces: what torch.cuda had allocated beyond them. " if read else ""
    return (
        f"What fills the peak of a warm step, {shown.settings}: live tensor bytes per divider, {ways}. {workspaces}"
        "The figures over the "
        f"bars are their sums.{' Variants stand in the table.' * bool(shown.variants)}"
    )


def _timeline_caption(shown: Shown, step: str) -> str:
    ways = "it was trained with" if shown.at_equal_memory else "has the lowest peak"
    return (
        f"Live tensor bytes over one {STEP_NAMES[step]} step, {shown.settings}: for each divider the way to pass its "
        f"patches that {ways}. The triangle marks the peak; under its size the modules that made most of its "
        "activations. The figures stand in cells/, details.timeline."
    )


FIGURES = (
    Entry(
        "memory_quality",
        "Memory against quality",
        lambda shown: None if shown.at_equal_memory else memory_against_quality(shown.lines),
        _quality_caption,
        partial(_no_quality, at_equal_memory=False),
    ),
    Entry(
        "time_quality",
        "Time against quality",
        lambda shown: time_against_quality(shown.lines),
        _quality_caption,
        partial(_no_quality, at_equal_memory=True),
    ),
    Entry(
        "memory_split",
        "What fills each peak",
        lambda shown: peak_by_category(shown.parts),
        _split_caption,
        lambda _: "What fills each peak: no step that ended well was split by what fills it.",
    ),
    *(
        Entry(
            f"timeline_{step}",
            f"Memory over a {STEP_NAMES[step]} step",
            lambda shown, step=step: live_bytes_over_a_step(representative(shown.measured, step), step),  # type: ignore[misc]
            partial(_timeline_caption, step=step),
            lambda _: "Memory over a step: no cell holds a timeline (details.timeline).",
        )
        for step in STEPS
    ),
    Entry(
        "speed_memory",
        "Speed against memory",
        lambda shown: speed_against_memory(shown.lines),
        lambda shown: (
            f"Speed against memory of a warm step, {shown.settings}; peaks by {shown.meter}. Up and to the left is better."
            f"{shown.variants}"
        ),
        lambda _: "Speed against memory: no step that ended well has both a peak and a speed.",
    ),
)
"""In the report's order; the samples come last."""


def pictures(cells: Sequence[CellResult], run: Path) -> tuple[list[Picture], list[str]]:
    """The figures the cells hold data for, and for each other one a line that says why it is not there."""
    everything = Shown(cells, cells, tradeoff(cells), split(cells))
    found: list[Picture] = []
    absent = dict.fromkeys(line for entry in FIGURES if (line := entry.absent(everything)))
    for shown in _sets(everything):
        for entry in FIGURES:
            figure = entry.draw(shown)
            if figure is not None:
                found.append(Picture(entry.name + shown.suffix, entry.title, entry.caption(shown), figure))
                absent.pop(entry.absent(everything), None)
    figure, caption, notes = samples(cells, run, everything.lines)
    if figure is not None:
        found.append(Picture("samples", "Samples", caption, figure))
    return found, [*absent, *notes]


def _sets(everything: Shown) -> Iterator[Shown]:
    """One for each pair of batch size and precision of the experiment itself; variants that have a batch size or precision of
    their own are to be seen in each. At equal memory all dividers stand together."""
    parts = everything.parts[everything.parts["variant"].eq("")]
    measured = everything.lines[everything.lines["batch_size"].notna()]
    cells = [cell for cell in everything.cells if cell.kind == "measure"]
    if everything.at_equal_memory:
        yield Shown(everything.cells, cells, measured, parts)
        return
    of_cells = [_pair(axis(cell, "batch_size"), axis(cell, "mixed_precision")) for cell in cells]
    of_lines, of_parts = (list(map(_pair, f["batch_size"], f["mixed_precision"])) for f in (measured, parts))
    own = dict.fromkeys(pair for pair, variant in zip(of_lines, measured["variant"], strict=True) if not variant)
    for pair in own:
        chosen = [c for c, its in zip(cells, of_cells, strict=True) if its == pair]
        lines = measured.loc[[its == pair or its not in own for its in of_lines]]
        suffix = f"-b{pair[0]:.0f}-{pair[1]}" if len(own) > 1 else ""
        yield Shown(everything.cells, chosen, lines, parts.loc[[its == pair for its in of_parts]], suffix)


def _pair(batch_size: float, precision: Any) -> tuple[float, Any]:
    """Batch size and precision, in which unknown equals unknown."""
    return batch_size, None if pd.isna(precision) else precision
