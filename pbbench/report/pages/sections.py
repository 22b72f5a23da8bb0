"""What both pages of the report say, section by section: a table gets into the report by its line here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pbbench.records.run import Run
from pbbench.report.answer import patching_pays
from pbbench.report.figures.gallery import Picture
from pbbench.report.pages.prose import READING, headline, machine, meters_used, quality_statements, settings
from pbbench.report.tables.configurations import STEPS
from pbbench.report.tables.layout import Table, table_of_lines
from pbbench.report.tables.memory import ledger_table, meters_table, modules_table, predictions_table, split_table
from pbbench.report.tables.missing import failures_table, missing_table
from pbbench.report.tables.quality import bands_table, differences_table, quality_table
from pbbench.report.tables.tradeoff import tradeoff_table


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order."""

    heading: str
    level: int = 2
    pictures: Sequence[Picture] = ()
    lines: Sequence[str] = ()
    bullets: Sequence[str] = ()
    terms: Sequence[tuple[str, str]] = ()
    table: Table | None = None


def sections(run: Run, pictures: Sequence[Picture], notes: Sequence[str]) -> list[Section]:
    """``notes``: what could not be read or drawn."""
    cells, name = run.cells, run.experiment.get("name") or run.path.name
    meters = meters_used(cells)
    said = [
        Section(f"{name}: what each divider costs", level=1, lines=headline(cells, run.environment)),
        Section("Memory, speed and quality", table=tradeoff_table(cells)),
        Section("Does patching pay here?", bullets=patching_pays(cells)),
        _headed(2, failures_table(cells)),
        Section("Figures", pictures=pictures, lines=["Not shown, and why:"] * bool(notes), bullets=notes)
        if pictures or notes
        else None,
        *(_headed(2, split_table(cells, step)) for step in STEPS),
        Section("Quality", bullets=quality_statements(cells), table=quality_table(cells)),
        _headed(3, differences_table(cells)),
        _headed(3, bands_table(cells)),
        Section("What was measured", lines=["Meters that gave a reading:"] * bool(meters), bullets=meters),
        _headed(3, table_of_lines("Machine and versions", ("name", "value"), machine(run.environment), words=2)),
        _headed(3, table_of_lines("Settings", ("name", "value"), settings(run.experiment), words=2)),
        _headed(3, meters_table(cells)),
        _headed(3, ledger_table(cells)),
        _headed(3, predictions_table(cells)),
        _headed(3, modules_table(cells)),
        _headed(2, missing_table(cells)),
        Section("How to read a row", terms=READING),
    ]
    return [section for section in said if section]


def _headed(level: int, table: Table | None) -> Section | None:
    """A table under its own title; None where there is none."""
    return Section(table.title, level, table=table) if table else None
