"""A table for people: finished strings in columns with headers and units, and the columns that most tables begin with.

Each table is laid out once, as a ``Table``; the terminal, Markdown, HTML and LaTeX print the same one (``pages``), so that no
two can disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pbbench.report.tables.configurations import finite
from pbbench.report.tables.formatting import UNKNOWN, in_unit, number, whole, with_range


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


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[Column]
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def rows(self) -> list[tuple[str, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


def table_of_lines(
    title: str, headers: Sequence[str], lines: Sequence[Sequence[str]], *, words: int, notes: Sequence[str] = ()
) -> Table | None:
    """A table from its lines; the first ``words`` columns are text, the others numbers. None where there is no line."""
    cells = zip(*lines, strict=True)
    columns = [Column((h,), list(c), numeric=i >= words) for i, (h, c) in enumerate(zip(headers, cells, strict=False))]
    return Table(title, columns, list(notes)) if lines else None


def text_column(header: str | tuple[str, ...], texts: Iterable[str], rank: int = 0, title: str = "") -> Column:
    return Column((header,) if isinstance(header, str) else header, list(texts), numeric=False, rank=rank, title=title)


def figure_column(
    header: tuple[str, ...], frame: pd.DataFrame, name: str, show: Callable[[Any], str] = number, rank: int = 0, title: str = ""
) -> Column:
    """The figures of ``frame[name]``, each with its range where ``*_min`` and ``*_max`` stand beside it."""
    low, high = (f"{name}_{end}" if f"{name}_{end}" in frame else name for end in ("min", "max"))
    texts = [with_range(show, *line) for line in frame[[name, low, high]].itertuples(index=False, name=None)]
    return Column(header, texts, rank=rank, title=title)


def bytes_column(
    header: tuple[str, ...], frame: pd.DataFrame, name: str, unit: tuple[str, int], rank: int = 0, title: str = ""
) -> Column:
    title = f"{title or ' '.join(header)} ({unit[0]})"
    return figure_column((*header, unit[0]), frame, name, lambda value: in_unit(value, *unit), rank, title)


def subject_columns(subjects: Sequence[tuple[str, int | None]]) -> list[Column]:
    """The variant, only where there is one, and the divider."""
    variants = [variant for variant, _ in subjects]
    columns = [text_column("variant", variants)] if any(variants) else []
    return [*columns, Column(("d",), [whole(d) for _, d in subjects])]


def settings_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns that name a configuration; variant, batch size (with its micro-batches, where some accumulate) and precision
    only where they vary."""
    columns = subject_columns(list(zip(frame["variant"], frame["patch_divider"], strict=True)))
    columns.append(text_column(("patches", "a pass"), frame["patches_per_pass"]))
    micro = list(frame["gradient_accumulation_steps"])
    accumulated = any(n > 1 for n in finite(micro))
    if accumulated and frame[["batch_size", "gradient_accumulation_steps"]].drop_duplicates().shape[0] > 1:
        texts = [f"{whole(v)} × {whole(n)}" for v, n in zip(frame["batch_size"], micro, strict=True)]
        columns.append(Column(("batch ×", "accum."), texts))
    elif frame["batch_size"].nunique() > 1:
        columns.append(Column(("batch",), [whole(v) for v in frame["batch_size"]]))
    if frame["mixed_precision"].nunique() > 1:
        columns.append(text_column(("auto-", "cast"), [v or UNKNOWN for v in frame["mixed_precision"]], title="autocast"))
    return columns


def fixed_settings(frame: pd.DataFrame) -> str:
    """What all lines share, for a caption: the batch size, and the precision where it is not float32."""
    parts = []
    if frame["batch_size"].nunique() == 1:
        micro = frame["gradient_accumulation_steps"].dropna()
        times = f" × {whole(micro.iloc[0])} accumulated" if micro.nunique() == 1 and micro.iloc[0] > 1 else ""
        parts.append(f"batch size {whole(frame['batch_size'].dropna().iloc[0])}{times}")
    if frame["mixed_precision"].nunique() == 1:
        shared = frame["mixed_precision"].dropna().iloc[0]
        parts.append("float32" if shared == "no" else f"autocast {shared}")
    return ", ".join(parts)
