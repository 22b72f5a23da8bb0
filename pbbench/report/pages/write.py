"""Writing a run's report: the tables, the figures and the two pages, each file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from pbbench.records.files import write_bytes
from pbbench.records.run import read_run
from pbbench.report.figures.gallery import pictures
from pbbench.report.figures.style import rendered
from pbbench.report.pages.html import html_page
from pbbench.report.pages.latex import latex_table
from pbbench.report.pages.markdown import markdown_page
from pbbench.report.pages.sections import sections
from pbbench.report.tables.results import results_files
from pbbench.report.tables.tradeoff import tradeoff_table


def write_report(path: Path) -> list[Path]:
    """See ``pbbench.report.write_report``."""
    run = read_run(path)
    found, absent = pictures(run.cells, path)
    files = {f"figures/{p.name}.{kind}": rendered(p.figure, kind) for p in found for kind in ("png", "svg")}
    files |= results_files(run.cells)
    files["table.tex"] = latex_table(tradeoff_table(run.cells)).encode()
    said = sections(run, found, run.notes + absent)
    files["report.md"] = markdown_page(said).encode()
    files["report.html"] = html_page(said, files).encode()
    for name, content in files.items():
        write_bytes(path / name, content)
    for old in path.glob("figures/*"):  # a figure of an earlier report that this one does not have would pass for its own
        if old.suffix in (".png", ".svg") and f"figures/{old.name}" not in files:
            old.unlink()
    return [path / name for name in files]
