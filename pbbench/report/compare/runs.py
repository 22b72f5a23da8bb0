"""Two runs side by side: what became of memory, speed and quality, what is not comparable, and what crossed the gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pbbench.errors import InputError
from pbbench.records.run import Run, read_run
from pbbench.report.compare.differences import differences, why_not_timed
from pbbench.report.compare.gate import failure, parse_increase
from pbbench.report.compare.quality import QualityChange, quality_changes
from pbbench.report.compare.speed import ONCE
from pbbench.report.compare.steps import FIXED, GATED, VARIED, StepChange, common_settings, matched_by, step_change
from pbbench.report.tables.configurations import STEPS, axis


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
    names, notes = common_settings(a.cells, b.cells)
    groups_a, groups_b = matched_by(a.cells, names), matched_by(b.cells, names)
    shared = [key for key in groups_a if key in groups_b]
    quality, quality_notes, unscored = quality_changes(a, b)
    if not shared and not quality:
        raise InputError(f"{path_a} and {path_b} have no configuration in common: {_apart(a, b)}")
    not_timed = why_not_timed(a, b)
    steps = []
    for key in shared:
        settings = {name: value for name, value in zip(names, key, strict=True) if value is not None}
        changes = (step_change(settings, phase, groups_a[key], groups_b[key], not_timed) for phase in STEPS.values())
        steps += [change for change in changes if change]
    missing = [members[0].id for key, members in groups_a.items() if key not in groups_b]
    added = [members[0].id for key, members in groups_b.items() if key not in groups_a]
    if limit is not None and not any(step.peaks[meter][0] is not None for step in steps for meter in GATED) and not missing:
        raise InputError(f"--max-increase: {path_a} has no warm memory reading to hold {path_b} against")
    failures = [line for step in steps if (line := failure(step, limit, max_increase))]
    failures += [change.worse_status for change in quality if change.worse_status]
    failures += [f"{cell}: missing in {path_b}" for cell in missing if limit is not None]
    once = all(len(group[key]) == 1 for group in (groups_a, groups_b) for key in shared)
    if once and any(step.speed in ("slower", "faster") for step in steps):
        notes.append(ONCE)
    notes = [*differences(a, b), *notes, *([f"Times are not compared: {not_timed}."] if not_timed else []), *quality_notes]
    paths = (str(path_a), str(path_b))
    return Comparison(paths, max_increase, steps, quality, missing + unscored[0], added + unscored[1], notes, failures)


def _apart(a: Run, b: Run) -> str:
    """What keeps two runs apart, for the error that says so."""
    apart = []
    for name in (*FIXED, *VARIED):
        values = [sorted(map(str, {axis(cell, name) for cell in run.cells} - {None})) for run in (a, b)]
        if not set(values[0]) & set(values[1]):
            apart.append(f"{name} {', '.join(values[0])} and {', '.join(values[1])}")
    return "; ".join(apart) or "no combination of settings occurs in both"
