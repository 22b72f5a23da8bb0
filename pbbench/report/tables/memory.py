"""The tables of memory beside the trade-off: what fills each peak, what every meter read, the ledger between the meters, the
modules that made the activations, and predictions beside measurements. A table is None where it has no line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import CellResult
from pbbench.records.rows import CATEGORIES
from pbbench.report.tables.configurations import (
    METERS,
    SETTINGS,
    STEPS,
    configurations,
    finite,
    name_of,
    step_median,
    step_values,
)
from pbbench.report.tables.formatting import UNKNOWN, byte_unit, number, percent, spaced
from pbbench.report.tables.layout import Column, Table, bytes_column, settings_columns, table_of_lines, text_column

CATEGORY_NAMES = {
    "parameter": "weights",
    "gradient": "gradients",
    "optimizer": "optimizer",
    "ema": "EMA",
    "input": "inputs",
    "activation": "activations",
    "other": "other",
    "workspace": "workspaces",
}
PARTS = (*CATEGORIES, "workspace")
"""What fills a peak, from below."""


def split(cells: Iterable[CellResult]) -> pd.DataFrame:
    """What fills each warm peak: one line per configuration and step, a column per category of live tensors, and on CUDA the
    workspaces: what the allocator had handed out at its peak beyond the live tensors at theirs (NaN where it was not read, or
    had less: then the two peaks are not of the same step)."""
    lines = []
    for settings, members in configurations(cells):
        for short, phase in STEPS.items():
            total = step_median(members, phase, "peak_live_bytes")
            parts = {f"{name}_bytes": step_median(members, phase, f"{name}_bytes") for name in CATEGORIES}
            if math.isnan(total) or math.isnan(parts["activation_bytes"]):
                continue
            line = {"step": short, **settings, **parts, "peak_live_bytes": total}
            line["measured_peak_bytes"] = measured = step_median(members, phase, "peak_allocated_bytes")
            line["workspace_bytes"] = measured - total if measured >= total else math.nan
            lines.append(line | {"activation_share": parts["activation_bytes"] / total if total else math.nan})
    columns = ["step", *SETTINGS, "patches_per_pass", *(f"{name}_bytes" for name in PARTS)]
    return pd.DataFrame(lines, columns=[*columns, "peak_live_bytes", "measured_peak_bytes", "activation_share"])


def split_table(cells: Sequence[CellResult], step: str) -> Table | None:
    """What fills the peak of ``step`` ("train" or "sample"); None where no configuration's peak was split."""
    frame = split(cells)
    frame = frame[frame["step"] == step].reset_index(drop=True)
    if frame.empty:
        return None
    shown = [n for n in CATEGORIES if n not in ("gradient", "optimizer", "ema") or (frame[f"{n}_bytes"] > 0).any()]
    unit = byte_unit(frame["peak_live_bytes"])
    columns = settings_columns(frame) + [bytes_column((CATEGORY_NAMES[n],), frame, f"{n}_bytes", unit) for n in shown]
    columns.append(bytes_column(("sum",), frame, "peak_live_bytes", unit))
    notes = ["Live tensor bytes at the peak of the warm step; the parts sum to it."]
    if frame["measured_peak_bytes"].notna().any():
        columns.append(bytes_column((CATEGORY_NAMES["workspace"],), frame, "workspace_bytes", unit))
        columns.append(bytes_column(("torch.cuda", "allocated"), frame, "measured_peak_bytes", unit))
        notes.append(
            "Workspaces: what torch.cuda had allocated at its peak beyond these tensors, the scratch space of cuDNN and "
            "cuBLAS and "
            "what blocks are larger than what is in them."
        )
    columns.append(Column(("share of", "activations"), [percent(v, signed=False) for v in frame["activation_share"]]))
    title = {"train": "What fills the peak of a training step", "sample": "What fills the peak of a sampling step"}[step]
    return Table(title, columns, notes, f"tab:split-{step}")


def meters(cells: Iterable[CellResult]) -> pd.DataFrame:
    """Every meter's reading, cold and warm, of each configuration's steps: medians over the repeats, in bytes."""
    lines = []
    for settings, members in configurations(cells):
        for phase, temperature in itertools.product(STEPS.values(), ("cold", "warm")):
            readings = {name: step_median(members, phase, name, temperature) for name in METERS}
            if finite(readings.values()):
                lines.append({**settings, "phase": phase, "temperature": temperature, **readings})
    frame = pd.DataFrame(lines)
    return frame.drop(columns=[c for c in METERS if c in frame and not frame[c].notna().any()])


def meters_table(cells: Sequence[CellResult]) -> Table | None:
    """What every meter read, cold and warm."""
    frame = meters(cells)
    if frame.empty:
        return None
    read = [name for name in METERS if name in frame]
    unit = byte_unit(v for name in read for v in frame[name])
    columns = [*settings_columns(frame), text_column("phase", map(spaced, frame["phase"]))]
    columns.append(text_column(("cold or", "warm"), frame["temperature"]))
    columns += [bytes_column((METERS[name],), frame, name, unit) for name in read]
    notes = ["Cold: the first run in a fresh process. Warm: after the warm-up."]
    return Table("What every meter read", columns, notes, "tab:meters")


def ledger_table(cells: Sequence[CellResult]) -> Table | None:
    """What lay between the meters at one synchronised instant after each warm step: requested ≤ allocated ≤ reserved ≤ this
    process ≤ the whole device, by their differences. From the first repeat; None where no allocator was read."""
    lines = []
    for (settings, members), phase in itertools.product(configurations(cells), STEPS.values()):
        ledger = (members[0].details.get("ledger") or {}).get(phase) or {}
        held = ledger.get("closing") or {}
        if held.get("allocated") is None:
            continue
        gaps = [_gap(held, *pair) for pair in itertools.pairwise(("requested", "allocated", "reserved", "process", "device"))]
        texts = [format_bytes(v) for v in (held.get("requested"), *gaps, held.get("device"))]
        longest = (ledger.get("nvml") or {}).get("longest_gap_s")
        texts.append(number(1000 * longest) if longest is not None else UNKNOWN)
        lines.append((name_of(settings), spaced(phase), *texts))
    headers = ["configuration", "step", "requested", "+ rounding", "+ cache", "+ context and libraries", "+ other processes"]
    headers += ["= device", "NVML's longest gap (ms)"]
    notes = ["What is held once the step has ended; the peaks above are larger."]
    return table_of_lines("The ledger after each step", headers, lines, words=2, notes=notes)


def _gap(held: dict[str, Any], low: str, high: str) -> int | None:
    return held[high] - held[low] if held.get(high) is not None and held.get(low) is not None else None


def predictions_table(cells: Sequence[CellResult]) -> Table | None:
    """Predicted and measured peaks of the warm steps; None where nothing was predicted. Without torch.cuda's reading, allocated
    is held against the live tensor bytes, which lie below it by what the allocator's blocks are larger than the tensors."""
    lines = []
    for (settings, members), phase in itertools.product(configurations(cells), STEPS.values()):
        names = [f"{source}_{kind}_bytes" for source in ("predicted", "peak") for kind in ("allocated", "reserved")]
        line = {name: step_median(members, phase, name) for name in (*names, "peak_live_bytes")}
        known = {"allocated": line["peak_allocated_bytes"], "reserved": line["peak_reserved_bytes"]}
        if math.isnan(known["allocated"]):
            known["allocated"] = line["peak_live_bytes"]
        errors = {f"{k}_error": line[f"predicted_{k}_bytes"] / v - 1 if v else math.nan for k, v in known.items()}
        if finite(line[f"predicted_{kind}_bytes"] for kind in known):
            lines.append({**settings, "phase": phase, **line, **errors})
    if not lines:
        return None
    frame = pd.DataFrame(lines)
    columns = [*settings_columns(frame), text_column("phase", map(spaced, frame["phase"]))]
    on_gpu = frame["peak_allocated_bytes"].notna().any()
    against = {"allocated": "peak_allocated_bytes" if on_gpu else "peak_live_bytes", "reserved": "peak_reserved_bytes"}
    for kind, source in against.items():
        columns.append(Column((f"predicted {kind}",), [format_bytes(v) for v in frame[f"predicted_{kind}_bytes"]]))
        if frame[source].notna().any():
            header = f"measured {kind}" if on_gpu else "measured live tensors"
            columns.append(Column((header,), [format_bytes(v) for v in frame[source]]))
            columns.append(Column(("error",), [percent(v) for v in frame[f"{kind}_error"]], title=f"error of {kind}"))
    note = "Error: predicted / measured − 1, warm steps. The predictions are of CUDA's caching allocator, made without a GPU."
    if not on_gpu:
        note += " Measured on the CPU: live tensors, which the allocator's blocks exceed by their rounding and remainders."
    return Table("Predicted against measured", columns, [note])


def modules_table(cells: Sequence[CellResult], most: int = 6) -> Table | None:
    """The modules that made most of the activations at the peak, for the whole image and for the lowest peak measured."""
    lines: list[tuple[str, ...]] = []
    groups = [(s, m) for s, m in configurations(cells) if any(c.details.get("by_module") for c in m)]
    for phase in STEPS.values():
        ranked = [(min(peaks), s, m) for s, m in groups if (peaks := step_values(m, phase, "peak_live_bytes"))]
        if not ranked:
            continue
        base = next((entry for entry in ranked if not entry[1]["variant"] and entry[1]["patch_divider"] == 1), ranked[0])
        least = min(ranked, key=lambda entry: entry[0])
        for _, settings, members in [base] + ([least] if least is not base else []):
            made = next(c.details["by_module"].get(phase) for c in members if c.details.get("by_module")) or []
            lines += [(spaced(phase), name_of(settings), str(name), format_bytes(int(b))) for name, b in made[:most]]
    headers = ("step", "configuration", "module", "activations at the peak")
    notes = ["The largest of each; the whole list stands in cells/."]
    return table_of_lines("Which modules made the activations", headers, lines, words=3, notes=notes)
