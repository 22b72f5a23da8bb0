"""Memory and speed of two runs, step by step: what became of each configuration that both have.

Configurations are matched by their settings, repeats gathered; a setting that only one run knows and never varies is left
out. Of several repeats the largest peak counts: it is what must fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pbbench.records.cells import CellResult
from pbbench.report.compare.speed import FEWEST_STEPS, judge_speed
from pbbench.report.tables.configurations import axis, finite, median, step_values

FIXED = ("device", "image_size", "dim", "dim_mults", "gradient_accumulation_steps")
"""Settings that stand in a cell's rows alone; mostly all measured cells of one run share them."""
VARIED = ("variant", "mixed_precision", "batch_size", "patch_divider", "patch_batch_size")
GATED = ("peak_allocated_bytes", "peak_live_bytes")
"""The meters the gate goes by: the first that was read in both."""
COMPARED = (*GATED, "peak_reserved_bytes", "peak_process_bytes")
Groups = dict[tuple[Any, ...], list[CellResult]]


@dataclass(frozen=True)
class StepChange:
    """One step (train_step or sample_step) of one configuration in both runs."""

    cell: str
    settings: dict[str, Any]
    phase: str
    status: tuple[str, str]
    worse: bool
    """A larger share of the repeats failed in B than in A."""
    peaks: dict[str, tuple[int | None, int | None]]
    """Meter → largest warm peak in A and in B."""
    gated: str | None
    """The meter the gate goes by; None where no meter was read in both."""
    seconds: tuple[float | None, float | None]
    """Median step."""
    speed: str
    """slower, faster, same (within the noise), or unknown."""
    speed_reason: str
    """Why speed is unknown."""

    def change(self, meter: str) -> float | None:
        """B / A − 1; None where either is unknown or A is 0."""
        a, b = self.peaks[meter]
        return b / a - 1 if a and b is not None else None


def common_settings(a: Sequence[CellResult], b: Sequence[CellResult]) -> tuple[list[str], list[str]]:
    """The settings to match measured cells by, and a note on those that are left out because one run does not know them."""
    names, notes = [*FIXED, *VARIED], []
    own = [{n: {str(c.axes.get(n)) for c in run} for c in run for n in c.axes} for run in map(_measured, (a, b))]
    for name in sorted((own[0].keys() | own[1].keys()) - {*names, "repeat", "seed"}):
        knowing = [run for run in own if name in run]
        if len(knowing) == 2 or len(knowing[0][name]) > 1:
            names.append(name)
        else:
            notes.append(f"Only one run states {name} ({', '.join(knowing[0][name])}): cells are matched without it.")
    return names, notes


def _measured(cells: Sequence[CellResult]) -> list[CellResult]:
    return [cell for cell in cells if cell.kind == "measure"]


def matched_by(cells: Sequence[CellResult], names: Sequence[str]) -> Groups:
    """Measured cells by these settings, repeats together. What a cell without rows cannot say of itself, the run's others
    do."""
    measured = sorted(_measured(cells), key=lambda cell: (len(cell.id), cell.id))  # the first repeat names its group
    known = {name: {axis(cell, name) for cell in measured} - {None} for name in FIXED}
    shared = {name: values.pop() for name, values in known.items() if len(values) == 1}
    groups: Groups = {}
    for cell in measured:
        key = []
        for name in names:
            value = axis(cell, name) if name in (*FIXED, *VARIED) else cell.axes.get(name)
            key.append(shared.get(name) if value is None else value if isinstance(value, int | str) else str(value))
        groups.setdefault(tuple(key), []).append(cell)
    order = [names.index(name) for name in ("mixed_precision", "batch_size", "patch_divider", "patch_batch_size")]

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        precision, batch, divider, patches = (key[i] for i in order)
        return str(precision), batch or 0, divider or 0, -(patches or 0), str(key)

    return {key: groups[key] for key in sorted(groups, key=place)}


def step_change(
    settings: dict[str, Any], phase: str, a: Sequence[CellResult], b: Sequence[CellResult], not_timed: str
) -> StepChange | None:
    """The change of one step; None where neither run measured it. ``not_timed``: why times are not compared."""
    ended = [_endings(cells, phase) for cells in (a, b)]
    if not any(ended):
        return None
    peaks: dict[str, tuple[int | None, int | None]] = {}
    for meter in COMPARED:
        before, after = (max(map(int, step_values(cells, phase, meter)), default=None) for cells in (a, b))
        peaks[meter] = before, after
    times = [_times(cells, phase) for cells in (a, b)]
    pooled = [list(chain(*processes)) for processes in times]
    medians = [step_values(cells, phase, "seconds_per_step") for cells in (a, b)]
    seconds = [median(t or m) if t or m else None for t, m in zip(pooled, medians, strict=True)]
    reason = not_timed
    if not reason and min(map(len, pooled)) < FEWEST_STEPS:
        reason = f"fewer than {FEWEST_STEPS} single steps were timed"
    return StepChange(
        cell=a[0].id,
        settings=settings,
        phase=phase,
        status=(_in_words(ended[0]), _in_words(ended[1])),
        worse=bool(ended[0]) and _failed_share(ended[1]) > _failed_share(ended[0]),
        peaks=peaks,
        gated=next((meter for meter in GATED if None not in peaks[meter]), None),
        seconds=(seconds[0], seconds[1]),
        speed="unknown" if reason else judge_speed(*times),
        speed_reason=reason,
    )


def _endings(cells: Sequence[CellResult], phase: str) -> list[str]:
    """How the phase ended in each repeat: its rows' status, or the cell's where it never came to have a row."""
    found: list[str] = []
    for cell in cells:
        rows = [row.status for row in cell.rows if row.phase == phase] or [cell.status] * (cell.status != "ok")
        if rows:
            found.append(next((status for status in rows if status != "ok"), "ok"))
    return found


def _times(cells: Sequence[CellResult], phase: str) -> list[list[float]]:
    """The single steps of each repeat that ended well."""
    well = [cell for cell in cells if _endings([cell], phase) == ["ok"]]
    steps = (finite((cell.details.get("step_seconds") or {}).get(phase, ())) for cell in well)
    return [times for times in steps if times]


def _failed_share(ended: Sequence[str]) -> float:
    return sum(status != "ok" for status in ended) / len(ended) if ended else 0.0


def _in_words(ended: Sequence[str]) -> str:
    failed = Counter(status for status in ended if status != "ok")
    if not failed:
        return "ok" if ended else "not measured"
    count = failed.total()
    return " or ".join(sorted(failed)) + (f" ({count} of {len(ended)} repeats)" if count < len(ended) else "")
