"""Writing a run's report: the tables, the figures and the two pages, each file whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbbench.records import CellResult, read_cells, write_json, write_text
from pbbench.report import layout, tables
from pbbench.report.sheet import to_latex, to_markdown


@dataclass
class Run:
    """A run folder in memory."""

    path: Path
    cells: list[CellResult]
    experiment: dict[str, Any]
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What could not be read, in words."""


def read_run(path: Path) -> Run:
    """Cells, experiment and environment of a run folder. Raises InputError where there are no cells or one is broken; the
    other two files may be missing or broken, which a note says."""
    run = Run(path, read_cells(path), {}, {})
    try:
        run.experiment = tomllib.loads((path / "experiment.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        run.notes.append("experiment.toml is missing or unreadable: the settings are not stated here.")
    try:
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
        run.environment = environment if isinstance(environment, dict) else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        pass
    if not run.environment:
        run.notes.append("environment.json is missing or unreadable: machine and versions are not stated here.")
    return run


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: aside, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_report(path: Path) -> list[Path]:
    """See ``pbbench.report.write_report``."""
    run = read_run(path)
    rows = tables.results(run.cells)
    sheet = layout.tradeoff_sheet(run.cells)
    texts = {
        "table.tex": to_latex(sheet),
        "report.md": f"# {run.experiment.get('name', path.name)}\n\n{to_markdown(sheet)}",
    }
    as_text = rows.assign(reasons=[json.dumps(r, ensure_ascii=False, sort_keys=True) for r in rows["reasons"]])
    texts["results.csv"] = as_text.to_csv(index=False, lineterminator="\n")
    for name, text in texts.items():
        write_text(path / name, text)
    write_json(path / "results.json", rows.to_dict("records"))
    return [path / name for name in (*texts, "results.json")]
