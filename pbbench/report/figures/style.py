"""How the figures look, and how they are saved: sizes for a paper's column, colours that survive grey, labels that do not
overlap, and files whose bytes depend on the data only.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from pbbench.report.tables.memory import CATEGORY_NAMES

FULL_WIDTH = 7.0
"""Inches: the text width of a two-column paper."""
COLUMN_WIDTH = 3.4
"""Inches: one column of it."""
DPI = 300
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.0,
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.dpi": DPI,
    "svg.hashsalt": "pbbench",
    "svg.fonttype": "path",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
STEP_NAMES = {"train": "training", "sample": "sampling"}
STRONG, WEAK = "#123a75", "#8c8c8c"
# Category → (colour, hatch): steps of luminance from dark to light, so that grey tells them apart, and hatches besides.
FILLS = {
    "parameter": ("#0b2545", ""),
    "gradient": ("#2f4b7c", "////"),
    "optimizer": ("#56678f", ""),
    "ema": ("#7d7f7c", "\\\\\\\\"),
    "input": ("#a59c74", ""),
    "activation": ("#e3c64f", ""),
    "other": ("#fdf3c4", "----"),
    "workspace": ("#ffffff", "...."),
}

# Where a label is tried: distances from its point in pt, directions in degrees, the best first.
NEAR, FAR = (5, 9, 14), (20, 27, 36, 48)
LEADER_FROM = 14
ANGLES = (0, 180, 45, 315, 135, 225, 90, 270, 20, 340, 160, 200)

Point = tuple[float, float]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def styled(draw: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Draw under this file's settings, whatever the caller's matplotlib is set to."""

    @wraps(draw)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            settings: Any = matplotlib.rcParams
            settings.update(STYLE)
            return draw(*args, **kwargs)

    return wrapped


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that fits its own labels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(columns: int, height: float, rows: int = 1, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of a paper's column for a single panel, else of the text's width, and its panels."""
    figure = new_figure(FULL_WIDTH if columns > 1 else COLUMN_WIDTH, height)
    return figure, list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).ravel())


@styled
def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as "png" or "svg", without date or program version, so that equal figures are equal files."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def scale_axis(axis: Axis, values: Sequence[float], *, zero: bool) -> None:
    """Logarithmic where the values span more than a factor of ten, with plain numbers at 1, 2 and 5; else linear, from zero
    where that does not squeeze the values."""
    axes = axis.axes
    name = axis.axis_name  # type: ignore[attr-defined]
    low, high = min(values), max(values)
    if low > 0 and high / low > 10:
        axes.set(**{f"{name}scale": "log", f"{name}lim": (low / 1.45, high * 1.45)})
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.14 * (high - low) or 0.1 * abs(high) or 1.0
        bottom = 0.0 if zero and low < 0.5 * high else low - margin
        axes.set(**{f"{name}lim": (bottom, high + margin)})
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}".replace("-", "−")))


def category_fill(name: str) -> dict[str, Any]:
    """The fill of a category of memory; edges and hatches in what shows on it."""
    dark = name in ("parameter", "gradient", "optimizer", "ema")
    colour, hatch = FILLS[name]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "#ffffff" if dark else "#333333"}


def category_legend(figure: Figure, shown: Iterable[str], others: Sequence[Any], one_column: bool) -> None:
    """The categories' fills under the panels, then other handles."""
    handles = [Patch(**category_fill(name), linewidth=0.3, label=CATEGORY_NAMES[name]) for name in shown]
    most = 3 if one_column else len(handles) + len(others)
    place: Any = {"loc": "outside lower center", "ncols": most}
    figure.legend(handles=[*handles, *others], handletextpad=0.4, columnspacing=1.0, **place)


def place_labels(
    axes: Axes, points: Sequence[Point], texts: Sequence[str], lines: Sequence[Sequence[Point]] = (), size: float = 6.5
) -> None:
    """Write each point's label beside it where it covers no point, no line (where that can be had) and no other label, with
    a thin leader where it had to move away. The nearest free place wins and the points' order decides ties, so the result
    is always the same. Call it last: it takes the axes' limits as final."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixel = figure.dpi / 72
    at = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - 3.2 * pixel, y - 3.2 * pixel, 6.4 * pixel, 6.4 * pixel) for x, y in at]
    room = axes.get_window_extent(renderer)
    paths = [Path(axes.transData.transform(line)) for line in lines if len(line) > 1]
    placed: list[Bbox] = []
    leaders: list[Path] = []

    def is_free(box: Bbox, leader: Path | None, avoided: Sequence[Path]) -> bool:
        inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
        if not inside or any(box.overlaps(other) for other in (*taken, *placed)):
            return False
        if leader is not None and any(leader.intersects_bbox(other, filled=False) for other in placed):
            return False
        return not any(path.intersects_bbox(box, filled=False) for path in (*avoided, *leaders))

    for (x, y), point, text in zip(at, points, texts, strict=True):
        probe = axes.text(*point, text, fontsize=size)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        width, height = extent.width + pixel, extent.height
        tries = [*itertools.product((paths, []), NEAR, ANGLES), *itertools.product((paths, []), FAR, ANGLES)]
        for avoided, reach, angle in tries:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            centre = (x + dx * (reach * pixel + width / 2), y + dy * (reach * pixel + height / 2))
            box = Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)
            leader = Path([(x, y), centre]) if reach >= LEADER_FROM else None
            if is_free(box, leader, avoided):
                break
        else:  # a crowd that leaves no free place: the legend still tells the point's kind
            continue
        placed.append(box)
        leaders += [leader] if leader else []
        thin = {"arrowstyle": "-", "color": "#777777", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2.5}
        offset = ((centre[0] - x) / pixel, (centre[1] - y) / pixel)
        words: Any = {"xytext": offset, "textcoords": "offset points", "fontsize": size, "color": "#222222"}
        words["path_effects"] = [withStroke(linewidth=1.6, foreground="white")]
        axes.annotate(text, point, ha="center", va="center", arrowprops=thin if leader else None, **words)
