"""How good the images are: the quality figures of each subject (variant and divider), the medians over its trainings, one per
seed, their spread, and the 95% intervals over the draw of samples."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from pbbench.records.cells import CellResult
from pbbench.records.rows import COLUMNS, Row
from pbbench.records.uncertainty import Training
from pbbench.report.tables.configurations import finite, grouped, median

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
HIGHER_IS_BETTER = (
    "precision",
    "recall",
    "unverified_inception_precision",
    "unverified_inception_recall",
    "random_features_precision",
    "random_features_recall",
)
QUALITY = (*DISTANCES, *HIGHER_IS_BETTER, "seam_score", "seam_excess", "held_out_loss", "num_images", "images_seen")
Subject = tuple[str, int]
"""(variant, divider): what is trained and scored."""
Ranges = dict[Subject, dict[str, tuple[float, float]]]


def subjects(cells: Iterable[CellResult]) -> dict[Subject, list[CellResult]]:
    """What was to be trained and scored → its quality cells, one per seed, the lowest seed first."""
    ordered = sorted((c for c in cells if c.kind == "quality"), key=lambda c: (c.axes.get("seed") or 0, c.id))
    found = grouped(ordered, "quality", ("variant", "patch_divider"))
    return {(variant, d): found[variant, d] for variant, d in sorted(key for key in found if key[1] is not None)}


def trainings(cells: Iterable[CellResult]) -> dict[Subject, dict[str, list[Training]]]:
    """Subject → its quality figures, by honest name, one per training; only those that have a value."""
    found: dict[Subject, dict[str, list[Training]]] = {}
    for subject, members in subjects(cells).items():
        for cell, row in scored(members):
            metrics = cell.details.get("metrics") or {}
            left_out = metrics.get("left_out") or {}
            draw = (row.seed, row.num_images, cell.details.get("reference"))
            for name in (*QUALITY, "seam_excess_square"):
                for value in finite([getattr(row, name) if name in COLUMNS else metrics.get(name)]):
                    found.setdefault(subject, {}).setdefault(name, []).append(Training(value, left_out.get(name), draw))
    return found


def scored(cells: Iterable[CellResult]) -> list[tuple[CellResult, Row]]:
    """The cells that were scored, each with its row of quality."""
    return [(cell, row) for cell in cells for row in cell.rows if (row.phase, row.status) == ("quality", "ok")]


def floors(cells: Iterable[CellResult]) -> dict[str, float]:
    """Distance → its floor, the same of as many real images; only where all trainings that have it say the same."""
    found: dict[str, set[float]] = {}
    for cell, _ in scored(c for c in cells if c.kind == "quality"):
        floor = (cell.details.get("metrics") or {}).get("floor") or {}
        for name in DISTANCES:
            for value in finite([floor.get(name)]):
                found.setdefault(name, set()).add(value)
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def quality(cells: Iterable[CellResult]) -> dict[Subject, dict[str, float]]:
    """Subject → its quality figures: the medians over its trainings."""
    found = trainings(cells).items()
    return {s: {name: median([t.value for t in own]) for name, own in named.items()} for s, named in found}


def spreads(cells: Iterable[CellResult]) -> Ranges:
    """Subject → the least and the most of its figures, of those trained several times."""
    found: Ranges = {}
    for subject, named in trainings(cells).items():
        values = {name: [t.value for t in own] for name, own in named.items() if len(own) > 1}
        found[subject] = {name: (min(own), max(own)) for name, own in values.items()}
    return found


def intervals(cells: Iterable[CellResult]) -> Ranges:
    """Subject → its figures' 95% intervals over the draw of samples; of what was trained once: between several trainings that
    is the smaller part of the spread."""
    found: Ranges = {}
    for subject, members in subjects(cells).items():
        well = [cell for cell in members if cell.status == "ok"]
        if len(well) == 1:
            metrics = well[0].details.get("metrics") or {}
            names = (*DISTANCES, "seam_score", "seam_excess")
            given = {name: finite(metrics.get(f"{name}_interval") or ()) for name in names}
            found[subject] = {name: (v[0], v[1]) for name, v in given.items() if len(v) == 2}
    return found


def quality_names(scores: dict[Subject, dict[str, float]]) -> list[str]:
    """The figures that some subject has."""
    return [name for name in QUALITY if any(name in named for named in scores.values())]


def distance_column(frame: pd.DataFrame) -> str | None:
    """The column of a trade-off that ranks quality (lower is better): the best distance there is, else the held-out loss."""
    return next((c for c in (*DISTANCES, "held_out_loss") if c in frame and frame[c].notna().any()), None)


def sample_counts(frame: pd.DataFrame) -> list[float]:
    """The numbers of images that a trade-off's scores rest on."""
    return sorted(frame["num_images"].dropna().unique()) if "num_images" in frame else []
