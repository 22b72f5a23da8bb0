"""Does a run rank its dividers? One rule, stated here and printed where it is applied: quality that it does not pass is shown,
but no front is drawn through it and no divider is recommended for it.

A short training can put anything first: of nets that have not learned yet a mosaic of half-made patches may lie nearer to
the data than a blurred whole image. What shows this is that the figures disagree, or that all of them are far from the floor
(``records.uncertainty`` has the intervals; quality.scorecard the floor).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from pbbench.records.cells import CellResult
from pbbench.records.quality_names import quality_label
from pbbench.records.uncertainty import Estimate, Training, difference
from pbbench.report.tables.configurations import finite
from pbbench.report.tables.formatting import number
from pbbench.report.tables.scores import DISTANCES, floors, scored, subjects, trainings

NEAR, FAR = 3.0, 10.0
VISIBLE = 2.0
"""Grey levels."""
RULE = (
    f"A run ranks its dividers where the best distance is within {FAR:.0f} times its floor (the same distance of as many real "
    "images), some difference between dividers is larger than its 95% interval, and no such difference is contradicted: the "
    "held-out loss must not differ the other way by more than its interval, nor the seams by more than theirs and by "
    f"{VISIBLE:.0f} grey levels, from where they are seen. Where the best distance is "
    f"more than {NEAR:.0f} times the floor, the held-out loss must confirm every such difference."
)


@dataclass(frozen=True)
class Pair:
    """Two dividers, a the smaller, and what b has more of than a; lower is better in all three."""

    a: int
    b: int
    distance: Estimate
    loss: Estimate | None
    """Held-out loss."""
    seams: Estimate | None
    """Excess at borders, squared; of a = 1 at the lines of b."""


@dataclass(frozen=True)
class Verdict:
    ranks: bool
    said: tuple[str, ...]
    """Why not, or what the ranking rests on: sentences."""
    distance: str | None
    """The column that ranks."""
    floor: float | None
    pairs: tuple[Pair, ...]
    trained_once: bool
    """No difference has the part that another training makes."""

    def to_first(self, d: int) -> Estimate | None:
        """What ``d`` has more of the distance than the smallest divider."""
        first = min((pair.a for pair in self.pairs), default=None)
        return next((pair.distance for pair in self.pairs if (pair.a, pair.b) == (first, d)), None)


def verdict(cells: Iterable[CellResult], variant: str = "") -> Verdict | None:
    """Of the experiment itself, or of one of its variants; None where fewer than two of its dividers have a distance."""
    cells = [cell for group in subjects(cells).items() if group[0][0] == variant for cell in group[1]]
    found = {subject[1]: named for subject, named in trainings(cells).items()}
    column = next((name for name in DISTANCES if sum(name in named for named in found.values()) > 1), None)
    if column is None:
        return None
    ranked = {d: named for d, named in sorted(found.items()) if column in named}
    whole = _seam_trainings(cells)
    pairs = tuple(
        Pair(
            a,
            b,
            difference(ranked[a][column], ranked[b][column]),
            _difference(ranked[a].get("held_out_loss"), ranked[b].get("held_out_loss")),
            _difference(whole.get(b) if a == 1 else ranked[a].get("seam_excess_square"), ranked[b].get("seam_excess_square")),
        )
        for a, b in combinations(ranked, 2)
    )
    floor = floors(cells).get(column)
    best = min(sum(t.value for t in named[column]) / len(named[column]) for named in ranked.values())
    against = [*_distance_to_floor(best, floor, column), *_contradictions(pairs, far=floor is None or best > NEAR * floor)]
    if not against and not any(pair.distance.decided for pair in pairs):
        against = ["No difference between dividers is larger than its 95% interval."]
    once = all(len(named[column]) == 1 for named in ranked.values())
    return Verdict(not against, tuple(against) or _grounds(pairs, best, floor, once), column, floor, pairs, once)


def _difference(a: Sequence[Training] | None, b: Sequence[Training] | None) -> Estimate | None:
    return difference(a, b) if a and b else None


def seams_of_whole(cells: Iterable[CellResult], name: str) -> dict[int, list[float]]:
    """Divider → a figure of the undivided model's seams at its lines, one per training."""
    found: dict[int, list[float]] = {}
    for cell, row in scored(c for c in cells if c.kind == "quality"):
        if row.patch_divider == 1 and not row.variant:
            for d, seams in (cell.details.get("seams") or {}).items():
                for value in finite([seams.get(name)]):
                    found.setdefault(int(d), []).append(value)
    return found


def _seam_trainings(cells: Sequence[CellResult]) -> dict[int, list[Training]]:
    """Divider → the undivided model's excess (squared) at its lines, one per training."""
    found: dict[int, list[Training]] = {}
    for cell, row in scored(cells):
        if row.patch_divider == 1:
            draw = (row.seed, row.num_images, cell.details.get("reference"))
            for d, seams in (cell.details.get("seams") or {}).items():
                if "seam_excess_square" in seams:
                    left_out = seams["left_out"].get("seam_excess_square")
                    found.setdefault(int(d), []).append(Training(seams["seam_excess_square"], left_out, draw))
    return found


def _distance_to_floor(best: float, floor: float | None, column: str) -> list[str]:
    if floor is None:
        return [f"The floor of the {quality_label(column)} is not known."]
    if best > FAR * floor:
        times = number(best / floor)
        return [f"The best distance, {number(best)}, is {times} times the floor ({number(floor)}): trained too little."]
    return []


def _contradictions(pairs: Sequence[Pair], *, far: bool) -> list[str]:
    told = []
    for pair in (pair for pair in pairs if pair.distance.decided):
        better, worse = (pair.a, pair.b) if pair.distance.value > 0 else (pair.b, pair.a)
        sides = f"By its distance d = {better} is better than d = {worse}, "
        for name, other, least in (("held-out loss", pair.loss, 0.0), ("seams", pair.seams, VISIBLE**2)):
            opposite = other is not None and other.decided and other.value * pair.distance.value < 0
            if other is not None and opposite and abs(other.value) > least:
                told.append(f"{sides}by its {name} worse.")
        confirmed = pair.loss is not None and pair.loss.decided and pair.loss.value * pair.distance.value > 0
        if far and not confirmed and not any(line.startswith(sides) for line in told):
            told.append(f"{sides}but so far from the floor that takes a held-out loss that says so, too.")
    return told


def _grounds(pairs: Sequence[Pair], best: float, floor: float | None, once: bool) -> tuple[str, ...]:
    decided = sum(pair.distance.decided for pair in pairs)
    said = f"{decided} of {len(pairs)} differences between dividers are larger than their 95% intervals, none is contradicted"
    said += f"; the best distance is {number(best / floor)} times its floor." if floor else "."
    return (
        said,
        *(["Each divider was trained once: what another training would change is not in the intervals."] if once else []),
    )
