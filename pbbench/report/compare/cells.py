"""Two runs, cell by cell: what became of each configuration's memory, speed and quality, and whether the change is too much.

Configurations are matched by their settings, repeats gathered; a setting that only one run knows and never varies is left
out. The gate (``max_increase``) is held against one meter per step: CUDA's allocated bytes, warm, or live tensor bytes where
either run has no CUDA reading. Of several repeats the largest peak counts: it is what must fit. Bytes are compared as integers
with an exact fraction, so that an increase of just the limit passes and one byte more does not.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

from pbbench.errors import InputError
from pbbench.records.cells import CellResult
from pbbench.records.run import Run, read_run
from pbbench.report.compare.environments import differences, why_not_timed
from pbbench.report.compare.gate import FEWEST_STEPS, judge_speed, parse_increase, too_much
from pbbench.report.compare.quality import QualityChange, quality_changes
from pbbench.report.tables import numbers as tables

FIXED = ("device", "image_size", "dim", "dim_mults", "gradient_accumulation_steps")
"""Settings that stand in a cell's rows alone; mostly all measured cells of one run share them."""
VARIED = ("variant", "mixed_precision", "batch_size", "patch_divider", "patch_batch_size")
GATED = ("peak_allocated_bytes", "peak_live_bytes")
METERS = (*GATED, "peak_reserved_bytes", "peak_process_bytes")

ONCE = (
    "Each configuration ran in one process in each run: what else the machine did during one of them can pass for a change of "
    "speed. Repeats (sweep.repeats) tell the two apart."
)


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


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side. ``failures``: what crossed the gate, a line each, headed by the cell."""

    paths: tuple[str, str]
    max_increase: str | None
    steps: list[StepChange]
    quality: list[QualityChange]
    missing: list[str]
    """Cells of A that B does not have."""
    added: list[str]
    notes: list[str]
    failures: list[str]


def compare(path_a: Path, path_b: Path, max_increase: str | None = None) -> Comparison:
    """Raises InputError where a folder holds no run, the two have no configuration in common, or the gate has nothing to go
    by."""
    limit = parse_increase(max_increase) if max_increase is not None else None
    a, b = read_run(path_a), read_run(path_b)
    names, notes = _axes(a.cells, b.cells)
    groups_a, groups_b = _groups(a.cells, names), _groups(b.cells, names)
    shared = [key for key in groups_a if key in groups_b]
    quality, quality_notes, unscored = quality_changes(a, b)
    if not shared and not quality:
        raise InputError(f"{path_a} and {path_b} have no configuration in common: {_difference(a, b)}")
    not_timed = why_not_timed(a, b)
    steps = []
    for key in shared:
        settings = {name: value for name, value in zip(names, key, strict=True) if value is not None}
        for phase in tables.STEPS.values():
            steps += _step(settings, phase, groups_a[key], groups_b[key], not_timed)
    missing = [members[0].id for key, members in groups_a.items() if key not in groups_b]
    added = [members[0].id for key, members in groups_b.items() if key not in groups_a]
    if limit is not None and not any(step.peaks[meter][0] is not None for step in steps for meter in GATED) and not missing:
        raise InputError(f"--max-increase: {path_a} has no warm memory reading to hold {path_b} against")
    failures = [line for step in steps for line in _failures(step, limit, max_increase)]
    failures += [change.worse_status for change in quality if change.worse_status]
    failures += [f"{cell}: missing in {path_b}" for cell in missing if limit is not None]
    once = max(len(group[key]) for group in (groups_a, groups_b) for key in shared) == 1 if shared else False
    if once and any(step.speed in ("slower", "faster") for step in steps):
        notes.append(ONCE)
    notes = [*differences(a, b), *notes, *([f"Times are not compared: {not_timed}."] if not_timed else []), *quality_notes]
    paths = (str(path_a), str(path_b))
    return Comparison(paths, max_increase, steps, quality, missing + unscored[0], added + unscored[1], notes, failures)


def _axes(a: Sequence[CellResult], b: Sequence[CellResult]) -> tuple[list[str], list[str]]:
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


def _groups(cells: Sequence[CellResult], names: Sequence[str]) -> dict[tuple[Any, ...], list[CellResult]]:
    """Measured cells by settings, repeats together. What a cell without rows cannot say of itself, the run's others do."""
    measured = sorted(_measured(cells), key=lambda cell: (len(cell.id), cell.id))  # the first repeat names its group
    shared: dict[str, Any] = {}
    for name in FIXED:
        values = {tables.axis(cell, name) for cell in measured} - {None}
        shared[name] = values.pop() if len(values) == 1 else None
    groups: dict[tuple[Any, ...], list[CellResult]] = {}
    for cell in measured:
        key = []
        for name in names:
            value = tables.axis(cell, name) if name in (*FIXED, *VARIED) else cell.axes.get(name)
            key.append(shared.get(name) if value is None else value if isinstance(value, int | str) else str(value))
        groups.setdefault(tuple(key), []).append(cell)
    order = [names.index(name) for name in ("mixed_precision", "batch_size", "patch_divider", "patch_batch_size")]

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        precision, batch, divider, patches = (key[i] for i in order)
        return str(precision), batch or 0, divider or 0, -(patches or 0), str(key)

    return {key: groups[key] for key in sorted(groups, key=place)}


def _endings(cells: Sequence[CellResult], phase: str) -> list[str]:
    """How the phase ended in each repeat: its rows' status, or the cell's where it never came to have a row."""
    found: list[str] = []
    for cell in cells:
        rows: list[str] = [row.status for row in cell.rows if row.phase == phase]
        failed = [status for status in rows if status != "ok"]
        if rows or cell.status != "ok":
            found.append(failed[0] if failed else "ok" if rows else cell.status)
    return found


def _step(
    settings: dict[str, Any], phase: str, a: Sequence[CellResult], b: Sequence[CellResult], not_timed: str
) -> list[StepChange]:
    """The change of one step, as a list: empty where neither run measured it."""
    ended = [_endings(cells, phase) for cells in (a, b)]
    if not any(ended):
        return []
    peaks: dict[str, tuple[int | None, int | None]] = {}
    for meter in METERS:
        largest = [max(map(int, tables.step_values(cells, phase, meter)), default=None) for cells in (a, b)]
        peaks[meter] = (largest[0], largest[1])
    gated = next((meter for meter in GATED if None not in peaks[meter]), None)
    times = [_times(cells, phase) for cells in (a, b)]
    medians = [tables.step_values(cells, phase, "seconds_per_step") for cells in (a, b)]
    pooled = [list(chain(*processes)) for processes in times]
    seconds = [statistics.median(t or m) if t or m else None for t, m in zip(pooled, medians, strict=True)]
    reason = not_timed
    if not reason and min(map(len, pooled)) < FEWEST_STEPS:
        reason = f"fewer than {FEWEST_STEPS} single steps were timed"
    return [
        StepChange(
            cell=a[0].id,
            settings=settings,
            phase=phase,
            status=(_in_words(ended[0]), _in_words(ended[1])),
            worse=bool(ended[0]) and _failed_share(ended[1]) > _failed_share(ended[0]),
            peaks=peaks,
            gated=gated,
            seconds=(seconds[0], seconds[1]),
            speed="unknown" if reason else judge_speed(*times),
            speed_reason=reason,
        )
    ]


def _times(cells: Sequence[CellResult], phase: str) -> list[list[float]]:
    """The single steps of each repeat that ended well."""
    well = [cell for cell in cells if _endings([cell], phase) == ["ok"]]
    steps = (tables.finite((cell.details.get("step_seconds") or {}).get(phase, ())) for cell in well)
    return [times for times in steps if times]


def _failed_share(ended: Sequence[str]) -> Fraction:
    return Fraction(sum(status != "ok" for status in ended), len(ended)) if ended else Fraction(0)


def _in_words(ended: Sequence[str]) -> str:
    failed = sorted({status for status in ended if status != "ok"})
    if not ended:
        return "not measured"
    if not failed:
        return "ok"
    count = sum(status != "ok" for status in ended)
    return " or ".join(failed) + (f" ({count} of {len(ended)} repeats)" if count < len(ended) else "")


def _failures(step: StepChange, limit: Fraction | None, shown: str | None) -> list[str]:
    """Why this step does not pass, a line each."""
    name = f"{step.cell} {step.phase}"
    if step.worse:
        return [f"{name}: {step.status[0]} in A, {step.status[1]} in B"]
    if limit is None:
        return []
    if step.gated is None:
        known = [meter for meter in GATED if step.peaks[meter][0] is not None]
        return [f"{name}: A has {known[0]}, B does not: nothing shows that it did not grow"] if known else []
    a, b = step.peaks[step.gated]
    assert a is not None
    assert b is not None
    if not too_much(a, b, limit):
        return []
    grown = f", {100 * (b - a) / a:+.3g}%" if a else ""
    return [f"{name}: {step.gated} {a:,} → {b:,} bytes ({b - a:+,}{grown}; the limit is {shown})"]


def _difference(a: Run, b: Run) -> str:
    """What keeps two runs apart, for the error that says so."""
    apart = []
    for name in (*FIXED, *VARIED):
        values = [sorted(map(str, {tables.axis(cell, name) for cell in run.cells} - {None})) for run in (a, b)]
        if not set(values[0]) & set(values[1]):
            apart.append(f"{name} {', '.join(values[0])} and {', '.join(values[1])}")
    return "; ".join(apart) or "no combination of settings occurs in both"
