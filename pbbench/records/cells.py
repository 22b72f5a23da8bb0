"""Cell files: what one cell came to, in ``cells/<id>.json``, written whole or not at all, and read back checked. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pbbench.errors import InputError, one_line
from pbbench.records.files import write_json
from pbbench.records.rows import COLUMNS, SCHEMA_VERSION, Row, Status


class CellResult(BaseModel):
    """A finished cell: its settings, its rows, and what is too large for a row."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    id: str
    kind: Literal["measure", "quality"]
    status: Status
    axes: dict[str, Any]
    """The cell's settings: patch_divider, patch_batch_size, batch_size, mixed_precision, repeat, variant (empty: none), and of
    a quality cell its seed where sweep.seeds names any."""
    rows: list[Row]
    error: dict[str, Any] = Field(default_factory=dict)
    """What failed: phase, type, message; for out of memory also requested, free, allocated, reserved (bytes)."""
    details: dict[str, Any] = Field(default_factory=dict)
    """By-module attribution, ledger, samples and other data a figure may use."""


def write_cell(run: Path, cell: CellResult) -> None:
    """``cells/<id>.json``; a float that is not finite becomes null, with a reason."""
    for row in cell.rows:
        for name in COLUMNS:
            value = getattr(row, name)
            if isinstance(value, float) and not math.isfinite(value):
                setattr(row, name, None)
                row.reasons[name] = f"the value was {value}"
    write_json(run / "cells" / f"{cell.id}.json", cell.model_dump(mode="json"))


def read_cell(path: Path) -> CellResult:
    """Raises InputError where the file is not a whole cell of this schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise InputError(f"{path} has schema version {version}; this pbbench reads up to {SCHEMA_VERSION}: update pbbench")
        return CellResult.model_validate(data)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        raise InputError(
            f"{path} is not a cell's result ({one_line(error)[:160]}); move it away and resume the sweep"
        ) from None


def read_cells(run: Path) -> list[CellResult]:
    """All cells of a run folder, sorted by id. Raises InputError where there is none or one is broken."""
    if not run.is_dir():
        raise InputError(f"no run folder at {run}")
    paths = sorted((run / "cells").glob("*.json"))
    if not paths:
        raise InputError(f"{run} holds no cells (expected {run / 'cells'}/*.json); run pbbench sweep --out {run} first")
    return [read_cell(path) for path in paths]


def rows_of(cells: Iterable[CellResult]) -> list[dict[str, Any]]:
    """Every row of every cell as a flat dict in column order (``reasons`` stays a dict)."""
    return [row.model_dump(mode="json") for cell in cells for row in cell.rows]
