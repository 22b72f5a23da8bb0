"""A run folder in memory: its cells, the experiment it ran and the machine it ran on."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbbench.records.cells import CellResult, read_cells


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
