"""What a run does not hold: the cells that failed, with their causes, and the columns that are null, with their reasons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pbbench.records.cells import CellResult
from pbbench.records.rows import COLUMNS, Row
from pbbench.report.tables.numbers import DISTANCES, QUALITY, finite, results

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


def unmeasured(cells: Iterable[CellResult]) -> list[dict[str, Any]]:
    """What is null and why, grouped: columns, the reason, the phases, and how many rows; columns that no row of a run fills
    and that give no reason come last."""
    cells = list(cells)
    groups: dict[str, dict[str, Any]] = {}
    filled: set[str] = set()
    explained: set[str] = set()
    for row in (Row.model_validate(values) for values in results(cells).to_dict("records")):
        for name in COLUMNS:
            reason = row.reasons.get(name)
            if getattr(row, name) is not None:
                filled.add(name)
            elif reason:
                group = groups.setdefault(reason, {"columns": set(), "phases": set(), "rows": set()})
                explained.add(name)
                group["columns"].add(name)
                group["phases"].add(row.phase)
                group["rows"].add((row.cell, row.phase, row.temperature, row.repeat))
    found = [
        {
            "columns": [c for c in COLUMNS if c in g["columns"]],
            "reason": reason,
            "phases": sorted(g["phases"]),
            "rows": len(g["rows"]),
        }
        for reason, g in groups.items()
    ]
    silent = [c for c in COLUMNS if c not in filled | explained]
    scored = any(c.kind == "quality" for c in cells)
    unscored = [c for c in silent if c in {*QUALITY, "extractor", "sampler", "num_inference_steps"}] if not scored else []
    if unscored:
        found.append(
            {
                "columns": unscored,
                "reason": "no quality cell in this run: memory and speed only",
                "phases": ["quality"],
                "rows": 0,
            }
        )
    given = [c for c in DISTANCES if c in filled]
    instead = [c for c in silent if c in DISTANCES] if given else []
    if instead:
        why = f"this run's samples are compared by {', '.join(given)}"
        found.append({"columns": instead, "reason": why, "phases": ["quality"], "rows": 0})
    rest = [c for c in silent if c not in unscored and c not in instead]
    if rest:
        found.append({"columns": rest, "reason": "null in every row; no reason was recorded", "phases": [], "rows": 0})
    return found
