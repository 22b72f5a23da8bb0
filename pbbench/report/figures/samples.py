"""The figure of samples: each divider's grid of images beside the others, with the reference images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from pbbench.records.cells import CellResult
from pbbench.records.quality_names import quality_label, tag
from pbbench.report.figures.style import FULL_WIDTH, new_figure, styled
from pbbench.report.tables.formatting import number, spaced
from pbbench.report.tables.scores import distance_column, quality, sample_counts, subjects


def samples(cells: Sequence[CellResult], run: Path, frame: pd.DataFrame) -> tuple[Figure | None, str, list[str]]:
    """(figure, caption, notes on what is missing) of the grids the quality cells name, titled with their variant, divider and
    its figure; of several trainings the first."""
    grids: dict[str, Path] = {}
    notes: list[str] = []
    column, counts, scores = distance_column(frame), sample_counts(frame), quality(cells)
    brief = {"frechet_inception_distance": f"FID{tag(counts)}", "held_out_loss": "loss"}.get(column or "", "distance")
    for (variant, divider), (cell, *_) in subjects(cells).items():
        where = f"{variant}, d = {divider}" if variant else f"d = {divider}"
        grid = cell.details.get("grid")
        path = run / str(grid)
        if not grid or not path.is_file():
            missing = f"{grid} is not there" if grid else "the cell names no grid of samples"
            notes.append(f"Samples at {where}: {missing if cell.status == 'ok' else spaced(cell.status)}.")
        elif not _is_image(path):
            notes.append(f"Samples at {where}: {grid} cannot be read as an image.")
        else:
            score = scores.get((variant, divider), {}).get(column or "")
            grids[where + (f"   ({brief} {number(score)})" if score is not None else "")] = path
    if not grids:
        return None, "", [*notes, "Samples: there is no grid of samples to show."]
    reference = run / "samples" / "reference.png"
    shown = reference if reference.is_file() and _is_image(reference) else None
    if shown is None:
        notes.append("Reference images: samples/reference.png is not there or cannot be read.")
    named = f"; in brackets its {quality_label(column, counts)}" if column else ""
    caption = f"Samples, not picked: the first images of each divider, from the same noise{named}."
    return sample_grids(grids, shown), caption, notes


def _is_image(path: Path) -> bool:
    try:
        return imread(path).ndim >= 2
    except (OSError, ValueError, SyntaxError):  # what Pillow raises on broken files
        return False


@styled
def sample_grids(grids: Mapping[str, Path], reference: Path | None = None) -> Figure | None:
    """Grids of samples beside each other, titled by the mapping's keys, and the reference images as one more panel, or as a
    row underneath where their grid is a wide strip. Raises OSError or ValueError for a file that is no image."""
    if not grids:
        return None
    images = {title: imread(path) for title, path in grids.items()}
    strip = None
    if reference is not None:
        real = imread(reference)
        if real.shape[1] > 2 * real.shape[0]:
            strip = real
        else:
            images["reference images"] = real
    columns = min(2 if len(images) == 4 else 3, len(images))
    rows = math.ceil(len(images) / columns)
    side = FULL_WIDTH / max(columns, 2)
    ratio = max(image.shape[0] / image.shape[1] for image in images.values())
    heights = [rows * (side * ratio + 0.22)]
    if strip is not None:
        heights.append(FULL_WIDTH * strip.shape[0] / strip.shape[1] + 0.25)
    figure = new_figure(side * columns, sum(heights))
    bands = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = bands[0].subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, (title, image) in zip(panels, images.items(), strict=False):
        _show(axes, title, image)
    if strip is not None:
        _show(bands[1].subplots(), "reference images", strip)
    return figure


def _show(axes: Axes, title: str, image: object) -> None:
    axes.imshow(image, cmap="gray")  # type: ignore[arg-type]  # the colour map serves single-channel images only
    axes.set_title(title, fontsize=8, pad=3)
    axes.set_axis_off()
