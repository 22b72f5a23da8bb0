"""A comparison of two runs for people and for programs: the same tables in a terminal or as Markdown, and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from pbbench.records.quality_names import quality_label
from pbbench.report.compare.quality import QualityChange
from pbbench.report.compare.runs import Comparison
from pbbench.report.compare.speed import RULE
from pbbench.report.compare.steps import GATED, StepChange
from pbbench.report.pages.markdown import markdown_escape, markdown_table
from pbbench.report.pages.terminal import terminal_table
from pbbench.report.tables.configurations import METERS, SETTINGS, passes
from pbbench.report.tables.formatting import UNKNOWN, byte_unit, in_unit, number, percent, spaced
from pbbench.report.tables.layout import Column, Table, settings_columns, subject_columns, text_column

if TYPE_CHECKING:
    from rich.console import RenderableType


def to_terminal(comparison: Comparison, width: int | None = None) -> list[RenderableType]:
    """The tables, then a line for each cell that only one run has, each difference between the runs, and the verdict."""
    return [*(terminal_table(table, width, "with --markdown") for table in _tables(comparison)), *_told(comparison)]


def to_page(comparison: Comparison) -> str:
    """Markdown."""
    a, b = comparison.paths
    lines = [*_told(comparison), *(f"Failed: {line}" for line in comparison.failures)]
    tables = [f"## {table.title}\n\n{markdown_table(table)}" for table in _tables(comparison)]
    return "\n\n".join([f"# {a} against {b}", *tables, "\n".join(f"- {markdown_escape(line)}" for line in lines)]) + "\n"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Bytes as integers, changes as fractions (B / A − 1), null for unknown."""
    return {
        "a": comparison.paths[0],
        "b": comparison.paths[1],
        "max_increase": comparison.max_increase,
        "passed": not comparison.failures,
        "failures": comparison.failures,
        "missing": comparison.missing,
        "added": comparison.added,
        "notes": comparison.notes,
        "steps": [_step_json(step) for step in comparison.steps],
        "quality": [
            {"cell": c.cell, **c.settings, "status": _pair(c.status), "column": c.column, **_pair(c.values)}
            | {"verdict": c.verdict, "reason": c.reason or None}
            for c in comparison.quality
        ],
    }


def _pair(values: tuple[Any, Any]) -> dict[str, Any]:
    return {"a": values[0], "b": values[1]}


def _step_json(step: StepChange) -> dict[str, Any]:
    meters = {meter: {**_pair(pair), "change": step.change(meter)} for meter, pair in step.peaks.items()}
    told = {"cell": step.cell, **step.settings, "phase": step.phase, "status": _pair(step.status), "gated_by": step.gated}
    speed = {"seconds_per_step": _pair(step.seconds), "speed": step.speed, "speed_reason": step.speed_reason or None}
    return {**told, **meters, **speed}


def _tables(comparison: Comparison) -> list[Table]:
    steps, scores = comparison.steps, comparison.quality
    return [*([_steps_table(steps)] if steps else []), *([_quality_table(scores)] if scores else [])]


def _steps_table(steps: list[StepChange]) -> Table:
    columns = [*_settings(steps), text_column("step", [step.phase.removesuffix("_step") for step in steps])]
    gated = sorted({step.gated for step in steps if step.gated})
    pairs = [_peaks(step) for step in steps]
    unit = byte_unit(float(v) for pair in pairs for v in pair if v is not None)
    for i, name in enumerate("AB"):
        texts = [UNKNOWN if (peak := pair[i]) is None else in_unit(peak, *unit) for pair in pairs]
        columns.append(Column((f"peak {name}", unit[0]), texts, title=f"peak {name} ({unit[0]})"))
    columns.append(Column(("peak", "change"), [_exact_change(step, step.gated) for step in steps]))
    for meter, name, rank in (("peak_reserved_bytes", "reserved", 3), ("peak_process_bytes", "process", 4)):
        texts = [_exact_change(step, meter) for step in steps]
        if any(text != UNKNOWN for text in texts):
            columns.append(Column((name, "change"), texts, rank=rank))
    columns += [Column((f"s/step {name}",), [number(s.seconds[i]) for s in steps], rank=2) for i, name in enumerate("AB")]
    columns.append(text_column("speed", map(_speed, steps), rank=1))
    columns.append(text_column("status", map(_status, steps)))
    by = " or ".join(METERS[meter] for meter in gated) or "no meter that both runs read"
    return Table("Memory and speed", columns, [f"Peaks: {by}, warm step, the largest of the repeats.", RULE])


def _peaks(step: StepChange) -> tuple[int | None, int | None]:
    """The gated meter's readings; where there is no pair, what one run has of the meter that comes first."""
    known = (step.peaks[meter] for meter in GATED if any(value is not None for value in step.peaks[meter]))
    return step.peaks[step.gated] if step.gated else next(known, (None, None))


def _settings(steps: list[StepChange]) -> list[Column]:
    """The usual columns, and any other setting that varies."""
    frame = pd.DataFrame([{name: step.settings.get(name) for name in SETTINGS} for step in steps])
    frame["patches_per_pass"] = [passes(step.settings) for step in steps]
    columns = settings_columns(frame)
    for name in sorted({name for step in steps for name in step.settings} - set(SETTINGS)):
        values = [step.settings.get(name) for step in steps]
        if len(set(values)) > 1:
            columns.append(text_column(name, [str(step.settings.get(name, UNKNOWN)) for step in steps]))
    return columns


def _exact_change(step: StepChange, meter: str | None) -> str:
    """A change too small for its percentage is told in bytes: 0% means that not a byte differs."""
    a, b = step.peaks[meter] if meter else (None, None)
    if not a or b is None:
        return UNKNOWN
    text = percent(b / a - 1)
    return f"{b - a:+,} B".replace("-", "−") if text == "0%" and a != b else text


def _speed(step: StepChange) -> str:
    a, b = step.seconds
    if step.speed == "unknown" or not a or b is None:
        return UNKNOWN
    return f"{step.speed} ({percent(b / a - 1)})" if step.speed != "same" else "same"


def _status(step: StepChange | QualityChange) -> str:
    a, b = map(spaced, step.status)
    return a if a == b else f"{a} → {b}"


def _quality_table(rows: list[QualityChange]) -> Table:
    columns = [
        *subject_columns([(c.settings["variant"], c.settings["patch_divider"]) for c in rows]),
        text_column("figure", [quality_label(c.column, c.num_images) if c.column else UNKNOWN for c in rows]),
        *(Column((name,), [number(c.values[i]) for c in rows]) for i, name in enumerate("AB")),
        text_column("verdict", [c.verdict + (f": {c.reason}" if c.reason else "") for c in rows]),
        text_column("status", map(_status, rows), rank=1),
    ]
    return Table("Quality", columns, ["Lower is better; of precision and recall higher; a seam score the nearer to 1."])


def _told(comparison: Comparison) -> list[str]:
    a, b = comparison.paths
    told = [f"Only in {a}: {', '.join(comparison.missing)}."] if comparison.missing else []
    told += [f"Only in {b}: {', '.join(comparison.added)}."] if comparison.added else []
    told += comparison.notes
    reasons = dict.fromkeys(s.speed_reason for s in comparison.steps if s.speed_reason.startswith("fewer"))
    told += [f"Where no speed is judged: {reason}." for reason in reasons]
    if comparison.failures:
        told.append(f"Failed: {len(comparison.failures)} times a peak grew too much, or a cell ended worse or is missing.")
    elif comparison.max_increase:
        told.append(f"Passed: no peak grew by more than {comparison.max_increase}.")
    return told
