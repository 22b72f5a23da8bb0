"""Tables for people: numbers with units as text, and that text as a terminal table, Markdown or LaTeX.

A ``Sheet`` is a table of finished strings. Each kind of table is laid out once, here; every output form prints the same
sheet, so that no two of them can disagree. A whole column shares one unit, which stands in its header.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from pbbench.records import CATEGORIES, CellResult
from pbbench.report import tables

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = "–"
# Column → header lines, for the quality figures. A distance that is not FID never carries that name.
QUALITY_HEADERS = {
    "frechet_inception_distance": ("FID",),
    "unverified_inception_frechet_distance": ("Fréchet,", "unverified", "Inception"),
    "random_features_frechet_distance": ("Fréchet,", "random", "features"),
    "kernel_inception_distance_mean": ("KID",),
    "precision": ("preci-", "sion"),
    "recall": ("recall",),
    "seam_score": ("seam", "score"),
    "held_out_loss": ("held-", "out", "loss"),
    "num_images": ("images", "scored"),
    "images_seen": ("images", "trained on"),
}
CATEGORY_NAMES = {
    "parameter": "weights",
    "gradient": "gradients",
    "optimizer": "optimizer",
    "ema": "EMA",
    "input": "inputs",
    "activation": "activations",
    "other": "other",
}


@dataclass(frozen=True)
class Column:
    header: tuple[str, ...]
    """Lines of the header."""
    cells: list[str]
    numeric: bool = True
    rank: int = 0
    """0: always shown; higher: left out earlier where a terminal is narrow."""
    title: str = ""
    """The header in one line, with the unit."""

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", " ".join(self.header))

    @property
    def width(self) -> int:
        return max(len(text) for text in (*self.header, *self.cells))


@dataclass(frozen=True)
class Sheet:
    title: str
    columns: list[Column]
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def rows(self) -> list[tuple[str, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


def byte_unit(values: Iterable[float]) -> tuple[str, int]:
    """The unit for a column or an axis, by its largest value: (name, bytes)."""
    largest = max((abs(v) for v in values if not math.isnan(v)), default=0.0)
    return next(((name, size) for name, size in (("GiB", 2**30), ("MiB", 2**20)) if largest >= 2 * size), ("KiB", 2**10))


def number(value: Any, digits: int = 3) -> str:
    """About so many digits, thousands separated, never in exponent form unless tiny; a dash for unknown."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}".replace("-", "−")


def whole(value: Any) -> str:
    """A count, thousands separated; a dash for unknown."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:,.0f}"


def percent(value: float, signed: bool = True) -> str:
    """A fraction as a percentage, signed unless told otherwise; a dash for unknown."""
    if math.isnan(value):
        return UNKNOWN
    digits = 0 if abs(value) >= 0.0995 or value == 0 else 1
    text = f"{100 * value:+.{digits}f}%" if signed else f"{100 * value:.{digits}f}%"
    return "0%" if text.strip("+-0.%") == "" else text.replace("-", "−")


def in_unit(value: float, unit: str, size: int) -> str:
    if math.isnan(value):
        return UNKNOWN
    return f"{value / size:,.{2 if unit == 'GiB' else 0 if value >= 100 * size else 1}f}"


def _spread(text: str, low: str, high: str) -> str:
    """A median with its range, the range left out where it rounds away."""
    return text if low == high else f"{text} ({low}–{high})"


def _bytes_column(
    header: tuple[str, ...], frame: pd.DataFrame, name: str, unit: tuple[str, int], rank: int = 0, title: str = ""
) -> Column:
    texts = [in_unit(v, *unit) for v in frame[name]]
    if f"{name}_min" in frame:
        ends = zip(frame[f"{name}_min"], frame[f"{name}_max"], strict=True)
        texts = [_spread(t, in_unit(a, *unit), in_unit(b, *unit)) for t, (a, b) in zip(texts, ends, strict=True)]
    return Column((*header, unit[0]), texts, rank=rank, title=f"{title or ' '.join(header)} ({unit[0]})")


def _rate_column(header: tuple[str, ...], frame: pd.DataFrame, name: str, rank: int) -> Column:
    texts = [number(v) for v in frame[name]]
    if f"{name}_min" in frame:
        ends = zip(frame[f"{name}_min"], frame[f"{name}_max"], strict=True)
        texts = [_spread(t, number(a), number(b)) for t, (a, b) in zip(texts, ends, strict=True)]
    return Column((*header, "images/s"), texts, rank=rank, title=f"{header[0]} (images/s)")


def _settings(frame: pd.DataFrame) -> list[Column]:
    """The columns that name a configuration; batch size and precision only where they vary."""
    columns = [
        Column(("d",), [whole(v) for v in frame["patch_divider"]]),
        Column(("patches", "a pass"), list(frame["patches_per_pass"]), numeric=False),
    ]
    if frame["batch_size"].nunique() > 1:
        columns.append(Column(("batch",), [whole(v) for v in frame["batch_size"]]))
    if frame["mixed_precision"].nunique() > 1:
        columns.append(Column(("auto-", "cast"), [v or UNKNOWN for v in frame["mixed_precision"]], False, title="autocast"))
    return columns


def fixed_settings(frame: pd.DataFrame) -> str:
    """What all lines share, for a caption: the batch size, and the precision where it is not float32."""
    parts = []
    if frame["batch_size"].nunique() == 1:
        parts.append(f"batch size {whole(frame['batch_size'].dropna().iloc[0])}")
    if frame["mixed_precision"].nunique() == 1:
        shared = frame["mixed_precision"].dropna().iloc[0]
        parts.append("float32" if shared == "no" else f"autocast {shared}")
    return ", ".join(parts)


def quality_header(name: str) -> tuple[str, ...]:
    return QUALITY_HEADERS.get(name) or tuple(name.split("_"))


def quality_label(name: str) -> str:
    """The quality figure in words, for axes and captions."""
    words = {
        "frechet_inception_distance": "FID",
        "unverified_inception_frechet_distance": "Fréchet distance, unverified Inception weights (not FID)",
        "random_features_frechet_distance": "Fréchet distance, random features (not FID)",
        "kernel_inception_distance_mean": "KID",
        "held_out_loss": "held-out denoising loss",
    }
    return words.get(name, name.replace("_", " "))


def tradeoff_sheet(cells: Sequence[CellResult]) -> Sheet:
    """The trade-off, one line per configuration."""
    frame = tables.tradeoff(cells)
    meter = tables.METERS[frame.attrs["memory_column"]]
    unit = byte_unit(v for short in tables.STEPS for v in frame[f"{short}_peak_bytes"])
    columns = _settings(frame)
    for short in tables.STEPS:
        columns.append(_bytes_column((short, "peak"), frame, f"{short}_peak_bytes", unit))
        if frame[f"{short}_peak_change"].notna().any():
            changes = [percent(v) for v in frame[f"{short}_peak_change"]]
            columns.append(Column(("vs", "d=1"), changes, rank=1, title=f"{short} peak vs d=1"))
        title = f"{short} activations"
        columns.append(_bytes_column(("acti-", "vations"), frame, f"{short}_activation_bytes", unit, 4, title))
        if f"{short}_prediction_error" in frame:
            errors = [percent(v) for v in frame[f"{short}_prediction_error"]]
            columns.append(Column(("pred.", "error"), errors, rank=5, title=f"{short} prediction error"))
    columns += [_rate_column((short,), frame, f"{short}_images_per_second", rank=2) for short in tables.STEPS]
    scored = [n for n in frame.columns if n in tables.QUALITY or n.endswith("_distance")]
    main = tables.distance_column(frame)
    for name in scored:
        if name in ("num_images", "images_seen"):
            continue
        rank = 0 if name == main else 3 if name in ("seam_score", "held_out_loss") else 6
        columns.append(Column(quality_header(name), [number(v) for v in frame[name]], rank=rank, title=quality_label(name)))
    columns.append(Column(("status",), [s.replace("_", " ") for s in frame["status"]], numeric=False))
    notes = [f"Peaks: {meter}, warm step." + (f" {fixed_settings(frame).capitalize()}." if fixed_settings(frame) else "")]
    if (frame["repeats"] > 1).any():
        notes.append("Median over repeats (least–most).")
    if main:
        counts = frame["num_images"].dropna().unique() if "num_images" in frame else []
        scored_on = f", {'/'.join(whole(c) for c in sorted(counts))} images scored" if len(counts) else ""
        notes.append(f"Quality: {quality_label(main)}{scored_on}; lower is better.")
    return Sheet("What each divider costs", columns, notes, "tab:tradeoff")


def split_sheet(cells: Sequence[CellResult], step: str) -> Sheet | None:
    """What fills the peak of ``step`` ("train" or "sample"); None where no configuration's peak was split."""
    frame = tables.split(cells)
    frame = frame[frame["step"] == step].reset_index(drop=True)
    if frame.empty:
        return None
    shown = [n for n in CATEGORIES if n not in ("gradient", "optimizer", "ema") or (frame[f"{n}_bytes"] > 0).any()]
    unit = byte_unit(frame["peak_live_bytes"])
    columns = _settings(frame) + [_bytes_column((CATEGORY_NAMES[n],), frame, f"{n}_bytes", unit) for n in shown]
    columns.append(_bytes_column(("sum", "(live)"), frame, "peak_live_bytes", unit))
    if frame["measured_peak_bytes"].notna().any():
        columns.append(_bytes_column(("torch.cuda", "allocated"), frame, "measured_peak_bytes", unit))
    columns.append(Column(("share of", "activations"), [percent(v, signed=False) for v in frame["activation_share"]]))
    title = {"train": "What fills the peak of a training step", "sample": "What fills the peak of a sampling step"}[step]
    return Sheet(title, columns, ["Live tensor bytes at the peak of the warm step; the parts sum to it."], f"tab:split-{step}")


def meters_sheet(cells: Sequence[CellResult]) -> Sheet | None:
    """What every meter read, cold and warm."""
    frame = tables.meters(cells)
    if frame.empty:
        return None
    read = [name for name in tables.METERS if name in frame]
    unit = byte_unit(v for name in read for v in frame[name])
    columns = _settings(frame)
    columns.append(Column(("phase",), [v.replace("_", " ") for v in frame["phase"]], numeric=False))
    columns.append(Column(("cold or", "warm"), list(frame["temperature"]), numeric=False))
    columns += [_bytes_column((tables.METERS[name],), frame, name, unit) for name in read]
    return Sheet(
        "What every meter read", columns, ["Cold: the first run in a fresh process. Warm: after the warm-up."], "tab:meters"
    )


def to_rich(sheet: Sheet, width: int | None = None) -> Table:
    """The sheet for a terminal ``width`` columns wide (None: the terminal's). Columns that do not fit are left out, highest
    rank first, and named under the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = width or Console().width
    shown, dropped = list(sheet.columns), []

    def needed() -> int:
        return sum(column.width for column in shown) + len(shown) + 1

    while needed() > width and any(column.rank for column in shown):
        last = max(range(len(shown)), key=lambda i: (shown[i].rank, i))
        dropped.append(shown.pop(last))
    notes = list(sheet.notes)
    if dropped:
        names = ", ".join(column.title for column in reversed(dropped))
        notes.append(f"Left out at this width: {names} (all in report.md).")
    table = Table(
        title=sheet.title, caption=" ".join(notes), box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, caption_justify="left"
    )
    for column in shown:
        table.add_column(
            "\n".join(column.header), justify="right" if column.numeric else "left", overflow="fold", vertical="bottom"
        )
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*row)
    return table


def to_markdown(sheet: Sheet) -> str:
    """A pipe table with its notes underneath."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    rule = "| " + " | ".join("---:" if column.numeric else "---" for column in sheet.columns) + " |"
    lines = [line(column.title for column in sheet.columns), rule, *(line(row) for row in sheet.rows)]
    return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in sheet.notes)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
}
_LATEX |= {c: f"\\{c}" for c in "&%$#_{}"} | {"é": r"\'e", "²": "$^2$", "→": r"$\rightarrow$", "≥": r"$\geq$"}


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(sheet: Sheet) -> str:
    """A booktabs table (needs the packages booktabs and graphicx) with caption and label."""

    def header(column: Column) -> str:
        lines = [latex_escape(part) for part in column.header]
        if len(lines) == 1:
            return lines[0]
        joined = r" \\ ".join(lines)
        return f"\\shortstack[{'r' if column.numeric else 'l'}]{{{joined}}}"

    body = [" & ".join(latex_escape(cell) for cell in row) + r" \\" for row in sheet.rows]
    return "\n".join(
        [
            "% Needs \\usepackage{booktabs} and \\usepackage{graphicx}.",
            r"\begin{table}[t]",
            r"\centering",
            f"\\caption{{{latex_escape(' '.join([sheet.title + '.', *sheet.notes]))}}}",
            f"\\label{{{sheet.label}}}",
            r"\resizebox{\linewidth}{!}{%",
            f"\\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in sheet.columns)}}}",
            r"\toprule",
            " & ".join(header(column) for column in sheet.columns) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )
