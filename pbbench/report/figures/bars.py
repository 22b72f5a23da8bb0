"""The chart of what fills each peak: stacked bars per divider, coloured by category of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pbbench.report.figures.style import STEP_NAMES, category_fill, category_legend, new_panels, styled
from pbbench.report.tables.configurations import METERS, STEPS
from pbbench.report.tables.formatting import byte_unit, in_unit
from pbbench.report.tables.memory import PARTS

DIAMOND: Any = {"marker": "D", "linestyle": "none", "color": "black", "markerfacecolor": "white", "markersize": 3}


@styled
def peak_by_category(frame: pd.DataFrame) -> Figure | None:
    """``tables.memory.split`` as stacked bars per divider, the ways to pass side by side, training and sampling in two panels.
    On CUDA the workspaces on top, up to what the allocator measured; where it measured less than live tensors, a diamond."""
    drawn = {s: frame[frame["step"] == s] for s in STEPS if (frame["step"] == s).any()}
    if not drawn:
        return None
    figure, panels = new_panels(len(drawn), 3.0)
    shown = [name for name in PARTS if (frame[f"{name}_bytes"] > 0).any()]
    for axes, (short, lines) in zip(panels, drawn.items(), strict=True):
        unit = byte_unit([*lines["peak_live_bytes"], *lines["measured_peak_bytes"]])
        _draw_bars(axes, lines, shown, unit)
        kind = "allocated" if "workspace" in shown else "live tensor bytes"
        axes.set_ylabel(f"{STEP_NAMES[short]} peak, {kind} ({unit[0]})")
    measured = _beside(frame).notna().any()
    others = [Line2D([], [], label=METERS["peak_allocated_bytes"], **DIAMOND)] if measured else []
    category_legend(figure, shown, others, len(drawn) == 1)
    return figure


def _beside(lines: pd.DataFrame) -> pd.Series:
    """The allocator's peaks that no bar reaches up to."""
    return lines["measured_peak_bytes"].where(lines["workspace_bytes"].isna())


def _draw_bars(axes: Axes, lines: pd.DataFrame, shown: Sequence[str], unit: tuple[str, int]) -> None:
    size = unit[1]
    places, middles = _bar_places(list(lines["patch_divider"]))
    below, measured = pd.Series(0.0, index=lines.index), _beside(lines) / size
    for name in shown:
        heights = lines[f"{name}_bytes"].fillna(0) / size
        axes.bar(places, heights, 0.8, bottom=below, linewidth=0.3, **category_fill(name))
        below += heights
    tops = pd.concat([below, measured], axis=1).max(axis=1)
    axes.plot(places, measured, **DIAMOND)
    crowded = len(places) > 10
    lift = (6.0 if crowded else 4.0) if measured.notna().any() else 2.0  # clear of the diamond
    turn = 90 if crowded else 0
    for place, top, total in zip(places, tops, below * size, strict=True):
        shift: Any = {"xytext": (0, lift), "textcoords": "offset points"}
        axes.annotate(_short(total, *unit), (place, top), ha="center", fontsize=6, rotation=turn, **shift)
    axes.set_ylim(0, tops.max() * (1.18 if crowded else 1.1))
    spare = max(0.8, 2.5 - (places[-1] - places[0]) / 2)  # a single bar does not fill the panel
    axes.set_xlim(places[0] - spare, places[-1] + spare)
    axes.set_xticks(places, list(lines["patches_per_pass"]), fontsize=6, rotation=turn)
    axes.tick_params(axis="x", length=0, pad=1.5)
    axes.grid(False, axis="x")
    under = axes.secondary_xaxis(location=0)
    under.set_xticks(list(middles.values()), [f"d = {d:.0f}" for d in middles])
    under.tick_params(axis="x", length=0, pad=26 if crowded else 11)
    under.spines["bottom"].set_visible(False)


def _short(value: float, unit: str, size: int) -> str:
    """Three digits at most, for over a bar."""
    if value < 10 * size:
        return in_unit(value, unit, size)
    return f"{value / size:,.{1 if value < 100 * size else 0}f}"


def _bar_places(dividers: Sequence[int]) -> tuple[list[float], dict[int, float]]:
    """A place for each bar, those of a divider beside each other; and the middle of each divider's bars."""
    places: list[float] = []
    for i, divider in enumerate(dividers):
        places.append(0.0 if i == 0 else places[-1] + (1.0 if divider == dividers[i - 1] else 1.6))
    middles = {}
    for divider in dict.fromkeys(dividers):
        own = [place for place, d in zip(places, dividers, strict=True) if d == divider]
        middles[divider] = sum(own) / len(own)
    return places, middles
