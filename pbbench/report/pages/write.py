"""Writing a run's report: the tables, the figures and the two pages, each file whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from pbbench.records.files import write_bytes
from pbbench.records.run import read_run
from pbbench.report.figures.gallery import pictures
from pbbench.report.figures.style import rendered
from pbbench.report.pages.html import contents, html_page, markdown_page
from pbbench.report.tables import columns as layout
from pbbench.report.tables import numbers as tables
from pbbench.report.tables.sheet import to_latex


def write_report(path: Path) -> list[Path]:
    """See ``pbbench.report.write_report``."""
    run = read_run(path)
    files: dict[str, bytes] = {}
    found, absent = pictures(run.cells, path)
    for picture in found:
        for kind in ("png", "svg"):
            files[f"figures/{picture.name}.{kind}"] = rendered(picture.figure, kind)
    rows = tables.results(run.cells)
    reasons = [json.dumps(r, ensure_ascii=False, sort_keys=True) for r in rows["reasons"]]
    files["results.csv"] = rows.assign(reasons=reasons).to_csv(index=False, lineterminator="\n").encode()
    files["results.json"] = (json.dumps(rows.to_dict("records"), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    files["table.tex"] = to_latex(layout.tradeoff_sheet(run.cells)).encode()
    said = contents(run.cells, run.experiment, run.environment, run.notes + absent, run.experiment.get("name") or path.name)
    inlined = []
    for picture in found:  # photographs as pixels, charts as vectors
        kind = "png" if picture.name == "samples" else "svg"
        inlined.append((picture, kind, files[f"figures/{picture.name}.{kind}"]))
    files["report.md"] = markdown_page(said, found).encode()
    files["report.html"] = html_page(said, inlined).encode()
    for name, content in files.items():
        write_bytes(path / name, content)
    _remove_stale(path / "figures", set(files))
    return [path / name for name in files]


def _remove_stale(folder: Path, kept: set[str]) -> None:
    """Figures of an earlier report that this one does not have would pass for its own."""
    for old in sorted(folder.glob("*")) if folder.is_dir() else []:
        if old.suffix in (".png", ".svg") and f"{folder.name}/{old.name}" not in kept:
            old.unlink()
