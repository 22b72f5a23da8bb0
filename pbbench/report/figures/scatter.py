"""The charts of configurations as points: memory against quality (at equal memory time against quality), and speed against
memory.

Each function takes ``tables.tradeoff`` and returns a figure, or None where it holds nothing to draw. Shape marks the divider,
or in a run with variants the variant, the divider then standing at the point; filled marks one patch index a pass, open marks
all patches in one pass, half filled any other number.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pbbench.records.quality_names import quality_label
from pbbench.report.figures.style import (
    COLUMN_WIDTH,
    FULL_WIDTH,
    MARKERS,
    STEP_NAMES,
    STRONG,
    WEAK,
    Point,
    new_figure,
    place_labels,
    scale_axis,
    styled,
)
from pbbench.report.tables.configurations import METERS, STEPS, passes_in_words
from pbbench.report.tables.formatting import byte_unit
from pbbench.report.tables.scores import distance_column, sample_counts

DASHED: Any = {"color": STRONG, "linestyle": (0, (4, 2)), "linewidth": 0.8}
DOTTED: Any = {"color": WEAK, "linestyle": (0, (1, 1.5)), "linewidth": 1.1}
POINT: Any = {"linestyle": "none", "markersize": 5, "markeredgewidth": 0.9}


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that none beats, both coordinates being better when smaller, sorted by the first; equal points
    do not beat each other."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


@dataclass
class _Panel:
    """The points in one pair of axes."""

    axes: Axes
    lines: pd.DataFrame
    xs: list[float]
    ys: list[float]
    joins: list[list[Point]] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        return list(zip(self.xs, self.ys, strict=True))


def _panels(frame: pd.DataFrame, columns: Mapping[str, str], *, sharey: bool) -> tuple[Figure, list[_Panel]] | None:
    """A panel for each pair of columns (x → y) that has points, with its x axis: a step's peak, or the seconds of training."""
    frame = _with_kinds(frame)
    drawn = {x: frame[frame[x].notna() & frame[y].notna()] for x, y in columns.items() if x in frame}
    drawn = {x: lines for x, lines in drawn.items() if len(lines)}
    if not drawn:
        return None
    alone = len(columns) > 1 == len(drawn)  # the other step failed everywhere
    figure = new_figure(COLUMN_WIDTH if alone else FULL_WIDTH, 2.75)
    panels = []
    for axes, (x, lines) in zip(figure.subplots(1, len(drawn), sharey=sharey, squeeze=False)[0], drawn.items(), strict=True):
        unit, size = ("s", 1) if x == "train_seconds" else byte_unit(lines[x])
        step, meter = STEP_NAMES[x.split("_")[0]], METERS[frame.attrs["memory_column"]]
        panel = _Panel(axes, lines, list(lines[x] / size), list(lines[columns[x]]))
        panels.append(panel)
        scale_axis(axes.xaxis, panel.xs, zero=True)
        axes.set_xlabel(f"{step} ({unit})" if x == "train_seconds" else f"{step} peak, {meter} ({unit})")
        if f"{x}_min" in lines:  # the range over the repeats
            low, high = (lines[f"{x}_{end}"] / size for end in ("min", "max"))
            axes.hlines(panel.ys, low, high, color=WEAK, linewidth=0.7, zorder=2)
    return figure, panels


def _with_kinds(frame: pd.DataFrame) -> pd.DataFrame:
    words = [f"d = {divider:.0f}" for divider in frame["patch_divider"]]
    if frame["variant"].any():
        words = [variant or "the experiment" for variant in frame["variant"]]
    return frame.assign(kind=words)


def _marker(passes: str, colour: str) -> Any:
    fill = {"index": "full", "all": "none"}.get(passes, "left")
    return {**POINT, "fillstyle": fill, "markerfacecoloralt": "white", "color": colour}


def _name(line: Any) -> str:
    alone = line["patch_divider"] == 1 and line["patches_per_pass"] == "all"
    passes = line["patches_per_pass"]
    return f"d={line['patch_divider']:.0f}" + ("" if alone else f" {passes}" if passes in ("all", "index") else f" p={passes}")


def _kinds(panels: Sequence[_Panel]) -> list[str]:
    """What the points' shapes tell, in the legend's order: the variant where there is any, else the divider."""
    return list(dict.fromkeys(pd.concat([panel.lines for panel in panels]).sort_values(["variant", "patch_divider"])["kind"]))


def _draw_points(panel: _Panel, kinds: Sequence[str], colours: Sequence[str]) -> None:
    for (x, y), (_, line), colour in zip(panel.points, panel.lines.iterrows(), colours, strict=True):
        shape: Any = MARKERS[kinds.index(line["kind"]) % len(MARKERS)]
        above = 4 if colour == STRONG else 3
        panel.axes.plot([x], [y], marker=shape, zorder=above, **_marker(line["patches_per_pass"], colour))


def _finish(figure: Figure, panels: Sequence[_Panel], extra: Sequence[Line2D]) -> Figure:
    """The shapes and fills that occur in a legend under the panels, then the points' labels."""
    lines = pd.concat([panel.lines for panel in panels])
    shape: Any = {**POINT, "color": "#555555", "markerfacecolor": "#dddddd"}
    handles = [Line2D([], [], marker=MARKERS[i % len(MARKERS)], label=kind, **shape) for i, kind in enumerate(_kinds(panels))]
    occurring = {passes if passes in ("all", "index") else "other" for passes in lines["patches_per_pass"]}
    for passes in ("all", "index", "other"):
        if passes in occurring:
            label = "another number a pass" if passes == "other" else passes_in_words(passes)
            handles.append(Line2D([], [], marker="o", label=label, **_marker(passes, STRONG)))
    handles += list(extra)
    most = 7 if figure.get_figwidth() > COLUMN_WIDTH else 2
    if lines["variant"].any():  # names of any length: about 19 letters an inch, and room for the shapes
        longest = max(len(str(handle.get_label())) for handle in handles)
        most = max(1, int(19 * figure.get_figwidth() / (longest + 7)))
    columns = math.ceil(len(handles) / math.ceil(len(handles) / most))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handletextpad=0.2, columnspacing=1.0)
    for panel in panels:
        place_labels(panel.axes, panel.points, [_name(line) for _, line in panel.lines.iterrows()], panel.joins)
    return figure


def _quality_axis(frame: pd.DataFrame, column: str) -> str:
    bars = [told for end, told in (("low", "95%"), ("min", "least–most")) if f"{column}_{end}" in frame]
    told = f"lower is better; bars: {' or '.join(bars)}" if bars else "lower is better"
    return "\n".join([*textwrap.wrap(quality_label(column, sample_counts(frame)), 36), f"({told})"])


@styled
def memory_against_quality(frame: pd.DataFrame) -> Figure | None:
    """The trade-off as points, training and sampling side by side, with the floor of the quality figure, the configurations no
    other beats joined, unless the run does not rank its dividers, and bars for the figure's 95% intervals, or its range over
    several trainings, where it has them."""
    return _against_quality(frame, [f"{step}_peak_bytes" for step in STEPS])


@styled
def time_against_quality(frame: pd.DataFrame) -> Figure | None:
    """As ``memory_against_quality``, over the seconds that the training took: what is left to compare at equal memory."""
    return _against_quality(frame, ["train_seconds"])


def _against_quality(frame: pd.DataFrame, costs: Sequence[str]) -> Figure | None:
    column = distance_column(frame)
    drawn = _panels(frame, dict.fromkeys(costs, column), sharey=True) if column else None
    if column is None or drawn is None:
        return None
    figure, panels = drawn
    kinds = _kinds(panels)
    judged, floor = frame.attrs["verdict"], frame.attrs["floors"].get(column)
    ranked = judged is None or judged.ranks
    shown: list[float] = []
    for panel in panels:
        front = pareto(panel.points) if ranked else list(range(len(panel.points)))
        if ranked:
            corners = [panel.points[front[0]]]
            for i in front[1:]:  # a staircase: the best quality that each size of memory buys
                corners += [(panel.xs[i], corners[-1][1]), panel.points[i]]
            panel.axes.plot(*zip(*corners, strict=True), **DASHED)
            panel.joins.append(corners)
        if floor is not None:
            panel.axes.axhline(floor, **DOTTED)
            shown.append(floor)
        _draw_points(panel, kinds, [STRONG if i in front else WEAK for i in range(len(panel.points))])
        for low, high in (("low", "high"), ("min", "max")):
            if f"{column}_{low}" in panel.lines:
                ends = zip(panel.xs, panel.lines[f"{column}_{low}"], panel.lines[f"{column}_{high}"], strict=True)
                bars = [(x, least, most) for x, least, most in ends if not math.isnan(least)]
                panel.axes.vlines(*zip(*bars, strict=True), color=WEAK, linewidth=0.7, zorder=2)
                panel.joins += [[(x, least), (x, most)] for x, least, most in bars]
    shown += [y for panel in panels for y in panel.ys]
    lowest = min(shown) / 2  # an interval that reaches down to 0 is cut, so that it does not press the points together
    shown += [max(y, lowest) for panel in panels for join in panel.joins for _, y in join]
    scale_axis(panels[0].axes.yaxis, shown, zero=False)
    panels[0].axes.set_ylabel(_quality_axis(frame, column))
    extra = [Line2D([], [], label="Pareto front (its points dark)", **DASHED)] if ranked else []
    extra += [Line2D([], [], label="floor (real images)", **DOTTED)] if floor is not None else []
    return _finish(figure, panels, extra)


@styled
def speed_against_memory(frame: pd.DataFrame) -> Figure | None:
    """The trade-off as points: images per second over the peak, a line through the dividers of each way to pass."""
    drawn = _panels(frame, {f"{step}_peak_bytes": f"{step}_images_per_second" for step in STEPS}, sharey=False)
    if drawn is None:
        return None
    figure, panels = drawn
    kinds = _kinds(panels)
    for panel in panels:
        step = panel.axes.get_xlabel().split()[0]
        given, divider = panel.lines["patches_per_pass"], panel.lines["patch_divider"]
        for passes, dash in (("all", ":"), ("index", "-")):
            own = given.eq(passes) | (divider.eq(1) & given.eq("all"))  # at d = 1 the two are one
            own &= panel.lines["variant"].eq("")
            joined = [point for point, member in zip(panel.points, own, strict=True) if member]
            if len(joined) > 1:
                panel.axes.plot(*zip(*joined, strict=True), color="#b4b4b4", linestyle=dash, linewidth=0.8, zorder=1)
                panel.joins.append(joined)
        _draw_points(panel, kinds, [STRONG] * len(panel.points))
        scale_axis(panel.axes.yaxis, panel.ys, zero=True)
        panel.axes.set_ylabel(f"{step} speed (images/s)")
    return _finish(figure, panels, [])
