"""The report's tables laid out for people: which columns, in which order, under which names and units."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from pbbench.records.cells import CellResult
from pbbench.records.quality_names import quality_header, quality_label
from pbbench.records.rows import CATEGORIES
from pbbench.report.tables import numbers as tables
from pbbench.report.tables.held_equal import held_equal, trained_from
from pbbench.report.tables.sheet import UNKNOWN, Column, Sheet, byte_unit, in_unit, number, percent, whole

CATEGORY_NAMES = {
    "parameter": "weights",
    "gradient": "gradients",
    "optimizer": "optimizer",
    "ema": "EMA",
    "input": "inputs",
    "activation": "activations",
    "other": "other",
}


def spread(text: str, low: str, high: str) -> str:
    """A figure with its range, the range left out where it rounds away."""
    return text if low == high else f"{text} ({low}–{high})"


def _bytes_column(
    header: tuple[str, ...], frame: pd.DataFrame, name: str, unit: tuple[str, int], rank: int = 0, title: str = ""
) -> Column:
    texts = [in_unit(v, *unit) for v in frame[name]]
    if f"{name}_min" in frame:
        ends = zip(frame[f"{name}_min"], frame[f"{name}_max"], strict=True)
        texts = [spread(t, in_unit(a, *unit), in_unit(b, *unit)) for t, (a, b) in zip(texts, ends, strict=True)]
    return Column((*header, unit[0]), texts, rank=rank, title=f"{title or ' '.join(header)} ({unit[0]})")


def _rate_column(header: tuple[str, ...], frame: pd.DataFrame, name: str, rank: int) -> Column:
    texts = [number(v) for v in frame[name]]
    if f"{name}_min" in frame:
        ends = zip(frame[f"{name}_min"], frame[f"{name}_max"], strict=True)
        texts = [spread(t, number(a), number(b)) for t, (a, b) in zip(texts, ends, strict=True)]
    return Column((*header, "img/s"), texts, rank=rank, title=f"{header[0]} (images/s)")


def _with_range(texts: list[str], frame: pd.DataFrame, name: str) -> list[str]:
    """Least and most over the trainings behind each figure that has several."""
    ends = zip(texts, frame[f"{name}_min"], frame[f"{name}_max"], strict=True)
    return [text if pd.isna(low) else spread(text, number(low), number(high)) for text, low, high in ends]


def settings_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns that name a configuration; variant, batch size (with its micro-batches, where some accumulate) and precision
    only where they vary."""
    columns = [Column(("variant",), list(frame["variant"]), numeric=False)] if frame["variant"].any() else []
    columns += [
        Column(("d",), [whole(v) for v in frame["patch_divider"]]),
        Column(("patches", "a pass"), list(frame["patches_per_pass"]), numeric=False),
    ]
    micro = list(frame["gradient_accumulation_steps"])
    accumulated = any(tables.finite([n]) and n > 1 for n in micro)
    if accumulated and frame[["batch_size", "gradient_accumulation_steps"]].drop_duplicates().shape[0] > 1:
        texts = [f"{whole(v)} × {whole(n)}" for v, n in zip(frame["batch_size"], micro, strict=True)]
        columns.append(Column(("batch ×", "accum."), texts))
    elif frame["batch_size"].nunique() > 1:
        columns.append(Column(("batch",), [whole(v) for v in frame["batch_size"]]))
    if frame["mixed_precision"].nunique() > 1:
        columns.append(Column(("auto-", "cast"), [v or UNKNOWN for v in frame["mixed_precision"]], False, title="autocast"))
    return columns


def passes_in_words(passes: str) -> str:
    """``tables.passes`` as it stands in a sentence."""
    words = {"all": "all patches in one pass", "index": "one patch index a pass", "1": "one patch a pass"}
    return words.get(passes, f"{passes} patches a pass")


def fixed_settings(frame: pd.DataFrame) -> str:
    """What all lines share, for a caption: the batch size, and the precision where it is not float32."""
    parts = []
    if frame["batch_size"].nunique() == 1:
        micro = frame["gradient_accumulation_steps"].dropna()
        times = f" × {whole(micro.iloc[0])} accumulated" if micro.nunique() == 1 and micro.iloc[0] > 1 else ""
        parts.append(f"batch size {whole(frame['batch_size'].dropna().iloc[0])}{times}")
    if frame["mixed_precision"].nunique() == 1:
        shared = frame["mixed_precision"].dropna().iloc[0]
        parts.append("float32" if shared == "no" else f"autocast {shared}")
    return ", ".join(parts)


def tradeoff_sheet(cells: Sequence[CellResult]) -> Sheet:
    """The trade-off, one line per configuration."""
    frame = tables.tradeoff(cells)
    meter = tables.METERS[frame.attrs["memory_column"]]
    unit = byte_unit(v for short in tables.STEPS for v in frame[f"{short}_peak_bytes"])
    columns = settings_columns(frame)
    for short in tables.STEPS:
        columns.append(_bytes_column((short, "peak"), frame, f"{short}_peak_bytes", unit))
        if frame[f"{short}_peak_change"].notna().any():
            changes = [percent(v) for v in frame[f"{short}_peak_change"]]
            columns.append(Column(("vs", "d=1"), changes, rank=1, title=f"{short} peak vs d=1"))
        title = f"{short} activations"
        columns.append(_bytes_column(("acti-", "vations"), frame, f"{short}_activation_bytes", unit, 4, title))
        if f"{short}_prediction_error" in frame:
            errors = [percent(v) for v in frame[f"{short}_prediction_error"]]
            columns.append(Column(("pred.", "error"), errors, rank=5, title=f"{short} prediction error"))
    columns += [_rate_column((short,), frame, f"{short}_images_per_second", rank=2) for short in tables.STEPS]
    for short in tables.STEPS:
        if f"{short}_joules_per_image" in frame:
            texts = [number(v) for v in frame[f"{short}_joules_per_image"]]
            columns.append(Column((short, "J/img"), texts, rank=5, title=f"{short} energy of the GPU (J/image)"))
    if "train_seconds" in frame and frame["train_seconds"].notna().any():
        columns.append(Column(("training", "s"), [number(v) for v in frame["train_seconds"]], rank=1, title="training (s)"))
    main = tables.distance_column(frame)
    counts = tables.sample_counts(frame)
    for name in dict.fromkeys(
        (main or "held_out_loss", "seam_score", "held_out_loss")
    ):  # the rest stand in quality's own table
        if name not in frame:
            continue
        rank = 0 if name == main else 3
        header, title = quality_header(name, counts), quality_label(name, counts)
        texts = [number(v) for v in frame[name]]
        if f"{name}_min" in frame:
            texts = _with_range(texts, frame, name)
        columns.append(Column(header, texts, rank=rank, title=title))
    columns.append(Column(("status",), [s.replace("_", " ") for s in frame["status"]], numeric=False))
    notes = [f"Peaks: {meter}, warm step." + (f" {fixed_settings(frame).capitalize()}." if fixed_settings(frame) else "")]
    for short in tables.STEPS:
        changed = frame[f"{short}_peak_change"].notna().any() or tables.memory_given(cells) is not None
        if frame[f"{short}_peak_bytes"].notna().any() and not changed:
            notes.append(f"No change of the {short} peak is given: there is none of d = 1 in one pass to compare with.")
    if (frame["repeats"] > 1).any():
        notes.append("Median over repeats (least–most).")
    if main:
        notes.append(f"Quality: {quality_label(main, counts)}; lower is better.")
    notes += [told for told in [held_equal(cells)] if told]
    if any(tables.spreads(cells).values()):
        notes.append(f"Trained {trained_from(cells)}: median (least–most).")
    varied = tables.unsteadiness(cells)
    if varied > 1.5:
        notes.append(f"Speeds are rough: steps of the same cell took up to {varied:.1f} times as long as its fastest.")
    return Sheet("What each divider costs", columns, notes, "tab:tradeoff")


def split_sheet(cells: Sequence[CellResult], step: str) -> Sheet | None:
    """What fills the peak of ``step`` ("train" or "sample"); None where no configuration's peak was split."""
    frame = tables.split(cells)
    frame = frame[frame["step"] == step].reset_index(drop=True)
    if frame.empty:
        return None
    shown = [n for n in CATEGORIES if n not in ("gradient", "optimizer", "ema") or (frame[f"{n}_bytes"] > 0).any()]
    unit = byte_unit(frame["peak_live_bytes"])
    columns = settings_columns(frame) + [_bytes_column((CATEGORY_NAMES[n],), frame, f"{n}_bytes", unit) for n in shown]
    columns.append(_bytes_column(("sum",), frame, "peak_live_bytes", unit))
    if frame["measured_peak_bytes"].notna().any():
        columns.append(_bytes_column(("torch.cuda", "allocated"), frame, "measured_peak_bytes", unit))
    columns.append(Column(("share of", "activations"), [percent(v, signed=False) for v in frame["activation_share"]]))
    title = {"train": "What fills the peak of a training step", "sample": "What fills the peak of a sampling step"}[step]
    return Sheet(title, columns, ["Live tensor bytes at the peak of the warm step; the parts sum to it."], f"tab:split-{step}")


def meters_sheet(cells: Sequence[CellResult]) -> Sheet | None:
    """What every meter read, cold and warm."""
    frame = tables.meters(cells)
    if frame.empty:
        return None
    read = [name for name in tables.METERS if name in frame]
    unit = byte_unit(v for name in read for v in frame[name])
    columns = settings_columns(frame)
    columns.append(Column(("phase",), [v.replace("_", " ") for v in frame["phase"]], numeric=False))
    columns.append(Column(("cold or", "warm"), list(frame["temperature"]), numeric=False))
    columns += [_bytes_column((tables.METERS[name],), frame, name, unit) for name in read]
    return Sheet(
        "What every meter read", columns, ["Cold: the first run in a fresh process. Warm: after the warm-up."], "tab:meters"
    )
