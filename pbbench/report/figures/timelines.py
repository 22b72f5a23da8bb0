"""The figure of live bytes over the operations of one step: a panel per divider, coloured by category, the peak marked.

Drawn from what a cell's ``details["timeline"]`` holds (``memory/timeline.py`` says what that is); the panels share their
vertical axis, so that what a divider takes off the peak is seen as height.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import offset_copy

from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import CellResult
from pbbench.records.rows import CATEGORIES
from pbbench.report.figures.style import STEP_NAMES, category_fill, category_legend, new_panels, styled
from pbbench.report.tables.configurations import STEPS, axis, configurations
from pbbench.report.tables.formatting import byte_unit

MOST_STRETCHES = 7
"""Of forward, backward and optimizer that are still told apart on the axis; a step of many chunks has more."""
NAMED_MODULES = 2

Timeline = Mapping[str, Any]


def representative(cells: Sequence[CellResult], step: str) -> dict[str, Timeline]:
    """Title → timeline of ``step`` ("train" or "sample"): for each divider the configuration with the lowest peak; of the
    experiment itself, without its variants."""
    phase = STEPS[step]
    found: dict[int, tuple[str, Timeline]] = {}
    for settings, members in configurations(c for c in cells if not axis(c, "variant")):
        data = next((c.details["timeline"][phase] for c in members if phase in c.details.get("timeline", {})), None)
        divider = settings["patch_divider"]
        if data and (divider not in found or data["peak_bytes"] < found[divider][1]["peak_bytes"]):
            named = settings["patches_per_pass"]
            words = {"all": "all patches", "index": "one index a pass"}.get(named, f"{named} a pass")
            found[divider] = (f"d = {divider}" + (f", {words}" if divider > 1 else ""), data)
    return dict(found[divider] for divider in sorted(found))


@styled
def live_bytes_over_a_step(timelines: Mapping[str, Timeline], step: str) -> Figure | None:
    """A panel per entry, in rows of four; ``step`` names the axis."""
    if not timelines:
        return None
    columns = min(4, len(timelines))
    rows = math.ceil(len(timelines) / columns)
    figure, panels = new_panels(columns, 0.45 + 2.15 * rows, rows, sharey=True)
    unit, size = byte_unit([data["peak_bytes"] for data in timelines.values()])
    highest = max(data["peak_bytes"] for data in timelines.values()) / size
    shown = [name for name in CATEGORIES if any(name in data["live_bytes"] for data in timelines.values())]
    for axes, (title, data) in zip(panels, timelines.items(), strict=False):
        axes.set_title(title, fontsize=8, pad=3)
        _stack(axes, data, shown, size)
        _mark_peak(axes, data, size, highest, 76 // max(columns, 2))
        _name_phases(axes, data)
        axes.set_xlim(0, data["num_events"])
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[0].set_ylim(0, highest * 1.45)  # room for the peak's words over the highest panel
    for axes in panels[len(timelines) :]:
        axes.set_axis_off()
    panels[0].yaxis.set_major_locator(MaxNLocator(5))
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    for axes in panels[: len(timelines) : columns]:
        axes.set_ylabel(f"{STEP_NAMES[step]} step,\nlive tensor bytes ({unit})")
    for axes in panels[: len(timelines)][-columns:]:
        axes.set_xlabel("allocations and frees")
    category_legend(figure, shown, [], columns == 1)
    return figure


def _stack(axes: Axes, data: Timeline, shown: Sequence[str], size: int) -> None:
    """The categories as steps: between two places the level is that of the first."""
    places = data["index"]
    below = [0.0] * len(places)
    for name in shown:
        values = data["live_bytes"].get(name, 0)
        heights = values if isinstance(values, list) else [values] * len(places)
        top = [b + h / size for b, h in zip(below, heights, strict=True)]
        axes.fill_between(places, below, top, step="post", linewidth=0.0, **category_fill(name))
        below = top
    axes.step(places, below, where="post", color="#333333", linewidth=0.5)


def _mark_peak(axes: Axes, data: Timeline, size: int, highest: float, most: int) -> None:
    """A point at the peak, and over it what it is: its size, and the modules that made most of its activations, each name in
    at most ``most`` characters."""
    x, y = data["peak_index"], data["peak_bytes"] / size
    above = offset_copy(axes.transData, axes.get_figure(root=True), y=2.5, units="points")
    axes.plot([x], [y], "v", color="black", markersize=3.5, clip_on=False, transform=above, zorder=5)
    lines = [f"peak {format_bytes(data['peak_bytes'])}"]
    lines += [f"{_shortened(name, most)}: {format_bytes(count)}" for name, count in data["top_modules"][:NAMED_MODULES]]
    place: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 6, "linespacing": 1.15}
    words = axes.text(0.5 * data["num_events"], y + 0.085 * highest, "\n".join(lines), **place)
    words.set_in_layout(False)
    words.set_path_effects([withStroke(linewidth=2, foreground="white")])  # the grid does not run through them


def _name_phases(axes: Axes, data: Timeline) -> None:
    """Thin rules where forward, backward and optimizer begin, their names at the foot."""
    starts = data["phases"]
    if not starts or len(starts) > MOST_STRETCHES:
        return
    ends = [first for _, first in starts[1:]] + [data["num_events"]]
    for number, ((name, first), end) in enumerate(zip(starts, ends, strict=True)):
        if number:
            axes.axvline(first, color="white", linewidth=0.6, linestyle=(0, (2, 2)))
        if end - first > 0.16 * data["num_events"]:
            axes.text((first + end) / 2, 0, name, ha="center", va="bottom", fontsize=6, color="white")


def _shortened(name: str, most: int) -> str:
    """The end of a module's path says more than its beginning: as many of the last names as fit, or part of the last."""
    if len(name) <= most:
        return name
    tails = [name[place + 1 :] for place, letter in enumerate(name) if letter == "."]
    return "…" + next((tail for tail in tails if len(tail) < most), name[-(most - 1) :])
