"""What a run states about itself in words: what was measured, under which settings, how good the images are and on how many
they were scored, and how to read a row. Every sentence follows from the run's files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import CellResult
from pbbench.records.quality_names import tag
from pbbench.report.tables.configurations import METERS, axis
from pbbench.report.tables.held_equal import held_equal, trained_from
from pbbench.report.tables.layout import fixed_settings
from pbbench.report.tables.memory import meters
from pbbench.report.tables.missing import failures
from pbbench.report.tables.scores import intervals, quality, quality_names
from pbbench.report.tables.tradeoff import of_another_network, tradeoff
from pbbench.report.verdict import RULE, verdict

READING = (
    (
        "A row",
        "One row of results.csv is one cell (a configuration) × phase × cold or warm × repeat. Cold is the first run in a "
        "fresh process, warm the one after the warm-up. Quality is one row of its own, phase quality, per training.",
    ),
    ("The divider d", "The image is cut into d × d patches, which one network denoises; d = 1 is the ordinary model."),
    (
        "Patches a pass",
        "How many patches (image × patch index) go through the network together: all of them; index, one patch index of "
        "every image, which is as many patches as images; or a number. It changes memory and time, not the result. Stacking "
        "all of them leaves the activations as large as those of the whole image, so memory falls with the divider only "
        "where fewer go through at once.",
    ),
    (
        "Peaks",
        "Integers, in bytes. peak_live_bytes counts the tensors that are alive, each storage rounded up to 512 bytes; "
        "peak_allocated_bytes and peak_reserved_bytes come from torch's CUDA allocator, peak_process_bytes and "
        "peak_device_bytes from the driver (NVML), peak_rss_bytes from the operating system. They answer different questions "
        "and need not agree.",
    ),
    (
        "What fills a peak",
        "Weights, gradients, optimizer state, the averaged weights (EMA), inputs, activations and the rest at the instant of "
        "the peak of live tensor bytes; they sum to it. Patching shrinks activations only. Where a training step takes several "
        "passes, the gradients of the earlier ones lie beside the activations of the next, so they count in its peak.",
    ),
    ("Null", "Unknown is null (empty in results.csv), never 0; the column reasons says why."),
    (
        "Quality",
        "Lower distances and losses are better; higher precision and recall are better. The seam score compares steps in "
        "brightness across patch borders with those elsewhere, relative to real images: 1 means no visible seams; noise "
        "hides seams from it, and not from the seam excess, the root-mean-square step at a border in grey levels beyond that "
        "of real images. Distances compare only at the same number of images, reference images and extractor.",
    ),
)

NOT_FID = {
    "random_features_frechet_distance": (
        "a fixed-seed random convolutional network stands in for Inception, whose weights were not at hand. It sees "
        "seams, not what images show, and compares with no published figure"
    ),
    "few_images_inception_frechet_distance": (
        "it is taken with Inception's features, but from too few images for them, which raises it"
    ),
    "unverified_inception_frechet_distance": ("the Inception weights were a file whose checksum is not the published one"),
}


def quality_statements(cells: Sequence[CellResult]) -> list[str]:
    """What the quality figures are, and what they rest on."""
    scored = [c for c in cells if c.kind == "quality"]
    if not scored:
        return ["No images were scored in this run: memory and speed only."]
    scores = quality(cells)
    names = quality_names(scores)
    elsewhere = of_another_network(cells)
    said = [elsewhere] if elsewhere else []
    said += [] if names else ["No divider has a quality figure; the table of failures says why."]
    said += [f"The Fréchet distance here is not FID: {why}." for name, why in NOT_FID.items() if name in names]
    counts = sorted({s["num_images"] for s in scores.values() if "num_images" in s})
    if "frechet_inception_distance" in names and counts and counts[0] < 10_000:
        said.append(f"FID{tag(counts)} lies above what more images would give; compare it only with FID of as many.")
    judged = verdict(cells)
    if judged is not None:
        opening = "This run ranks its dividers." if judged.ranks else "This run does not rank its dividers."
        said += [" ".join([opening, *judged.said]), f"The rule: {RULE}"]
    if any(intervals(cells).values()):
        said.append(
            "95% intervals are over the draw of samples alone: how far the mean of the figure over such draws may lie from "
            "the one that was found. They leave out the bias of so many images and the difference another training makes."
        )
    patches = sorted({str((c.details.get("metrics") or {}).get("patches")) for c in scored} - {"None"})
    if patches:
        said.append(f"Patch distances are between {'; '.join(patches)}, at the images' own pixels, the same for every divider.")
    equal = held_equal(cells)
    if equal:
        said.append(f"{equal} Each divider was trained {trained_from(cells)}; the quality holds for that budget.")
    elif names:
        said.append("The training behind these figures is not recorded (checkpoints were loaded, or the budget is unknown).")
    references = sorted({str(c.details["reference"]) for c in scored if c.details.get("reference")})
    if references:
        said.append(f"Reference images: {'; '.join(references)}.")
    extractors = sorted({r.extractor for c in scored for r in c.rows if r.extractor})
    if extractors:
        said.append(f"Feature extractor: {', '.join(extractors)}.")
    told = dict.fromkeys(str(note) for c in scored for note in (c.details.get("metrics") or {}).get("notes") or [])
    return said + [f"On the scores: {note}." for note in told]


def meters_used(cells: Sequence[CellResult]) -> list[str]:
    """The meters that gave a reading, in words and by column, and what the cells add about them."""
    frame = meters(cells)
    described = dict.fromkeys(str(text) for cell in cells for text in cell.details.get("meters") or [])
    return [f"{text} ({name})" for name, text in METERS.items() if name in frame] + list(described)


def machine(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """The environment as (name, value) pairs; an unknown value is followed by its reason."""
    reasons = environment.get("reasons") or {}
    told = {name: _value(value, reasons.get(name)) for name, value in environment.items() if name != "reasons"}
    told |= {n: format_bytes(v) for n, v in environment.items() if n.endswith("_bytes") and isinstance(v, int)}
    return [(name.removesuffix("_bytes"), text) for name, text in told.items()]


def _value(value: Any, reason: str | None = None) -> str:
    """A setting in words: null with its reason, truth as yes and no."""
    if value is None or value == {}:
        return f"not known: {reason}" if reason else "not set" if value is None else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def settings(experiment: dict[str, Any]) -> list[tuple[str, str]]:
    """The experiment, one line per section."""
    alone = {name: value for name, value in experiment.items() if not isinstance(value, dict)}
    sections = {"experiment": alone} | {name: value for name, value in experiment.items() if isinstance(value, dict)}
    return [(name, ", ".join(f"{k} = {_value(v)}" for k, v in its.items())) for name, its in sections.items() if its]


def headline(cells: Sequence[CellResult], environment: dict[str, Any]) -> list[str]:
    """The run in two or three lines: where, what, how much of it ended well."""
    unchanged = [c for c in cells if not axis(c, "variant")]
    row = next((r for c in unchanged for r in c.rows if r.image_size), None)
    place = environment.get("gpu") or environment.get("cpu") or environment.get("device") or "a device that is not recorded"
    lines = [f"Measured on {place}" + (f" with torch {environment['torch']}" if environment.get("torch") else "") + "."]
    if row:
        network = f"Network: dim {row.dim}, multipliers {row.dim_mults}, images of {row.image_size} pixels"
        said = fixed_settings(tradeoff(unchanged))
        variants = sorted({axis(c, "variant") for c in cells} - {""})
        lines.append(f"{network}{', ' + said if said else ''}." + (f" Variants: {', '.join(variants)}." if variants else ""))
    failed = len(failures(cells))
    ended = f"{len(cells)} cells, all ended well" if not failed else f"{len(cells)} cells, {failed} of them failed"
    seeds = sorted({r.seed for c in cells for r in c.rows if r.seed is not None})
    lines.append(f"{ended}" + (f"; seed {', '.join(map(str, seeds))}." if seeds else "."))
    if environment.get("dirty"):
        lines.append("The code had uncommitted changes when it ran: the commit alone does not reproduce this run.")
    return lines
