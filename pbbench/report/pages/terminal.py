"""A table in a terminal, as wide as there is room for."""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from pbbench.report.tables.layout import Column, Table


def terminal_table(table: Table, width: int | None = None, elsewhere: str = "in report.md") -> RichTable:
    """The table for a terminal ``width`` columns wide (None: the terminal's). Columns that do not fit are left out, highest
    rank first, and named under the table with where they can be found."""
    width = width or Console().width
    shown, dropped = list(table.columns), list[Column]()
    while sum(map(_width, shown)) + len(shown) + 1 > width and (least := max(column.rank for column in shown)):
        dropped = [column for column in shown if column.rank == least] + dropped
        shown = [column for column in shown if column.rank != least]
    notes = list(table.notes)
    if dropped:
        names = ", ".join(column.title for column in dropped)
        notes.append(f"Left out at this width: {names} (all {elsewhere}).")
    style = {"box": box.SIMPLE_HEAD, "padding": (0, 0), "pad_edge": False}
    printed = RichTable(title=table.title, caption=" ".join(notes), caption_justify="left", **style)  # type: ignore[arg-type]
    for column in shown:
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        header, most, kept = "\n".join(column.header), _width(column), column.numeric
        printed.add_column(header, justify=justify, vertical="bottom", overflow="fold", max_width=most, no_wrap=kept)
    for row in Table(table.title, shown).rows:
        printed.add_row(*row)
    return printed


def _width(column: Column) -> int:
    """What a column needs; long words are folded."""
    longest = max(len(text) for text in (*column.header, *column.cells))
    return longest if column.numeric else min(longest, 18)
