"""Quality of two runs, divider by divider: only figures of one name, one extractor and one kind of image set are compared.

A single training says nothing of the noise between trainings, so its change is told without a verdict beyond its direction;
where dividers were trained several times, ranges that overlap are no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pbbench.records.cells import CellResult
from pbbench.records.rows import COLUMNS, Row
from pbbench.records.run import Run
from pbbench.report.tables.configurations import finite, grouped
from pbbench.report.tables.scores import DISTANCES

KEY = ("image_size", "dim", "dim_mults", "variant", "patch_divider")
HIGHER_IS_BETTER = ("precision", "recall")
FIGURES = (*DISTANCES, *HIGHER_IS_BETTER, "seam_score", "held_out_loss")
FEATURES = (*DISTANCES, *HIGHER_IS_BETTER)
"""Figures that depend on the extractor and on how many images there are."""


@dataclass(frozen=True)
class QualityChange:
    """One figure of one trained divider in both runs."""

    cell: str
    settings: dict[str, Any]
    column: str | None
    """None: the runs share no figure, and only the status can be compared."""
    values: tuple[float | None, float | None]
    """Medians over the trainings."""
    verdict: str
    """better, worse, same, within the spread, or not comparable."""
    reason: str
    """Why it is not comparable."""
    status: tuple[str, str]
    num_images: tuple[int, ...]
    """How many samples the figure rests on, in either run."""
    worse_status: str
    """The gate's line where B failed and A did not; on the first figure of a cell only."""


def quality_changes(a: Run, b: Run) -> tuple[list[QualityChange], list[str], tuple[list[str], list[str]]]:
    """(changes, notes, (cells only in A, cells only in B))."""
    groups = [grouped(run.cells, "quality", KEY) for run in (a, b)]
    changes = []
    for key in sorted(groups[0].keys() & groups[1].keys(), key=lambda key: (key[-1] or 0, str(key))):
        changes += _changes(dict(zip(KEY, key, strict=True)), groups[0][key], groups[1][key])
    notes = []
    alone = [c for c in changes if c.verdict in ("better", "worse")]
    counts = [len(members) for group in groups for members in group.values()]
    if alone and max(counts) == 1:
        notes.append("Each divider was trained once in each run: how far quality varies between trainings is not known.")
    for name, told in (("images_seen", "training images"), ("sampler", "samplers"), ("num_inference_steps", "sampling steps")):
        seen = [{value for g in group.values() for value in _recorded(g, "row", name)} - {None} for group in groups]
        if changes and seen[0] != seen[1]:
            shown = [", ".join(map(str, sorted(values))) or "not recorded" for values in seen]
            notes.append(f"The {told} behind the quality differ: {shown[0]} in A, {shown[1]} in B.")
    only_a, only_b = (
        sorted(members[0].id for key, members in group.items() if key not in other) for group, other in (groups, groups[::-1])
    )
    return changes, notes, (only_a, only_b)


def _rows(cells: Sequence[CellResult]) -> list[Row]:
    return [row for cell in cells for row in cell.rows if row.phase == "quality" and row.status == "ok"]


def _changes(settings: dict[str, Any], a: Sequence[CellResult], b: Sequence[CellResult]) -> list[QualityChange]:
    statuses = ["; ".join(sorted({cell.status for cell in cells})) for cells in (a, b)]
    failed = [sum(cell.status != "ok" for cell in cells) / len(cells) for cells in (a, b)]
    worse = f"{a[0].id}: {statuses[0]} in A, {statuses[1]} in B" if failed[1] > failed[0] else ""
    status = (statuses[0], statuses[1])
    counts = tuple(sorted({row.num_images for row in _rows([*a, *b]) if row.num_images is not None}))
    found: list[QualityChange] = []
    for column in FIGURES:
        values = [_values(cells, column) for cells in (a, b)]
        if not values[0] or not values[1]:
            continue
        medians = (statistics.median(values[0]), statistics.median(values[1]))
        reason = _incomparable(column, a, b)
        verdict = "not comparable" if reason else _verdict(column, *values)
        told = QualityChange(a[0].id, settings, column, medians, verdict, reason, status, counts, "" if found else worse)
        found.append(told)
    if not found:
        why = "the runs share no quality figure" if not any(failed) else "a training or its scoring failed"
        return [QualityChange(a[0].id, settings, None, (None, None), "not comparable", why, status, counts, worse)]
    return found


def _values(cells: Sequence[CellResult], column: str) -> list[float]:
    if column in COLUMNS:
        return finite(getattr(row, column) for row in _rows(cells))
    return finite((cell.details.get("metrics") or {}).get(column) for cell in cells if cell.status == "ok")


def _incomparable(column: str, a: Sequence[CellResult], b: Sequence[CellResult]) -> str:
    """Why the figure of A and that of B measure different things; empty where they do not."""
    asked = [("the reference images", "details", "reference")]
    if column in FEATURES:
        asked += [("the extractors", "row", "extractor"), ("the numbers of images scored", "row", "num_images")]
        asked.append(("the numbers of reference images", "details", "num_reference_images"))
    if "patch" in column:
        asked.append(("the patches", "metrics", "patches"))
    if column == "held_out_loss":
        asked.append(("the numbers of held-out images", "details", "num_held_out"))
    if "kernel" in column:
        asked.append(("the subsets' sizes", "metrics", "kid_subset_size"))
    return next((f"{told} differ" for told, *of in asked if _recorded(a, *of) != _recorded(b, *of)), "")


def _recorded(cells: Sequence[CellResult], place: str, name: str) -> set[Any]:
    """What stands in the cells' quality rows, in their details or among their metrics."""
    if place == "row":
        return {getattr(row, name) for row in _rows(cells)}
    return {(c.details if place == "details" else c.details.get("metrics") or {}).get(name) for c in cells}


def _verdict(column: str, a: Sequence[float], b: Sequence[float]) -> str:
    """Lower is better, but for precision and recall; a seam score is the better the nearer it is to 1."""
    sign = -1.0 if column in HIGHER_IS_BETTER else 1.0
    one, two = ([abs(v - 1) if column == "seam_score" else sign * v for v in values] for values in (a, b))
    if statistics.median(one) == statistics.median(two):
        return "same"
    if max(len(one), len(two)) > 1 and max(min(one), min(two)) <= min(max(one), max(two)):
        return "within the spread"
    return "better" if statistics.median(two) < statistics.median(one) else "worse"
