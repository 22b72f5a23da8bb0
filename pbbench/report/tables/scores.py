"""How good the images are: the quality figures of each subject (variant and divider), the medians over its trainings, one per
seed, their spread, and the 95% intervals over the draw of samples."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from pbbench.records.cells import CellResult
from pbbench.records.rows import COLUMNS
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
QUALITY = (*DISTANCES, "precision", "recall", "seam_score", "held_out_loss", "num_images", "images_seen")
Subject = tuple[str, int]
"""(variant, divider): what is trained and scored."""
Ranges = dict[Subject, dict[str, tuple[float, float]]]


def subjects(cells: Iterable[CellResult]) -> dict[Subject, list[CellResult]]:
    """What was to be trained and scored → its quality cells, one per seed, the lowest seed first."""
    ordered = sorted((c for c in cells if c.kind == "quality"), key=lambda c: (c.axes.get("seed") or 0, c.id))
    found = grouped(ordered, "quality", ("variant", "patch_divider"))
    return {(variant, d): found[variant, d] for variant, d in sorted(key for key in found if key[1] is not None)}


def trainings(cells: Iterable[CellResult]) -> dict[Subject, dict[str, list[float]]]:
    """Subject → its quality figures, by honest name, one per training; only those that have a value."""
    found: dict[Subject, dict[str, list[float]]] = {}
    for subject, members in subjects(cells).items():
        for cell, row in ((c, r) for c in members for r in c.rows if (r.phase, r.status) == ("quality", "ok")):
            metrics = cell.details.get("metrics") or {}
            for name in QUALITY:
                values = finite([getattr(row, name) if name in COLUMNS else metrics.get(name)])
                if values:
                    found.setdefault(subject, {}).setdefault(name, []).extend(values)
    return found


def quality(cells: Iterable[CellResult]) -> dict[Subject, dict[str, float]]:
    """Subject → its quality figures: the medians over its trainings."""
    return {s: {name: median(values) for name, values in named.items()} for s, named in trainings(cells).items()}


def spreads(cells: Iterable[CellResult]) -> Ranges:
    """Subject → the least and the most of its figures, of those trained several times."""
    found = trainings(cells)
    return {s: {n: (min(v), max(v)) for n, v in named.items() if len(v) > 1} for s, named in found.items()}


def intervals(cells: Iterable[CellResult]) -> Ranges:
    """Subject → its figures' 95% intervals over the draw of samples; of what was trained once: between several trainings that
    is the smaller part of the spread."""
    found: Ranges = {}
    for subject, members in subjects(cells).items():
        well = [cell for cell in members if cell.status == "ok"]
        if len(well) == 1:
            metrics = well[0].details.get("metrics") or {}
            given = {name: finite(metrics.get(f"{name}_interval") or ()) for name in (*DISTANCES, "seam_score")}
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
