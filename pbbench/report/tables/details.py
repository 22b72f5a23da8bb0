"""The report's smaller tables: quality, failures, what is missing, modules, and predictions; each None where it has no line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import CellResult
from pbbench.records.quality_names import quality_header, quality_label
from pbbench.report.tables import missing
from pbbench.report.tables import numbers as tables
from pbbench.report.tables.columns import settings_columns, spread
from pbbench.report.tables.held_equal import trained_from
from pbbench.report.tables.sheet import UNKNOWN, Column, Sheet, number, percent, whole


def quality_sheet(cells: Sequence[CellResult]) -> Sheet | None:
    """Per variant and divider every quality figure, the images behind it and the trainings it rests on."""
    found = tables.subjects(cells)
    if not found:
        return None
    scores, ranges, spreads = tables.quality(cells), tables.intervals(cells), tables.spreads(cells)
    groups = list(found.values())
    rows = [[r for c in group for r in c.rows if r.phase == "quality"] for group in groups]
    counts = [r.num_images for own in rows for r in own]
    columns = _subject_columns(list(found))
    notes = []
    for name in tables.quality_names(scores):
        if name not in ("num_images", "images_seen"):
            ends = [spreads.get(s, {}).get(name) or ranges.get(s, {}).get(name) for s in found]
            texts = [_with_interval(scores.get(s, {}).get(name), end) for s, end in zip(found, ends, strict=True)]
            columns.append(Column(quality_header(name, counts), texts, title=quality_label(name, counts)))
    if any(spreads.values()):
        notes.append(f"Trained {trained_from(cells)}: the median, in brackets the least and the most.")
        columns.append(Column(("trainings",), [f"{sum(c.status == 'ok' for c in g)} of {len(g)}" for g in groups]))
    if any(ranges.values()):
        notes.append(
            "In brackets the 95% interval over the draw of samples (grouped jackknife); the reference images are taken as "
            "fixed, and what another training would change is not in it."
        )
    columns.append(Column(("images scored",), [_whole(r.num_images for r in own) for own in rows]))
    references = [_whole(c.details.get("num_reference_images") for c in group) for group in groups]
    columns.append(Column(("reference images",), references))
    columns.append(Column(("training images seen",), [_whole(r.images_seen for r in own) for own in rows]))
    samplers = [{f"{r.sampler}, {whole(r.num_inference_steps)} steps" for r in own if r.sampler} for own in rows]
    columns.append(Column(("sampler",), ["; ".join(sorted(told)) or UNKNOWN for told in samplers], numeric=False))
    for name, header in (
        ("train_seconds", "training (s)"),
        ("sample_seconds", "sampling (s)"),
        ("score_seconds", "scoring (s)"),
    ):
        seconds = [tables.median(tables.finite(c.details.get(name) for c in group)) for group in groups]
        if tables.finite(seconds):
            columns.append(Column((header,), [number(value) for value in seconds]))
    statuses = ["; ".join(dict.fromkeys(c.status.replace("_", " ") for c in group)) for group in groups]
    columns.append(Column(("status",), statuses, numeric=False))
    return Sheet("Quality of each divider", columns, notes)


def _subject_columns(subjects: Sequence[tables.Subject]) -> list[Column]:
    """The variant, only where there is one, and the divider."""
    named = any(variant for variant, _ in subjects)
    columns = [Column(("variant",), [variant for variant, _ in subjects], numeric=False)] if named else []
    return [*columns, Column(("d",), [whole(d) for _, d in subjects])]


def _whole(values: Iterable[int | None]) -> str:
    """A whole number, or the least and the most of several."""
    known = sorted({value for value in values if value is not None})
    return spread(whole(known[0]), whole(known[0]), whole(known[-1])) if known else UNKNOWN


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    return number(value) if interval is None else spread(number(value), number(interval[0]), number(interval[1]))


def bands_sheet(cells: Sequence[CellResult]) -> Sheet | None:
    """The held-out denoising loss per variant, divider and band of timesteps; of several trainings the median."""
    found: dict[tables.Subject, dict[str, list[float]]] = {}
    for subject, members in tables.subjects(cells).items():
        for band in (b for c in members for b in (c.details.get("held_out") or {}).get("bands") or ()):
            name = f"t = {band['t_min']}–{band['t_max']}"
            found.setdefault(subject, {}).setdefault(name, []).append(band["loss"])
    if not found:
        return None
    columns = _subject_columns(list(found))
    for name in dict.fromkeys(name for bands in found.values() for name in bands):
        columns.append(Column((name,), [number(tables.median(bands.get(name, ()))) for bands in found.values()]))
    notes = ["Mean over images that were not trained on, with the same noise for every divider; low t is little noise."]
    return Sheet("Held-out denoising loss by timestep", columns, notes)


def failure_sheet(cells: Sequence[CellResult]) -> Sheet | None:
    """Every cell that failed and why; None where none did."""
    found = missing.failures(cells)
    if not found:
        return None
    texts = {
        "cell": [f["cell"] for f in found],
        "status": [f["status"].replace("_", " ") for f in found],
        "phase": [(f["phase"] or UNKNOWN).replace("_", " ") for f in found],
        "cause": [f["cause"] for f in found],
    }
    columns = [Column((name,), values, numeric=False) for name, values in texts.items()]
    for name in missing.OUT_OF_MEMORY:
        if any(name in f["bytes"] for f in found):
            columns.append(Column((name,), [format_bytes(f["bytes"].get(name)) for f in found]))
    return Sheet("What failed", columns)


def missing_sheet(cells: Sequence[CellResult]) -> Sheet | None:
    """The columns that are null, by reason."""
    found = missing.unmeasured(cells)
    if not found:
        return None
    columns = [
        Column(("columns",), [", ".join(g["columns"]) for g in found], numeric=False),
        Column(("why",), [g["reason"] for g in found], numeric=False),
        Column(("in",), [", ".join(p.replace("_", " ") for p in g["phases"]) or "all rows" for g in found], numeric=False),
        Column(("rows",), [whole(g["rows"]) if g["rows"] else "all" for g in found]),
    ]
    return Sheet("What was not measured", columns)


def module_sheet(cells: Sequence[CellResult], most: int = 6) -> Sheet | None:
    """The modules that made most of the activations at the peak, for the whole image and for the lowest peak measured."""
    lines: list[tuple[str, str, str, int]] = []
    groups = [(s, m) for s, m in tables.configurations(cells) if any(c.details.get("by_module") for c in m)]
    for step in ("train_step", "sample_step"):
        ranked = [(p, s, m) for s, m in groups if not math.isnan(p := _peak(m, step))]
        if not ranked:
            continue
        base = next((entry for entry in ranked if not entry[1]["variant"] and entry[1]["patch_divider"] == 1), ranked[0])
        least = min(ranked, key=lambda entry: entry[0])
        for _, named, members in [base] + ([least] if least is not base else []):
            made = next((c.details["by_module"].get(step) for c in members if c.details.get("by_module")), None) or []
            passes = tables.passes(named["patch_batch_size"], named["batch_size"], named["patch_divider"])
            where = f"{_of(named)}d = {named['patch_divider']}, {passes}"
            lines += [(step.replace("_", " "), where, str(n), int(b)) for n, b in made[:most]]
    if not lines:
        return None
    steps, configurations, names, counts = zip(*lines, strict=True)
    columns = [Column(("step",), list(steps), False), Column(("configuration",), list(configurations), False)]
    columns += [
        Column(("module",), list(names), False),
        Column(("activations at the peak",), [format_bytes(b) for b in counts]),
    ]
    return Sheet("Which modules made the activations", columns, ["The largest of each; the whole list stands in cells/."])


def _peak(members: Sequence[CellResult], step: str) -> float:
    return min(tables.step_values(members, step, "peak_live_bytes"), default=math.nan)


def prediction_sheet(cells: Sequence[CellResult]) -> Sheet | None:
    """Predicted against measured allocator peaks; None where nothing was predicted."""
    frame = tables.predictions(cells)
    if frame.empty:
        return None
    columns = settings_columns(frame)
    columns.append(Column(("phase",), [p.replace("_", " ") for p in frame["phase"]], numeric=False))
    on_gpu = frame["peak_allocated_bytes"].notna().any()
    against = {"allocated": "peak_allocated_bytes" if on_gpu else "peak_live_bytes", "reserved": "peak_reserved_bytes"}
    for kind, source in against.items():
        columns.append(Column((f"predicted {kind}",), [_size(v) for v in frame[f"predicted_{kind}_bytes"]]))
        if frame[source].notna().any():
            header = f"measured {kind}" if on_gpu else "measured live tensors"
            columns.append(Column((header,), [_size(v) for v in frame[source]]))
            columns.append(Column(("error",), [percent(v) for v in frame[f"{kind}_error"]], title=f"error of {kind}"))
    note = "Error: predicted / measured − 1, warm steps. The predictions are of CUDA's caching allocator, made without a GPU."
    if not on_gpu:
        note += " Measured on the CPU: live tensors, which the allocator's blocks exceed by their rounding and remainders."
    return Sheet("Predicted against measured", columns, [note])


def _size(value: float) -> str:
    return format_bytes(None if pd.isna(value) else int(value))


def ledger_sheet(cells: Sequence[CellResult]) -> Sheet | None:
    """What lay between the meters at one synchronised instant after each warm step: requested ≤ allocated ≤ reserved ≤ this
    process ≤ the whole device, by their differences. From the first repeat; None where no allocator was read."""
    lines = []
    for named, members in tables.configurations(cells):
        passes = tables.passes(named["patch_batch_size"], named["batch_size"], named["patch_divider"])
        for phase in tables.STEPS.values():
            ledger = (members[0].details.get("ledger") or {}).get(phase) or {}
            held = ledger.get("closing") or {}
            if held.get("allocated") is None:
                continue
            steps = ("requested", "allocated", "reserved", "process", "device")
            gaps = [_difference(held, low, high) for low, high in itertools.pairwise(steps)]
            gap = (ledger.get("nvml") or {}).get("longest_gap_s")
            texts = [format_bytes(v) for v in (held.get("requested"), *gaps, held.get("device"))]
            name = f"{_of(named)}d = {named['patch_divider']}, {passes}"
            lines.append((name, phase.replace("_", " "), *texts, number(1000 * gap) if gap is not None else UNKNOWN))
    if not lines:
        return None
    headers = ["configuration", "step", "requested", "+ rounding", "+ cache", "+ context and libraries", "+ other processes"]
    headers += ["= device", "NVML's longest gap (ms)"]
    columns = [
        Column((h,), list(texts), i > 1) for i, (h, texts) in enumerate(zip(headers, zip(*lines, strict=True), strict=True))
    ]
    return Sheet("The ledger after each step", columns, ["What is held once the step has ended; the peaks above are larger."])


def _of(settings: dict[str, Any]) -> str:
    return f"{settings['variant']}, " if settings["variant"] else ""


def _difference(held: dict[str, Any], low: str, high: str) -> int | None:
    return held[high] - held[low] if held.get(high) is not None and held.get(low) is not None else None
