"""The report of a run: tables, figures and pages out of the files a sweep wrote. Needs no torch and no GPU.

``write_report`` fills a run folder; ``terminal_table`` is the short form for a terminal. Importing this package imports
neither pandas nor matplotlib; calling it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from pbbench.records.cells import CellResult

__all__ = ["terminal_table", "write_report"]


def write_report(run: Path) -> list[Path]:
    """Write tables, figures and pages into the run folder and return their paths.

    The same run folder gives the same bytes. What cannot be drawn is left out, and the report says why.
    Raises InputError where the folder holds no cells or a broken one.
    """
    from pbbench.report.pages.write import write_report as write

    return write(Path(run))


def terminal_table(run: Path | str | Iterable[CellResult], width: int | None = None) -> Table:
    """The trade-off, one line per configuration, as a rich table.

    ``run``: a run folder or its cells. ``width``: the columns at hand (None: the terminal's); what does not fit is left out
    and named under the table.
    """
    from pbbench.records.cells import read_cells
    from pbbench.report.pages.terminal import terminal_table as printed
    from pbbench.report.tables.tradeoff import tradeoff_table

    cells = read_cells(Path(run)) if isinstance(run, str | Path) else list(run)
    return printed(tradeoff_table(cells), width)
