"""A comparison of two runs for people and for programs: the same sheets as terminal tables or Markdown, and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from pbbench.records.quality_names import quality_label
from pbbench.report.compare.cells import GATED, VARIED, Comparison, StepChange
from pbbench.report.compare.quality import QualityChange
from pbbench.report.tables.columns import settings_columns
from pbbench.report.tables.numbers import METERS, passes
from pbbench.report.tables.sheet import (
    UNKNOWN,
    Column,
    Sheet,
    byte_unit,
    in_unit,
    markdown_escape,
    number,
    percent,
    to_markdown,
    to_rich,
    whole,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

RULE = (
    "Times are medians of single steps; slower or faster only where they differ by more than both runs' interquartile ranges "
    "together (whole ranges below five steps) and by 3%, and no repeat of one run lies among the other's."
)


def to_terminal(comparison: Comparison, width: int | None = None) -> list[RenderableType]:
    """The tables, then a line for each cell that only one run has, each difference between the runs, and the verdict."""
    tables = [to_rich(sheet, width, "with --markdown") for sheet in _sheets(comparison)]
    return [*tables, *_told(comparison)]


def to_page(comparison: Comparison) -> str:
    """Markdown."""
    a, b = comparison.paths
    parts = [f"# {a} against {b}", *(f"## {sheet.title}\n\n{to_markdown(sheet)}".rstrip() for sheet in _sheets(comparison))]
    lines = [*_told(comparison), *(f"Failed: {line}" for line in comparison.failures)]
    parts.append("\n".join(f"- {markdown_escape(line)}" for line in lines))
    return "\n\n".join(parts) + "\n"


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


def _sheets(comparison: Comparison) -> list[Sheet]:
    return [sheet for sheet in (_steps_sheet(comparison), _quality_sheet(comparison)) if sheet is not None]


def _steps_sheet(comparison: Comparison) -> Sheet | None:
    steps = comparison.steps
    if not steps:
        return None
    columns = _settings(steps)
    columns.append(Column(("step",), [step.phase.removesuffix("_step") for step in steps], numeric=False))
    gated = sorted({step.gated for step in steps if step.gated})
    pairs = [_peaks(step) for step in steps]
    unit = byte_unit(float(v) for pair in pairs for v in pair if v is not None)
    for i, name in enumerate("AB"):
        texts = [UNKNOWN if pair[i] is None else in_unit(float(pair[i] or 0), *unit) for pair in pairs]
        columns.append(Column((f"peak {name}", unit[0]), texts, title=f"peak {name} ({unit[0]})"))
    changes = [_exact_change(step, step.gated) for step in steps]
    columns.append(Column(("peak", "change"), changes))
    for meter, name, rank in (("peak_reserved_bytes", "reserved", 3), ("peak_process_bytes", "process", 4)):
        texts = [_exact_change(step, meter) for step in steps]
        if any(text != UNKNOWN for text in texts):
            columns.append(Column((name, "change"), texts, rank=rank))
    for i, name in enumerate("AB"):
        columns.append(Column((f"s/step {name}",), [number(step.seconds[i]) for step in steps], rank=2))
    columns.append(Column(("speed",), [_speed(step) for step in steps], numeric=False, rank=1))
    columns.append(Column(("status",), [_status(step) for step in steps], numeric=False))
    by = " or ".join(METERS[meter] for meter in gated) or "no meter that both runs read"
    notes = [f"Peaks: {by}, warm step, the largest of the repeats.", RULE]
    return Sheet("Memory and speed", columns, notes)


def _peaks(step: StepChange) -> tuple[int | None, int | None]:
    """The gated meter's readings; where there is no pair, what one run has of the meter that comes first."""
    known = (step.peaks[meter] for meter in GATED if any(value is not None for value in step.peaks[meter]))
    return step.peaks[step.gated] if step.gated else next(known, (None, None))


def _settings(steps: list[StepChange]) -> list[Column]:
    """The usual columns, and any other setting that varies."""
    usual = (*VARIED, "gradient_accumulation_steps")
    frame = pd.DataFrame([{name: step.settings.get(name) for name in usual} for step in steps])
    frame["patches_per_pass"] = [
        passes(*(step.settings.get(name) for name in ("patch_batch_size", "batch_size", "patch_divider"))) for step in steps
    ]
    others = sorted({name for step in steps for name in step.settings} - set(usual))
    varying = [name for name in others if len({step.settings.get(name) for step in steps}) > 1]
    extra = [Column((n,), [str(step.settings.get(n, UNKNOWN)) for step in steps], numeric=False) for n in varying]
    return settings_columns(frame) + extra


def _exact_change(step: StepChange, meter: str | None) -> str:
    """A change too small for its percentage is told in bytes: 0% means that not a byte differs."""
    change = step.change(meter) if meter else None
    if meter is None or change is None:
        return UNKNOWN
    a, b = step.peaks[meter]
    assert a is not None
    assert b is not None
    text = percent(change)
    return f"{b - a:+,} B".replace("-", "−") if text == "0%" and a != b else text


def _speed(step: StepChange) -> str:
    a, b = step.seconds
    if step.speed == "unknown" or not a or b is None:
        return "–"
    return f"{step.speed} ({percent(b / a - 1)})" if step.speed != "same" else "same"


def _status(step: StepChange | QualityChange) -> str:
    a, b = (text.replace("_", " ") for text in step.status)
    return a if a == b else f"{a} → {b}"


def _quality_sheet(comparison: Comparison) -> Sheet | None:
    rows = comparison.quality
    if not rows:
        return None
    variants = [c.settings["variant"] for c in rows]
    columns = [Column(("variant",), variants, numeric=False)] if any(variants) else []
    columns += [
        Column(("d",), [whole(c.settings["patch_divider"]) for c in rows]),
        Column(("figure",), [quality_label(c.column, c.num_images) if c.column else UNKNOWN for c in rows], numeric=False),
        Column(("A",), [number(c.values[0]) for c in rows]),
        Column(("B",), [number(c.values[1]) for c in rows]),
        Column(("verdict",), [c.verdict + (f": {c.reason}" if c.reason else "") for c in rows], numeric=False),
        Column(("status",), [_status(c) for c in rows], numeric=False, rank=1),
    ]
    note = "Lower is better; of precision and recall higher; a seam score the nearer to 1."
    return Sheet("Quality", columns, [note])


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
