"""The trade-off: memory, speed and quality, one line per configuration, in numbers and laid out for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from pbbench.records.cells import CellResult
from pbbench.records.quality_names import quality_header, quality_label
from pbbench.report.tables.configurations import (
    METERS,
    SETTINGS,
    STEPS,
    configurations,
    finite,
    median,
    memory_column,
    memory_given,
    step_median,
    step_values,
    unsteadiness,
)
from pbbench.report.tables.formatting import byte_unit, number, percent, spaced
from pbbench.report.tables.held_equal import held_equal, trained_from
from pbbench.report.tables.layout import Table, bytes_column, figure_column, fixed_settings, settings_columns, text_column
from pbbench.report.tables.scores import (
    distance_column,
    floors,
    intervals,
    quality,
    quality_names,
    sample_counts,
    spreads,
    subjects,
)
from pbbench.report.verdict import verdict


def tradeoff(cells: Iterable[CellResult]) -> pd.DataFrame:
    """One line per configuration, joined with the quality of its variant and divider.

    Bytes as floats (NaN: unknown); ``*_change`` is the signed fraction against the experiment itself at d = 1, all patches, at
    the same batch size and precision; ``*_prediction_error`` the signed fraction predicted / measured − 1. Where a
    configuration was repeated, or trained from several seeds, the figure is the median and ``*_min``, ``*_max`` stand beside
    it. ``train_seconds``, of the whole training, only where the memory is held equal. Columns of quality, of prediction errors
    and of ``*_joules_per_image`` only where some line has them; ``*_low`` and ``*_high`` are a distance's 95% interval.
    ``frame.attrs["memory_column"]`` names the meter behind the peaks, ``"verdict"`` says whether the experiment's dividers are
    ranked (None: fewer than two have a distance), ``"floors"`` has the distances of real images.
    """
    cells = list(cells)
    column, given = memory_column(cells), memory_given(cells)
    sources = {"peak_bytes": column, "activation_bytes": "activation_bytes", "images_per_second": "images_per_second"}
    groups, scores, judged = configurations(cells), quality(cells), subjects(cells)
    ends = {("low", "high"): intervals(cells), ("min", "max"): spreads(cells)}
    bases = _whole_images(groups, column) if given is None else {}
    repeated = any(len(members) > 1 for _, members in groups)
    seen = {(settings["variant"], settings["patch_divider"]) for settings, _ in groups}
    unknown = {**dict.fromkeys(SETTINGS), "patches_per_pass": "–"}
    groups += [(unknown | {"variant": s[0], "patch_divider": s[1]}, []) for s in judged if s not in seen]
    lines = []
    for settings, members in groups:
        subject = settings["variant"], settings["patch_divider"] or 0
        line: dict[str, Any] = {**settings, "repeats": len(members)}
        for short, phase in STEPS.items():
            for name, source in sources.items():
                values = step_values(members, phase, source)
                line[f"{short}_{name}"] = median(values)
                if repeated:
                    line |= {f"{short}_{name}_{end}": pick(values, default=math.nan) for end, pick in _ENDS}
            line[f"{short}_peak_change"] = line[f"{short}_peak_bytes"] / _base(bases.get(short, {}), settings) - 1
            measured, predicted = (step_median(members, phase, f"{k}_allocated_bytes") for k in ("peak", "predicted"))
            line[f"{short}_prediction_error"] = predicted / measured - 1 if measured else math.nan
            line[f"{short}_joules_per_image"] = step_median(members, phase, "joules_per_image")
        for name in quality_names(scores):
            line[name] = scores.get(subject, {}).get(name, math.nan)
            for (low, high), ranges in ends.items():
                if any(name in own for own in ranges.values()):
                    own = ranges.get(subject, {}).get(name, (math.nan, math.nan))
                    line |= {f"{name}_{low}": own[0], f"{name}_{high}": own[1]}
        if given is not None:
            line["train_seconds"] = median(finite(c.details.get("train_seconds") for c in judged.get(subject, [])))
        failed = [text for text in (_status(members), _status(judged.get(subject, []))) if text != "ok"]
        lines.append(line | {"status": "; ".join(failed) or "ok"})
    frame = pd.DataFrame(lines)
    optional = ("_prediction_error", "_joules_per_image")
    frame = frame.drop(columns=[c for c in frame.columns if c.endswith(optional) and not frame[c].notna().any()])
    frame.attrs |= {"memory_column": column, "verdict": verdict(cells), "floors": floors(cells)}
    return frame


_ENDS: Any = (("min", min), ("max", max))


def _whole_images(groups: Iterable[tuple[dict[str, Any], list[CellResult]]], column: str) -> dict[str, dict[Any, float]]:
    """Step → (batch size, precision) → the peak of the experiment itself at d = 1 in one pass."""
    unchanged = {"variant": "", "patch_divider": 1, "patches_per_pass": "all"}
    alike = [(s, members) for s, members in groups if unchanged.items() <= s.items()]
    keyed = [((s["batch_size"], s["mixed_precision"]), members) for s, members in alike]
    return {short: {key: step_median(members, phase, column) for key, members in keyed} for short, phase in STEPS.items()}


def _base(whole: dict[Any, float], settings: dict[str, Any]) -> float:
    """What a peak is held against; NaN where that was not measured. A variant with a batch size or precision of its own is held
    against the only whole image, where there is one."""
    only = next(iter(whole.values())) if len(whole) == 1 and settings["variant"] else math.nan
    return whole.get((settings["batch_size"], settings["mixed_precision"]), only) or math.nan


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


def tradeoff_table(cells: Sequence[CellResult]) -> Table:
    """The trade-off for people."""
    frame = tradeoff(cells)
    unit = byte_unit(v for short in STEPS for v in frame[f"{short}_peak_bytes"])
    columns = settings_columns(frame)
    for short in STEPS:
        columns.append(bytes_column((short, "peak"), frame, f"{short}_peak_bytes", unit))
        if frame[f"{short}_peak_change"].notna().any():
            columns.append(figure_column(("vs", "d=1"), frame, f"{short}_peak_change", percent, 1, f"{short} peak vs d=1"))
        title = f"{short} activations"
        columns.append(bytes_column(("acti-", "vations"), frame, f"{short}_activation_bytes", unit, 4, title))
        if (name := f"{short}_prediction_error") in frame:
            columns.append(figure_column(("pred.", "error"), frame, name, percent, 5, f"{short} prediction error"))
    for short in STEPS:
        columns.append(figure_column((short, "img/s"), frame, f"{short}_images_per_second", number, 2, f"{short} (images/s)"))
    for short in STEPS:
        if (name := f"{short}_joules_per_image") in frame:
            columns.append(figure_column((short, "J/img"), frame, name, number, 5, f"{short} energy of the GPU (J/image)"))
    if "train_seconds" in frame and frame["train_seconds"].notna().any():
        columns.append(figure_column(("training", "s"), frame, "train_seconds", number, 1, "training (s)"))
    main, counts = distance_column(frame), sample_counts(frame)
    for name in dict.fromkeys(
        (main or "held_out_loss", "seam_score", "seam_excess", "held_out_loss")
    ):  # the rest: quality's own table
        if name in frame:
            rank, title = 0 if name == main else 3, quality_label(name, counts)
            columns.append(figure_column(quality_header(name, counts), frame, name, number, rank, title))
    columns.append(text_column("status", map(spaced, frame["status"])))
    return Table("What each divider costs", columns, _notes(cells, frame), "tab:tradeoff")


def of_another_network(cells: Sequence[CellResult]) -> str | None:
    """Where quality is not of the network whose memory and speed were measured, both in words."""

    def networks(kind: str) -> list[str]:
        rows = [row for cell in cells if cell.kind == kind for row in cell.rows if row.image_size and not row.variant]
        return sorted({f"dim {row.dim}, widths × {row.dim_mults}, {row.image_size} pixels" for row in rows})

    measured, trained = networks("measure"), networks("quality")
    if not measured or not trained or measured == trained:
        return None
    return f"Quality is of another network ({'; '.join(trained)}) than memory and speed ({'; '.join(measured)})."


def _notes(cells: Sequence[CellResult], frame: pd.DataFrame) -> list[str]:
    said, main = fixed_settings(frame), distance_column(frame)
    notes = [f"Peaks: {METERS[frame.attrs['memory_column']]}, warm step." + (f" {said.capitalize()}." if said else "")]
    for short in STEPS:
        changed = frame[f"{short}_peak_change"].notna().any() or memory_given(cells) is not None
        if frame[f"{short}_peak_bytes"].notna().any() and not changed:
            notes.append(f"No change of the {short} peak is given: there is none of d = 1 in one pass to compare with.")
    if (frame["repeats"] > 1).any():
        notes.append("Median over repeats (least–most).")
    if main:
        floor = frame.attrs["floors"].get(main)
        told = f"; its floor, of as many real images: {number(floor)}" if floor is not None else ""
        notes.append(f"Quality: {quality_label(main, sample_counts(frame))}; lower is better{told}.")
    judged = frame.attrs["verdict"]
    if judged is not None and not judged.ranks:
        notes.append(" ".join(["These figures do not rank the dividers.", *judged.said]))
    notes += [told for told in [of_another_network(cells), held_equal(cells)] if told]
    if any(spreads(cells).values()):
        notes.append(f"Trained {trained_from(cells)}: median (least–most).")
    varied = unsteadiness(cells)
    if varied > 1.5:
        notes.append(f"Speeds are rough: steps of the same cell took up to {varied:.1f} times as long as its fastest.")
    return notes
