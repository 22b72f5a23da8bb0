"""The tables of quality: every figure of each divider with what it rests on, and the held-out loss by timestep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pbbench.records.cells import CellResult
from pbbench.records.quality_names import quality_header, quality_label
from pbbench.records.uncertainty import Estimate
from pbbench.report.tables.configurations import finite, median
from pbbench.report.tables.formatting import UNKNOWN, number, spaced, whole, with_range
from pbbench.report.tables.held_equal import trained_from
from pbbench.report.tables.layout import Column, Table, subject_columns, text_column
from pbbench.report.tables.scores import (
    Subject,
    floors,
    intervals,
    quality,
    quality_names,
    spreads,
    subjects,
)
from pbbench.report.verdict import seams_of_whole, verdict

SECONDS = {"train_seconds": "training (s)", "sample_seconds": "sampling (s)", "score_seconds": "scoring (s)"}


def quality_table(cells: Sequence[CellResult]) -> Table | None:
    """Per variant and divider every quality figure, the images behind it and the trainings it rests on."""
    found = subjects(cells)
    if not found:
        return None
    scores, ranges, trained = quality(cells), intervals(cells), spreads(cells)
    known, undivided = floors(cells), {name: seams_of_whole(cells, name) for name in ("seam_score", "seam_excess")}
    groups = list(found.values())
    rows = [[r for c in group for r in c.rows if r.phase == "quality"] for group in groups]
    counts = [r.num_images for own in rows for r in own]
    columns = subject_columns(list(found))
    notes = []
    for name in quality_names(scores):
        if name not in ("num_images", "images_seen"):
            ends = [trained.get(s, {}).get(name) or ranges.get(s, {}).get(name) for s in found]
            texts = [with_range(number, scores.get(s, {}).get(name), *(end or ())) for s, end in zip(found, ends, strict=True)]
            columns.append(Column(quality_header(name, counts), texts, title=quality_label(name, counts)))
        if name in known:
            columns.append(
                Column(("floor",), [number(known[name])] * len(found), title=f"floor of the {quality_label(name, counts)}")
            )
        elif undivided.get(name):
            at_lines = [number(median(undivided[name].get(s[1], ()))) if not s[0] else UNKNOWN for s in found]
            columns.append(Column(("d = 1", "there"), at_lines, title=f"{quality_label(name)} of d = 1 at the same lines"))
    if any(trained.values()):
        notes.append(f"Trained {trained_from(cells)}: the median, in brackets the least and the most.")
        columns.append(Column(("trainings",), [f"{sum(c.status == 'ok' for c in g)} of {len(g)}" for g in groups]))
    if any(ranges.values()):
        notes.append(
            "In brackets the 95% interval of the mean over draws of samples (grouped jackknife); the reference images are "
            "taken as fixed, and what another training would change is not in it."
        )
    columns.append(Column(("images scored",), [_whole(r.num_images for r in own) for own in rows]))
    references = [_whole(c.details.get("num_reference_images") for c in group) for group in groups]
    columns.append(Column(("reference images",), references))
    columns.append(Column(("training images seen",), [_whole(r.images_seen for r in own) for own in rows]))
    samplers = [{f"{r.sampler}, {whole(r.num_inference_steps)} steps" for r in own if r.sampler} for own in rows]
    columns.append(text_column("sampler", ["; ".join(sorted(told)) or UNKNOWN for told in samplers]))
    for name, header in SECONDS.items():
        seconds = [median(finite(c.details.get(name) for c in group)) for group in groups]
        if finite(seconds):
            columns.append(Column((header,), [number(value) for value in seconds]))
    columns.append(text_column("status", ["; ".join(dict.fromkeys(spaced(c.status) for c in group)) for group in groups]))
    return Table("Quality of each divider", columns, notes)


def differences_table(cells: Sequence[CellResult]) -> Table | None:
    """What each divider has more of than the smallest one, with the two parts of its interval."""
    judged = verdict(cells)
    if judged is None or judged.distance is None:
        return None
    first = min(pair.a for pair in judged.pairs)
    against = [pair for pair in judged.pairs if pair.a == first]
    columns = [Column(("d",), [str(pair.b) for pair in against])]
    named = quality_label(judged.distance, [])
    for header, title, kind in (
        (("distance",), named, "distance"),
        (("held-out", "loss"), "held-out denoising loss", "loss"),
        (("seams",), "seam excess, squared (grey levels²)", "seams"),
    ):
        found: list[Estimate | None] = [getattr(pair, kind) for pair in against]
        if any(found):
            columns.append(Column(header, [_signed(e) for e in found], title=f"{title}, more than d = {first}"))
            for part in ("sampling", "training", "reach"):
                reaches = [e and getattr(e, part) for e in found]
                if any(reach is not None for reach in reaches):
                    words = {"sampling": "± by samples", "training": "± by training", "reach": "± in all"}[part]
                    columns.append(Column((words,), [number(reach) for reach in reaches], title=f"{title}, {words}"))
    notes = [
        f"± is the reach of a 95% interval. Dividers drew the same images from the same noise, so differences to "
        f"d = {first} are taken group by group of samples (paired), and are more certain than the figures themselves."
    ]
    if judged.trained_once:
        notes.append("Each divider was trained once: what another training would change is not known.")
    return Table(f"Differences to d = {first}", columns, notes)


def _signed(found: Estimate | None) -> str:
    return UNKNOWN if found is None else f"{'+' if found.value > 0 else ''}{number(found.value)}"


def _whole(values: Iterable[int | None]) -> str:
    """A whole number, or the least and the most of several."""
    known = sorted({value for value in values if value is not None})
    return with_range(whole, known[0], known[0], known[-1]) if known else UNKNOWN


def bands_table(cells: Sequence[CellResult]) -> Table | None:
    """The held-out denoising loss per variant, divider and band of timesteps; of several trainings the median."""
    found: dict[Subject, dict[str, list[float]]] = {}
    for subject, members in subjects(cells).items():
        for band in (b for c in members for b in (c.details.get("held_out") or {}).get("bands") or ()):
            name = f"t = {band['t_min']}–{band['t_max']}"
            found.setdefault(subject, {}).setdefault(name, []).append(band["loss"])
    if not found:
        return None
    columns = subject_columns(list(found))
    for name in dict.fromkeys(name for bands in found.values() for name in bands):
        columns.append(Column((name,), [number(median(bands.get(name, ()))) for bands in found.values()]))
    notes = ["Mean over images that were not trained on, with the same noise for every divider; low t is little noise."]
    return Table("Held-out denoising loss by timestep", columns, notes)
