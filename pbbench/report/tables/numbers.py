"""From cells to tables of numbers: the trade-off, what fills each peak, the meters, failures, and what is missing.

Everything here is in bytes, seconds and fractions; units for people are put on in ``layout``. A configuration is one
(variant, divider, patches per pass, batch size, precision); its repeats are fresh processes, summed up as median, minimum,
maximum. Quality belongs to a subject, (variant, divider); its trainings, one per seed, are summed up likewise. The variant
that is the experiment itself has the empty name and comes first.
Only rows with status ok count: a reading taken while a phase failed is no peak of that phase.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from pbbench.records.cells import CellResult
from pbbench.records.rows import CATEGORIES, COLUMNS

METERS = {
    "peak_allocated_bytes": "torch.cuda peak allocated",
    "peak_reserved_bytes": "torch.cuda peak reserved",
    "peak_process_bytes": "this process on the GPU (NVML)",
    "peak_device_bytes": "the whole GPU (NVML)",
    "peak_rss_bytes": "resident host memory (VmHWM)",
    "peak_live_bytes": "live tensor bytes",
}
STEPS = {"train": "train_step", "sample": "sample_step"}
# Distances by honest name, the one that ranks first; some stand only in a cell's metrics, not in its rows.
DISTANCES = (
    "frechet_inception_distance",
    "few_images_inception_frechet_distance",
    "unverified_inception_frechet_distance",
    "random_features_frechet_distance",
    "kernel_inception_distance_mean",
    "unverified_inception_kernel_distance_mean",
    "random_features_kernel_distance_mean",
    "patch_frechet_inception_distance",
    "few_images_inception_patch_frechet_distance",
    "unverified_inception_patch_frechet_distance",
    "random_features_patch_frechet_distance",
)
Subject = tuple[str, int]
"""(variant, divider): what is trained and scored."""
QUALITY = (*DISTANCES, "precision", "recall", "seam_score", "held_out_loss", "num_images", "images_seen")


def memory_column(cells: Iterable[CellResult]) -> str:
    """The meter tables and figures go by: CUDA's allocator where it was read, else live tensor bytes."""
    return (
        "peak_allocated_bytes" if any(r.peak_allocated_bytes is not None for c in cells for r in c.rows) else "peak_live_bytes"
    )


def memory_given(cells: Iterable[CellResult]) -> int | None:
    """What a training step was given where the memory is held equal; None where it is not."""
    return next((c.details["equal_memory"] for c in cells if c.details.get("equal_memory") is not None), None)


def results(cells: Iterable[CellResult]) -> pd.DataFrame:
    """Every row as measured, columns as in ``records.COLUMNS``. Integers stay integers and unknown stays None; a float that
    is not finite becomes None with a reason, so that JSON can hold it."""
    rows = []
    for cell in cells:
        for row in cell.rows:
            values = row.model_dump(mode="python")
            reasons = dict(row.reasons)
            for name, value in values.items():
                if isinstance(value, float) and not math.isfinite(value):
                    values[name], reasons[name] = None, f"the value was {value}"
            rows.append(values | {"reasons": reasons})
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


def passes(patch_batch_size: float | None, batch_size: float | None, divider: float | None) -> str:
    """How people name the patches per pass: all, index (one patch index of every image), or the number."""
    if patch_batch_size is None or math.isnan(patch_batch_size):
        return "–"
    if batch_size and divider and patch_batch_size == batch_size * divider**2:
        return "all"
    return "index" if patch_batch_size == batch_size else f"{patch_batch_size:.0f}"


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


def configurations(cells: Iterable[CellResult]) -> list[tuple[dict[str, Any], list[CellResult]]]:
    """Measured cells by configuration, repeats together, by variant, precision, batch size, divider, most patches first."""
    groups: dict[tuple[Any, ...], list[CellResult]] = {}
    names = ("variant", "mixed_precision", "batch_size", "patch_divider", "patch_batch_size", "gradient_accumulation_steps")
    for cell in cells:
        if cell.kind == "measure":
            groups.setdefault(tuple(axis(cell, name) for name in names), []).append(cell)

    def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return key[0], str(key[1]), key[2] or 0, key[3] or 0, -(key[4] or 0)

    return [(dict(zip(names, key, strict=True)), groups[key]) for key in sorted(groups, key=order)]


def finite(values: Iterable[Any]) -> list[float]:
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def step_values(cells: Iterable[CellResult], phase: str, column: str, temperature: str = "warm") -> list[float]:
    """One value per repeat of the phase's row, failed and unknown ones left out."""
    rows = [r for c in cells for r in c.rows if (r.phase, r.temperature, r.status) == (phase, temperature, "ok")]
    return finite(getattr(r, column) for r in rows)


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def subjects(cells: Iterable[CellResult]) -> dict[Subject, list[CellResult]]:
    """What was to be trained and scored → its quality cells, one per seed, the lowest seed first."""
    found: dict[Subject, list[CellResult]] = {}
    for cell in sorted((c for c in cells if c.kind == "quality"), key=lambda c: (c.axes.get("seed") or 0, c.id)):
        divider = axis(cell, "patch_divider")
        if divider is not None:
            found.setdefault((axis(cell, "variant"), divider), []).append(cell)
    return dict(sorted(found.items()))


def trainings(cells: Iterable[CellResult]) -> dict[Subject, dict[str, list[float]]]:
    """Subject → its quality figures, by honest name, one per training; only those that have a value."""
    found: dict[Subject, dict[str, list[float]]] = {}
    for subject, members in subjects(cells).items():
        for cell, row in ((c, r) for c in members for r in c.rows if (r.phase, r.status) == ("quality", "ok")):
            metrics = cell.details.get("metrics") or {}
            extra = {k: v for k, v in metrics.items() if k in DISTANCES and k not in COLUMNS}
            values = {name: getattr(row, name) for name in QUALITY if name in COLUMNS} | extra
            for name, value in values.items():
                if finite([value]):
                    found.setdefault(subject, {}).setdefault(name, []).append(value)
    return found


def quality(cells: Iterable[CellResult]) -> dict[Subject, dict[str, float]]:
    """Subject → its quality figures: the medians over its trainings."""
    return {s: {name: median(values) for name, values in named.items()} for s, named in trainings(cells).items()}


def spreads(cells: Iterable[CellResult]) -> dict[Subject, dict[str, tuple[float, float]]]:
    """Subject → the least and the most of its figures, of those trained several times."""
    found = trainings(cells)
    return {s: {n: (min(v), max(v)) for n, v in named.items() if len(v) > 1} for s, named in found.items()}


def sample_counts(frame: pd.DataFrame) -> list[float]:
    """The numbers of images that a trade-off's scores rest on."""
    return sorted(frame["num_images"].dropna().unique()) if "num_images" in frame else []


def intervals(cells: Iterable[CellResult]) -> dict[Subject, dict[str, tuple[float, float]]]:
    """Subject → its figures' 95% intervals over the draw of samples; of what was trained once: between several trainings that
    is the smaller part of the spread."""
    found: dict[Subject, dict[str, tuple[float, float]]] = {}
    for subject, members in subjects(cells).items():
        well = [cell for cell in members if cell.status == "ok"]
        if len(well) == 1:
            metrics = well[0].details.get("metrics") or {}
            given = {name: finite(metrics.get(f"{name}_interval") or ()) for name in (*DISTANCES, "seam_score")}
            found[subject] = {name: (v[0], v[1]) for name, v in given.items() if len(v) == 2}
    return found


def distance_column(frame: pd.DataFrame) -> str | None:
    """The column that ranks quality (lower is better): the best distance there is, else the held-out loss."""
    return next((c for c in (*DISTANCES, "held_out_loss") if c in frame and frame[c].notna().any()), None)


def _status(cells: Sequence[CellResult]) -> str:
    """ok, or what failed in which phase, with a count where only some of the repeats did."""
    failed: dict[str, int] = {}
    for cell in cells:
        rows = [f"{row.status} in {row.phase}" for row in cell.rows if row.status != "ok"]
        for text in rows or ([cell.status] if cell.status != "ok" else []):
            failed[text] = failed.get(text, 0) + 1
    noun = "trainings" if cells and cells[0].kind == "quality" else "repeats"
    parts = [text if count == len(cells) else f"{text} ({count} of {len(cells)} {noun})" for text, count in failed.items()]
    return "; ".join(parts) or "ok"


def tradeoff(cells: Iterable[CellResult]) -> pd.DataFrame:
    """One line per configuration, joined with the quality of its variant and divider.

    Bytes as floats (NaN: unknown); ``*_change`` is the signed fraction against the experiment itself at d = 1, all patches, at
    the same batch size and precision; ``*_prediction_error`` the signed fraction predicted / measured − 1. Where a
    configuration was repeated, or trained from several seeds, the figure is the median and ``*_min``, ``*_max`` stand beside
    it. ``train_seconds``, of the whole training, only where the memory is held equal. Columns of quality, of prediction errors
    and of ``*_joules_per_image`` only where some line has them; ``*_low`` and ``*_high`` are a distance's 95% interval.
    ``frame.attrs["memory_column"]`` names the meter behind the peaks.
    """
    cells = list(cells)
    column = memory_column(cells)
    groups, scores = configurations(cells), quality(cells)
    ends = {("low", "high"): intervals(cells), ("min", "max"): spreads(cells)}
    judged = subjects(cells)
    seen = {(settings["variant"], settings["patch_divider"]) for settings, _ in groups}
    groups += [({"variant": variant, "patch_divider": d}, []) for variant, d in judged if (variant, d) not in seen]
    repeated = any(len(members) > 1 for _, members in groups)
    lines = []
    for settings, members in groups:
        d, p, n = (settings.get(k) for k in ("patch_divider", "patch_batch_size", "batch_size"))
        subject = settings["variant"], d or 0
        line: dict[str, Any] = {"variant": subject[0], "patch_divider": d, "patch_batch_size": p}
        line |= {
            "patches_per_pass": passes(p, n, d),
            "batch_size": n,
            "gradient_accumulation_steps": settings.get("gradient_accumulation_steps"),
            "mixed_precision": settings.get("mixed_precision"),
            "repeats": len(members),
        }
        for short, phase in STEPS.items():
            figures = {"peak_bytes": column, "activation_bytes": "activation_bytes", "images_per_second": "images_per_second"}
            for name, source in figures.items():
                values = step_values(members, phase, source)
                line[f"{short}_{name}"] = median(values)
                if repeated and name != "activation_bytes":
                    line |= {f"{short}_{name}_min": min(values, default=math.nan)}
                    line |= {f"{short}_{name}_max": max(values, default=math.nan)}
            measured, predicted = (median(step_values(members, phase, f"{k}_allocated_bytes")) for k in ("peak", "predicted"))
            line[f"{short}_prediction_error"] = predicted / measured - 1 if measured else math.nan
            line[f"{short}_joules_per_image"] = median(step_values(members, phase, "joules_per_image"))
        for name in quality_names(scores):
            line[name] = scores.get(subject, {}).get(name, math.nan)
            for (low, high), ranges in ends.items():
                if any(name in own for own in ranges.values()):
                    own = ranges.get(subject, {}).get(name, (math.nan, math.nan))
                    line |= {f"{name}_{low}": own[0], f"{name}_{high}": own[1]}
        if memory_given(cells) is not None:
            line["train_seconds"] = median(finite(c.details.get("train_seconds") for c in judged.get(subject, [])))
        failed = [text for text in (_status(members), _status(judged.get(subject, []))) if text != "ok"]
        line["status"] = "; ".join(failed) or "ok"
        lines.append(line)
    frame = pd.DataFrame(lines)
    if len(frame):
        frame = _with_change(frame, alike=memory_given(cells) is None)
    optional = ("_prediction_error", "_joules_per_image")
    empty = [c for c in frame.columns if c.endswith(optional) and not frame[c].notna().any()]
    frame = frame.drop(columns=empty)
    frame.attrs["memory_column"] = column
    return frame


def quality_names(scores: dict[Subject, dict[str, float]]) -> list[str]:
    present = {name for named in scores.values() for name in named}
    return [name for name in QUALITY if name in present]


def _with_change(frame: pd.DataFrame, alike: bool) -> pd.DataFrame:
    """Each peak against the experiment itself at d = 1 in one pass, at the same batch size and precision; NaN where that was
    not measured, or (not ``alike``) each divider has a batch size of its own. A variant with a batch size or precision of its
    own is held against the only such line, where there is one."""
    for short in STEPS:
        whole: dict[Any, float] = {}
        unchanged = frame["variant"].eq("") & frame["patch_divider"].eq(1) & frame["patches_per_pass"].eq("all") & alike
        for _, line in frame[unchanged].iterrows():
            whole[(line["batch_size"], line["mixed_precision"])] = line[f"{short}_peak_bytes"]
        only = next(iter(whole.values())) if len(whole) == 1 else math.nan
        bases = [
            whole.get((n, precision), only if variant else math.nan)
            for n, precision, variant in zip(frame["batch_size"], frame["mixed_precision"], frame["variant"], strict=True)
        ]
        place = frame.columns.get_loc(f"{short}_peak_bytes")
        assert isinstance(place, int)
        frame.insert(place + 1, f"{short}_peak_change", frame[f"{short}_peak_bytes"] / pd.Series(bases, index=frame.index) - 1)
    return frame


def split(cells: Iterable[CellResult]) -> pd.DataFrame:
    """What fills each warm peak of live tensor bytes: one line per configuration and step, a column per category."""
    lines = []
    for settings, members in configurations(cells):
        for short, phase in STEPS.items():
            total = median(step_values(members, phase, "peak_live_bytes"))
            parts = {f"{name}_bytes": median(step_values(members, phase, f"{name}_bytes")) for name in CATEGORIES}
            if math.isnan(total) or math.isnan(parts["activation_bytes"]):
                continue
            named = passes(settings["patch_batch_size"], settings["batch_size"], settings["patch_divider"])
            share = parts["activation_bytes"] / total if total else math.nan
            lines.append(
                {
                    "step": short,
                    **settings,
                    "patches_per_pass": named,
                    "peak_live_bytes": total,
                    **parts,
                    "activation_share": share,
                }
                | {"measured_peak_bytes": median(step_values(members, phase, "peak_allocated_bytes"))}
            )
    columns = ["step", "variant", "mixed_precision", "batch_size", "gradient_accumulation_steps", "patch_divider"]
    columns += ["patch_batch_size", "patches_per_pass"]
    parts_columns = [f"{name}_bytes" for name in CATEGORIES]
    return pd.DataFrame(lines, columns=[*columns, *parts_columns, "peak_live_bytes", "measured_peak_bytes", "activation_share"])


def meters(cells: Iterable[CellResult]) -> pd.DataFrame:
    """Every meter's reading, cold and warm, of each configuration's steps: medians over the repeats, in bytes."""
    lines = []
    for settings, members in configurations(cells):
        for phase in STEPS.values():
            for temperature in ("cold", "warm"):
                readings = {name: median(step_values(members, phase, name, temperature)) for name in METERS}
                if finite(readings.values()):
                    named = passes(settings["patch_batch_size"], settings["batch_size"], settings["patch_divider"])
                    lines.append({**settings, "patches_per_pass": named, "phase": phase, "temperature": temperature} | readings)
    frame = pd.DataFrame(lines)
    return frame.drop(columns=[c for c in METERS if c in frame and not frame[c].notna().any()])


def predictions(cells: Iterable[CellResult]) -> pd.DataFrame:
    """Predicted and measured peaks of the warm steps, where something was predicted; ``*_error`` is the signed fraction
    predicted / measured − 1, NaN where nothing was measured. Without torch.cuda's reading, allocated is held against the live
    tensor bytes that were measured, which lie below it by what the allocator's blocks are larger than the tensors."""
    lines = []
    for settings, members in configurations(cells):
        named = passes(settings["patch_batch_size"], settings["batch_size"], settings["patch_divider"])
        for phase in STEPS.values():
            line: dict[str, Any] = {**settings, "patches_per_pass": named, "phase": phase}
            for kind in ("allocated", "reserved"):
                both = [median(step_values(members, phase, f"{source}_{kind}_bytes")) for source in ("predicted", "peak")]
                line |= {f"predicted_{kind}_bytes": both[0], f"peak_{kind}_bytes": both[1]}
                line[f"{kind}_error"] = both[0] / both[1] - 1 if both[1] else math.nan
            live = median(step_values(members, phase, "peak_live_bytes"))
            line["peak_live_bytes"] = live
            if math.isnan(line["peak_allocated_bytes"]) and live:
                line["allocated_error"] = line["predicted_allocated_bytes"] / live - 1
            if not math.isnan(line["predicted_allocated_bytes"]) or not math.isnan(line["predicted_reserved_bytes"]):
                lines.append(line)
    return pd.DataFrame(lines)


def unsteadiness(cells: Iterable[CellResult]) -> float:
    """The largest ratio of the slowest to the fastest measured step within one cell: 1 is a perfectly quiet machine; NaN
    where the cells keep no step times."""
    times = [finite(steps) for c in cells for steps in (c.details.get("step_seconds") or {}).values()]
    return max((max(steps) / min(steps) for steps in times if len(steps) > 1 and min(steps) > 0), default=math.nan)
