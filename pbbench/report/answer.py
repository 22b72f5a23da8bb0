"""Does patching pay here? What share of a step's peak patching can touch, and the most it saved, out of a run's cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import CellResult
from pbbench.report.tables.configurations import axis, memory_given, passes_in_words
from pbbench.report.tables.formatting import number, percent, spaced, whole
from pbbench.report.tables.memory import split
from pbbench.report.tables.tradeoff import tradeoff


def patching_pays(cells: Sequence[CellResult]) -> list[str]:
    """Per step, the share of the peak that patching can touch, and the most it saved: one sentence or two each. Of the
    experiment itself: a variant's peak is not patching's doing alone."""
    cells = [cell for cell in cells if not axis(cell, "variant")]
    given = memory_given(cells)
    if given is not None:
        return [_speeds_at_equal_memory(cells, given)]
    parts, frame = split(cells), tradeoff(cells)
    whole_image = parts[parts["patch_divider"] == 1]
    if whole_image.empty:
        return [
            "Not known for this run: no step at d = 1 that ended well was split by what fills its peak. The rule: patching can "
            "remove activations only, so it pays as far as they fill the peak."
        ]
    varied = parts[["batch_size", "mixed_precision"]].drop_duplicates().shape[0] > 1
    sentences = []
    for line in whole_image.to_dict("records"):
        step = {"train": "Training", "sample": "Sampling"}[line["step"]]
        where = f" (batch size {whole(line['batch_size'])}, autocast {line['mixed_precision']})" if varied else ""
        share = line["activation_share"]
        text = (
            f"{step}{where}: at d = 1 activations are {percent(share, signed=False)} of the peak "
            f"({format_bytes(line['activation_bytes'])} of {format_bytes(line['peak_live_bytes'])} of live tensors). "
            "The rest, mostly weights and what belongs to them, stays whatever the divider. "
        )
        if share >= 0.5:
            text += "Patching can pay here."
        elif share >= 0.2:
            text += "Patching can take off a part of it."
        else:
            text += "Patching has little to take off here."
        same = frame["batch_size"].eq(line["batch_size"]) & frame["mixed_precision"].eq(line["mixed_precision"])
        changes = frame.loc[same & (frame["patch_divider"] != 1), f"{line['step']}_peak_change"].dropna()
        if len(changes):
            best = frame[frame.index == changes.idxmin()].iloc[0]
            named = f"d = {best['patch_divider']:.0f}, {passes_in_words(best['patches_per_pass'])}"
            text += f" The lowest peak of those measured: {named}, {percent(changes.min())}."
        sentences.append(text)
    return sentences


def _speeds_at_equal_memory(cells: Sequence[CellResult], given: int) -> str:
    """What a divider buys where each may use as much: speed."""
    lines = tradeoff(cells).sort_values("train_images_per_second", ascending=False, kind="stable")
    told = []
    for line in lines.to_dict("records"):
        speed = line["train_images_per_second"]
        ways = "" if line["patches_per_pass"] == "all" else f" ({passes_in_words(line['patches_per_pass'])})"
        ended = f"{number(speed)} images/s" if math.isfinite(speed) else spaced(line["status"].split(" in ")[0])
        told.append(f"d = {line['patch_divider']:.0f}{ways} {ended}")
    return (
        f"A training step was given {format_bytes(given)} at every divider, so what patching saves shows as speed. Training, "
        f"the fastest first: {'; '.join(told)}."
    )
