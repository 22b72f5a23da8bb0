"""What a run does not hold: the cells that failed, with their causes, and the columns that are null, with their reasons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import CellResult
from pbbench.records.rows import COLUMNS, Row
from pbbench.report.tables.configurations import finite
from pbbench.report.tables.formatting import UNKNOWN, spaced, whole
from pbbench.report.tables.layout import Table, table_of_lines
from pbbench.report.tables.results import results
from pbbench.report.tables.scores import DISTANCES, QUALITY

OUT_OF_MEMORY = ("requested", "free", "capacity", "allocated", "reserved")
"""Byte counts that the error of a failed cell may hold."""


def failures(cells: Iterable[CellResult]) -> list[dict[str, Any]]:
    """One entry per failed row, or per failed cell that has none: cell, status, phase, cause (one line), and the error's byte
    counts where it has them. A cell keeps the error of its last failure; an earlier one is told by its row's reasons."""
    found = []
    for cell in cells:
        failed: list[tuple[str, str | None, str]] = [
            (row.status, row.phase, next(iter(row.reasons.values()), "")) for row in cell.rows if row.status != "ok"
        ]
        if cell.status != "ok" and not failed:
            failed = [(cell.status, cell.error.get("phase"), "")]
        for i, (status, phase, told) in enumerate(failed):
            error = cell.error if i == len(failed) - 1 else {}
            kind, message = error.get("type"), error.get("message")
            cause = ": ".join(str(part) for part in (kind if kind != status else None, message) if part) or told
            counts = {k: error[k] for k in OUT_OF_MEMORY if finite([error.get(k)])}
            where = error.get("phase") or phase
            cause = " ".join(cause.split()) or "no cause was recorded"
            found.append({"cell": cell.id, "status": status, "phase": where, "cause": cause, "bytes": counts})
    return found


def failures_table(cells: Sequence[CellResult]) -> Table | None:
    """Every cell that failed and why; None where none did."""
    found = failures(cells)
    counts = [name for name in OUT_OF_MEMORY if any(name in f["bytes"] for f in found)]
    lines = [
        [
            f["cell"],
            *map(spaced, (f["status"], f["phase"] or UNKNOWN)),
            f["cause"],
            *(format_bytes(f["bytes"].get(n)) for n in counts),
        ]
        for f in found
    ]
    return table_of_lines("What failed", ["cell", "status", "phase", "cause", *counts], lines, words=4)


def unmeasured(cells: Iterable[CellResult]) -> list[dict[str, Any]]:
    """What is null and why, grouped: columns, the reason, the phases, and how many rows; columns that no row of a run fills
    and that give no reason come last."""
    cells = list(cells)
    nulls: dict[str, list[tuple[str, Row]]] = {}  # reason → columns and rows
    filled: set[str] = set()
    for row in (Row.model_validate(values) for values in results(cells).to_dict("records")):
        for name in COLUMNS:
            if getattr(row, name) is not None:
                filled.add(name)
            elif reason := row.reasons.get(name):
                nulls.setdefault(reason, []).append((name, row))

    def group(columns: Iterable[str], reason: str, phases: Iterable[str], rows: int = 0) -> dict[str, Any]:
        return {"columns": [c for c in COLUMNS if c in set(columns)], "reason": reason, "phases": sorted(phases), "rows": rows}

    found = []
    for reason, entries in nulls.items():
        rows = {(row.cell, row.phase, row.temperature, row.repeat) for _, row in entries}
        found.append(group([name for name, _ in entries], reason, {row.phase for _, row in entries}, len(rows)))
    silent = set(COLUMNS) - filled - {name for entries in nulls.values() for name, _ in entries}
    scored, given = any(c.kind == "quality" for c in cells), [c for c in DISTANCES if c in filled]
    unscored = silent & {*QUALITY, "extractor", "sampler", "num_inference_steps"} if not scored else set()
    instead = silent & set(DISTANCES) if given else set()
    found.append(group(unscored, "no quality cell in this run: memory and speed only", ["quality"]))
    found.append(group(instead, f"this run's samples are compared by {', '.join(given)}", ["quality"]))
    found.append(group(silent - unscored - instead, "null in every row; no reason was recorded", []))
    return [entry for entry in found if entry["columns"]]


def missing_table(cells: Sequence[CellResult]) -> Table | None:
    """The columns that are null, by reason."""
    lines = []
    for g in unmeasured(cells):
        where = ", ".join(map(spaced, g["phases"])) or "all rows"
        lines.append((", ".join(g["columns"]), g["reason"], where, whole(g["rows"]) if g["rows"] else "all"))
    return table_of_lines("What was not measured", ("columns", "why", "in", "rows"), lines, words=3)
