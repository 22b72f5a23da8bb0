"""What the memory table means: when patching pays, when a smaller batch does the same, when neither helps; and the figure.

Every number in the text is computed from the table's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paper_network import STEPS, Row

WORTH = 0.25
"""A saving below a quarter of the peak is called no help."""
SAME = 1.10
"""Peaks within a tenth of each other are called the same."""

Key = tuple[int, int, int]


def index_rows(rows: Iterable[Row], step: str) -> dict[Key, Row]:
    """(size, batch, d) → the row of one patch index at a time (at d = 1: of all)."""
    return {
        (r["image_size"], r["batch_size"], r["patch_divider"]): r
        for r in rows
        if r["step"] == step and (r["passes"] == "index" or r["patch_divider"] == 1)
    }


def mib(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:,.0f}" if count >= 100 * 2**20 else f"{count / 2**20:,.1f}"


def share(row: Row) -> float:
    """Activations' part of a peak."""
    return row["activations_bytes"] / row["peak_bytes"]


def accumulating(row: Row) -> int:
    """At most this is a row's peak where the gradients of earlier micro-batches lie beside its activations."""
    if row["step"] == "sample":
        return row["peak_bytes"]
    return row["peak_bytes"] - row["gradients_bytes"] + row["weights_bytes"]


def verdict(found: dict[Key, Row], size: int, batch: int) -> str:
    """In words, for one image size and batch."""
    dividers = sorted(d for s, b, d in found if (s, b) == (size, batch))
    whole, best = found[size, batch, 1], found[size, batch, dividers[-1]]
    if 1 - best["peak_bytes"] / whole["peak_bytes"] < WORTH:
        return "neither helps: what stays whatever the divider fills the peak"
    if batch == 1:
        return "patching pays, and there is no smaller batch"
    alone = found.get((size, 1, 1))
    if alone is not None and accumulating(alone) <= SAME * best["peak_bytes"]:
        return "patching pays; so does a batch of 1 at a time, as much"
    return "patching pays, more than any smaller batch"


def lines(rows: Sequence[Row]) -> list[str]:
    """The rule, in Markdown."""
    text = [
        "## The rule",
        "",
        "Dividing the pass shrinks activations and nothing else, so **the share of activations at d = 1 bounds what any "
        f"divider can save**. Called no help below: a saving under {WORTH:.0%} of the peak. *Batch of 1*: the same images "
        "one at a time at d = 1 (in training with gradient accumulation), the rival that costs neither parameters nor context.",
    ]
    for step, title in STEPS.items():
        found = index_rows(rows, step)
        text += [
            "",
            f"| {title.lower()}: image | batch | activations at d = 1 | peak at d = 1 | d = 4 | d = 8 | batch of 1 | |",
        ]
        text += ["|---|---:|---:|---:|---:|---:|---:|---|"]
        for size, batch in sorted({key[:2] for key in found}):
            whole = found[size, batch, 1]
            peaks = " | ".join(
                mib(found[size, batch, d]["peak_bytes"] if (size, batch, d) in found else None) for d in (1, 4, 8)
            )
            alone = found.get((size, 1, 1))
            small = mib(accumulating(alone)) if alone is not None and batch > 1 else "–"
            text += [f"| {size}² | {batch} | {share(whole):.0%} | {peaks} | {small} | {verdict(found, size, batch)} |"]
    return [*text, *_same_pass(rows)]


def _same_pass(rows: Sequence[Row]) -> list[str]:
    """A pass of N images at divider d has as many pixels as one of N / d² images at d = 1: the peaks of pairs in the table."""
    found = index_rows(rows, "train")
    pairs = []
    for (size, batch, d), row in sorted(found.items()):
        small = found.get((size, batch // d**2, 1)) if d > 1 and batch % d**2 == 0 else None
        if small is not None:
            pairs.append((size, batch, d, row["peak_bytes"], batch // d**2, accumulating(small)))
    if not pairs:
        return []
    apart = [small / peak - 1 for *_, peak, _, small in pairs]
    size, batch, d, peak, fewer, small = pairs[0]
    return [
        "",
        "**A smaller batch does the same** as long as there is one: one patch index of N images at d has as many pixels a pass "
        f"as N / d² images at d = 1. Training {size}², d = {d}, batch {batch}: {mib(peak)} MiB; d = 1, "
        f"micro-batches of {fewer}, accumulated: at most {mib(small)} MiB (over all such pairs of the table "
        f"{min(apart):+.0%} to {max(apart):+.0%}). Below one image a pass, only patches or recomputation go on.",
    ]


def save_figure(rows: Sequence[Row], out: Path) -> None:
    """Training at 128²: the reference's peak as an outline, pbbench's by what fills it, per divider, a panel per batch."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from pbbench.report.figures.style import FILLS, FULL_WIDTH, new_figure, rendered, styled

    names = {"weights": "parameter", "gradients": "gradient", "optimizer": "optimizer", "activations": "activation"}
    found = {key[1:]: row for key, row in index_rows(rows, "train").items() if key[0] == 128}
    batches, dividers = sorted({b for b, _ in found}), sorted({d for _, d in found})

    @styled
    def draw() -> Any:
        figure = new_figure(FULL_WIDTH, 2.5)
        panels = figure.subplots(1, len(batches), squeeze=False)[0]
        for panel, batch in zip(panels, batches, strict=True):
            for place, d in enumerate(dividers):
                row, base = found[batch, d], 0.0
                for part, category in names.items():
                    colour, hatch = FILLS[category]
                    height = row[f"{part}_bytes"] / 2**30
                    panel.bar(place, height, 0.62, base, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
                    base += height
                reference = row["reference_stacked_bytes"] / 2**30
                panel.bar(place, reference, 0.8, fill=False, edgecolor="#222222", linestyle=(0, (3, 2)), linewidth=0.8)
                panel.text(place, base, f"{base:.1f}", ha="center", va="bottom", fontsize=6.5)
            panel.set_xticks(range(len(dividers)), [f"d = {d}" for d in dividers])
            panel.set_title(f"batch {batch}", loc="left")
            panel.grid(axis="x", visible=False)
            panel.set_ylim(0, 1.06 * max(found[batch, d]["reference_stacked_bytes"] for d in dividers) / 2**30)
        panels[0].set_ylabel("training peak, GiB")
        keys = [Patch(facecolor=FILLS[c][0], hatch=FILLS[c][1], edgecolor="white", label=name) for name, c in names.items()]
        keys.append(
            Line2D([], [], color="#222222", linestyle=(0, (3, 2)), linewidth=0.8, label="reference, all patches in one pass")
        )
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
        return figure

    figure = draw()
    for kind in ("png", "svg"):
        (out / f"memory.{kind}").write_bytes(rendered(figure, kind))
