"""A run's measured cells by configuration, and what their steps read: each repeat's value, and the median over the repeats.

A configuration is one (variant, precision, batch size, divider, patches per pass, micro-batches); its repeats are fresh
processes. The variant that is the experiment itself has the empty name and comes first. Bytes, seconds and fractions only:
units for people are put on by ``formatting``. Only rows with status ok count: a reading taken while a phase failed is no peak
of that phase.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pbbench.records.cells import CellResult

METERS = {
    "peak_allocated_bytes": "torch.cuda peak allocated",
    "peak_reserved_bytes": "torch.cuda peak reserved",
    "peak_process_bytes": "this process on the GPU (NVML)",
    "peak_device_bytes": "the whole GPU (NVML)",
    "peak_rss_bytes": "resident host memory (VmHWM)",
    "peak_live_bytes": "live tensor bytes",
}
STEPS = {"train": "train_step", "sample": "sample_step"}
SETTINGS = ("variant", "mixed_precision", "batch_size", "patch_divider", "patch_batch_size", "gradient_accumulation_steps")


def memory_column(cells: Iterable[CellResult]) -> str:
    """The meter tables and figures go by: CUDA's allocator where it was read, else live tensor bytes."""
    read = any(r.peak_allocated_bytes is not None for c in cells for r in c.rows)
    return "peak_allocated_bytes" if read else "peak_live_bytes"


def memory_given(cells: Iterable[CellResult]) -> int | None:
    """What a training step was given where the memory is held equal; None where it is not."""
    return next((c.details["equal_memory"] for c in cells if c.details.get("equal_memory") is not None), None)


def passes(settings: Mapping[str, Any]) -> str:
    """How people name the patches per pass: all, index (one patch index of every image), or the number."""
    count, batch_size, divider = (settings.get(name) for name in ("patch_batch_size", "batch_size", "patch_divider"))
    if count is None or math.isnan(count):
        return "–"
    if batch_size and divider and count == batch_size * divider**2:
        return "all"
    return "index" if count == batch_size else f"{count:.0f}"


def passes_in_words(passes: str) -> str:
    """``passes`` as it stands in a sentence."""
    words = {"all": "all patches in one pass", "index": "one patch index a pass", "1": "one patch a pass"}
    return words.get(passes, f"{passes} patches a pass")


def axis(cell: CellResult, name: str) -> Any:
    """A setting of the cell: from its rows, which hold effective values, or else from its axes."""
    for row in cell.rows:
        if getattr(row, name) is not None:
            return getattr(row, name)
    value = cell.axes.get(name)
    if name == "variant":
        return value or ""  # runs from before there were variants do not state it
    if name == "patch_batch_size" and isinstance(value, str):
        batch, divider = cell.axes.get("batch_size"), cell.axes.get("patch_divider")
        if not isinstance(batch, int) or not isinstance(divider, int):
            return None
        return batch if value == "index" else batch * divider**2
    return value


def grouped(cells: Iterable[CellResult], kind: str, names: Sequence[str]) -> dict[tuple[Any, ...], list[CellResult]]:
    """Cells of one kind by the values of these settings."""
    groups: dict[tuple[Any, ...], list[CellResult]] = {}
    for cell in cells:
        if cell.kind == kind:
            groups.setdefault(tuple(axis(cell, name) for name in names), []).append(cell)
    return groups


def configurations(cells: Iterable[CellResult]) -> list[tuple[dict[str, Any], list[CellResult]]]:
    """Measured cells by configuration (``SETTINGS`` and ``patches_per_pass``), repeats together, by variant, precision, batch
    size, divider, most patches first."""
    groups = grouped(cells, "measure", SETTINGS)

    def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return key[0], str(key[1]), key[2] or 0, key[3] or 0, -(key[4] or 0)

    named = [(dict(zip(SETTINGS, key, strict=True)), groups[key]) for key in sorted(groups, key=order)]
    return [(settings | {"patches_per_pass": passes(settings)}, members) for settings, members in named]


def name_of(settings: Mapping[str, Any]) -> str:
    """A configuration in few words, where batch size and precision are told elsewhere."""
    variant = f"{settings['variant']}, " if settings["variant"] else ""
    return f"{variant}d = {settings['patch_divider']}, {settings['patches_per_pass']}"


def finite(values: Iterable[Any]) -> list[float]:
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def step_values(cells: Iterable[CellResult], phase: str, column: str, temperature: str = "warm") -> list[float]:
    """One value per repeat of the phase's row, failed and unknown ones left out."""
    rows = [r for c in cells for r in c.rows if (r.phase, r.temperature, r.status) == (phase, temperature, "ok")]
    return finite(getattr(r, column) for r in rows)


def step_median(cells: Iterable[CellResult], phase: str, column: str, temperature: str = "warm") -> float:
    """The median over the repeats; NaN where it is not known."""
    return median(step_values(cells, phase, column, temperature))


def unsteadiness(cells: Iterable[CellResult]) -> float:
    """The largest ratio of the slowest to the fastest measured step within one cell: 1 is a perfectly quiet machine; NaN
    where the cells keep no step times."""
    times = [finite(steps) for c in cells for steps in (c.details.get("step_seconds") or {}).values()]
    return max((max(steps) / min(steps) for steps in times if len(steps) > 1 and min(steps) > 0), default=math.nan)
