"""A table for people: finished strings under headers with units, and that table as terminal, Markdown or LaTeX text.

Each kind of table is laid out once (``layout``); every output form prints the same sheet, so that no two can disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = "–"


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
        """Columns a terminal needs for it; long words are folded."""
        longest = max(len(text) for text in (*self.header, *self.cells))
        return longest if self.numeric else min(longest, 18)


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
    largest = max((abs(v) for v in values if not math.isnan(v)), default=2.0**21)
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
    """Bytes in a unit from ``byte_unit``, without its name; what is too little to show is not 0."""
    if math.isnan(value):
        return UNKNOWN
    if value == 0:
        return "0"
    digits = 2 if unit == "GiB" else 0 if value >= 100 * size else 1
    return f"{value / size:,.{digits}f}" if value >= 0.5 * size / 10**digits else f"<{10**-digits:.{digits}f}"


def to_rich(sheet: Sheet, width: int | None = None, elsewhere: str = "in report.md") -> Table:
    """The sheet for a terminal ``width`` columns wide (None: the terminal's). Columns that do not fit are left out, highest
    rank first, and named under the table with where they can be found."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = width or Console().width
    shown, dropped = list(sheet.columns), list[Column]()

    def needed() -> int:
        return sum(column.width for column in shown) + len(shown) + 1

    while needed() > width and any(column.rank for column in shown):
        least = max(column.rank for column in shown)
        dropped = [column for column in shown if column.rank == least] + dropped
        shown = [column for column in shown if column.rank != least]
    notes = list(sheet.notes)
    if dropped:
        names = ", ".join(column.title for column in dropped)
        notes.append(f"Left out at this width: {names} (all {elsewhere}).")
    table = Table(
        title=sheet.title, caption=" ".join(notes), box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, caption_justify="left"
    )
    for column in shown:
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        fit: dict[str, Any] = {"overflow": "fold", "max_width": column.width, "no_wrap": column.numeric}
        table.add_column("\n".join(column.header), justify=justify, vertical="bottom", **fit)
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*row)
    return table


def markdown_escape(text: str) -> str:
    """Text that Markdown prints as it stands, in a table's cell too."""
    escaped = "".join({"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(c) or (f"\\{c}" if c in "\\|`*[]" else c) for c in text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)  # within a word an underscore is plain text


def to_markdown(sheet: Sheet) -> str:
    """A pipe table with its notes underneath."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = line("---:" if column.numeric else "---" for column in sheet.columns)
    rows = [line(map(markdown_escape, cells)) for cells in ([column.title for column in sheet.columns], *sheet.rows)]
    return "\n".join([rows[0], rule, *rows[1:]]) + "\n" + "".join(f"\n{markdown_escape(note)}\n" for note in sheet.notes)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
}
_LATEX |= (
    {"<": "$<$", ">": "$>$", "|": r"\textbar{}"}
    | {c: f"\\{c}" for c in "&%$#_{}"}
    | {"é": r"\'e", "²": "$^2$", "→": r"$\rightarrow$", "≥": r"$\geq$"}
)


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(sheet: Sheet) -> str:
    """A booktabs table (needs the packages booktabs and graphicx) with caption and label, as wide as the text."""

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
            r"\begin{table*}[t]",
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
            r"\end{table*}",
            "",
        ]
    )
