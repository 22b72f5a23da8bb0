"""Quality of two runs, divider by divider: only figures of one name, one extractor and one kind of image set are compared.

A change is better or worse where it is more than its 95% interval (``records.uncertainty``: by the draw of samples, paired
where both runs drew the same, and by the trainings, where there are several); else it is not decided, and how many more
trainings or images would about decide it is told. Where no interval is known, single figures differ by their direction, and
ranges that overlap are not decided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pbbench.records.cells import CellResult
from pbbench.records.rows import Row
from pbbench.records.run import Run
from pbbench.records.uncertainty import Training, difference
from pbbench.report.tables.configurations import grouped
from pbbench.report.tables.scores import DISTANCES, HIGHER_IS_BETTER, trainings

KEY = ("image_size", "dim", "dim_mults", "variant", "patch_divider")
FIGURES = (*DISTANCES, *HIGHER_IS_BETTER, "seam_score", "seam_excess", "held_out_loss")
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
    """better, worse, same, not decided, or not comparable."""
    reason: str
    """Why it is not comparable, or what would decide it."""
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
    named: list[dict[str, list[Training]]] = [next(iter(trainings(cells).values()), {}) for cells in (a, b)]
    for column in FIGURES:
        one, two = (own.get(column, []) for own in named)
        if not one or not two:
            continue
        medians = (statistics.median(t.value for t in one), statistics.median(t.value for t in two))
        reason, verdict = _incomparable(column, a, b), "not comparable"
        if not reason:
            verdict, reason = _verdict(column, one, two, max(counts, default=0))
        told = QualityChange(a[0].id, settings, column, medians, verdict, reason, status, counts, "" if found else worse)
        found.append(told)
    if not found:
        why = "the runs share no quality figure" if not any(failed) else "a training or its scoring failed"
        return [QualityChange(a[0].id, settings, None, (None, None), "not comparable", why, status, counts, worse)]
    return found


def _incomparable(column: str, a: Sequence[CellResult], b: Sequence[CellResult]) -> str:
    """Why the figure of A and that of B measure different things; empty where they do not."""
    asked = [("the reference images", "details", "reference")]
    if column in FEATURES:
        asked += [("the extractors", "row", "extractor"), ("the numbers of images scored", "row", "num_images")]
        asked.append(("the numbers of reference images", "details", "num_reference_images"))
    if "patch" in column:
        asked.append(("the patches", "metrics", "patches"))
    if column == "held_out_loss":
        asked += [("the numbers of held-out images", "details", "num_held_out"), ("the objectives", "details", "objective")]
    if "kernel" in column:
        asked.append(("the subsets' sizes", "metrics", "kid_subset_size"))
    return next((f"{told} differ" for told, *of in asked if _recorded(a, *of) != _recorded(b, *of)), "")


def _recorded(cells: Sequence[CellResult], place: str, name: str) -> set[Any]:
    """What stands in the cells' quality rows, in their details or among their metrics."""
    if place == "row":
        return {getattr(row, name) for row in _rows(cells)}
    return {(c.details if place == "details" else c.details.get("metrics") or {}).get(name) for c in cells}


def _verdict(column: str, a: Sequence[Training], b: Sequence[Training], num_images: int) -> tuple[str, str]:
    """(the verdict, what would decide it). Lower is better, but for precision and recall; a seam score is the better the nearer
    it is to 1, an excess the nearer to 0."""

    def cost(value: float) -> float:
        if column in ("seam_score", "seam_excess"):
            return abs(value - (column == "seam_score"))
        return -value if column in HIGHER_IS_BETTER else value

    def costs(given: Sequence[Training]) -> list[Training]:
        return [replace(t, value=cost(t.value), left_out=t.left_out and [*map(cost, t.left_out)]) for t in given]

    one, two = costs(a), costs(b)
    values = [[t.value for t in trained] for trained in (one, two)]
    found = difference(one, two)
    if statistics.median(values[0]) == statistics.median(values[1]):
        return "same", ""
    if found.reach is None and max(map(len, values)) > 1 and max(map(min, values)) <= min(map(max, values)):
        return "not decided", ""
    if found.reach is not None and not found.decided:
        times = (found.reach / abs(found.value)) ** 2 if found.value else math.inf
        if found.training is not None and math.isfinite(times):
            return "not decided", f"about {math.ceil(times * max(map(len, values))):,} trainings of each would decide it"
        if num_images and math.isfinite(times):
            return "not decided", f"about {float(f'{times * num_images:.1g}'):,.0f} images would decide it"
        return "not decided", ""
    return ("better" if found.value < 0 else "worse"), ""
