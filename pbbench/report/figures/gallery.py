"""Which figures a run gets: each drawn, named and captioned, or left out with the reason; and the samples side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.image import imread

from pbbench.records.cells import CellResult
from pbbench.records.quality_names import quality_label, tag
from pbbench.report.figures import charts as plots
from pbbench.report.figures.style import FULL_WIDTH, new_figure, styled
from pbbench.report.figures.timelines import live_bytes_over_a_step, representative
from pbbench.report.tables import numbers as tables
from pbbench.report.tables.columns import fixed_settings
from pbbench.report.tables.held_equal import held_equal, trained_from
from pbbench.report.tables.sheet import number


@dataclass(frozen=True)
class Picture:
    """One figure of a report."""

    name: str
    """Of its files, without the suffix."""
    title: str
    caption: str
    figure: Figure


def pictures(cells: Sequence[CellResult], run: Path) -> tuple[list[Picture], list[str]]:
    """The figures the cells hold data for, and for each other one a line that says why it is not there."""
    frame, parts = tables.tradeoff(cells), tables.split(cells)
    found: list[Picture] = []
    absent: list[str] = []
    meter = tables.METERS[frame.attrs["memory_column"]]
    measured = frame[frame["batch_size"].notna()]
    column = tables.distance_column(frame)
    unchanged = measured[measured["variant"].eq("")]
    together = tables.memory_given(cells) is not None  # each divider has a batch size of its own
    against = "Time against quality" if together else "Memory against quality"
    for suffix, settings in [("", {})] if together else _groups(unchanged):
        own = measured[_same(measured, settings) | _rivals(measured, unchanged)]
        own_parts = parts[_same(parts, settings) & parts["variant"].eq("")]
        said = fixed_settings(own[own["variant"].eq("")])
        varied = f" Beside it its variants, each with settings of its own: {_variants(own)}." if own["variant"].any() else ""
        if column:
            named = quality_label(column, tables.sample_counts(own))
            axis = f"peak of a warm training step and of a warm sampling step by {meter}"
            ways = "every way to pass its patches has its quality"
            if together:
                axis, ways = "seconds that the training took", "in the quickest way that was predicted to fit"
            caption = (
                f"{against}: {axis}, {said}; quality as {named}. Smaller is better on both axes; the dark points on the "
                f"dashed line are beaten by no other. A divider is trained {trained_from(cells)}: {ways}. "
                f"{held_equal(cells) or ''}"
            )
            caption = caption.rstrip() + varied
            drawn = plots.time_against_quality(own) if together else plots.memory_against_quality(own)
            _keep(found, f"{'time' if together else 'memory'}_quality{suffix}", against, caption, drawn)
        ways = "in the way it was trained" if together else "all patches in one pass beside one patch index a pass"
        caption = (
            f"What fills the peak of a warm step, {said}: live tensor bytes per divider, {ways}. The figures over the bars are "
            f"their sums.{' Variants stand in the table.' * bool(varied)}"
        )
        _keep(found, f"memory_split{suffix}", "What fills each peak", caption, plots.peak_by_category(own_parts))
        for step in tables.STEPS:
            chosen = representative(_cells(cells, settings), step)
            ways = "it was trained with" if together else "has the lowest peak"
            caption = (
                f"Live tensor bytes over one {plots.STEP_NAMES[step]} step, {said}: for each divider the way to pass its "
                f"patches that {ways}. The triangle marks the peak; under its size the modules that made most of its "
                "activations. The figures stand in cells/, details.timeline."
            )
            name, title = f"timeline_{step}{suffix}", f"Memory over a {plots.STEP_NAMES[step]} step"
            _keep(found, name, title, caption, live_bytes_over_a_step(chosen, step))
        caption = f"Speed against memory of a warm step, {said}; peaks by {meter}. Up and to the left is better.{varied}"
        _keep(found, f"speed_memory{suffix}", "Speed against memory", caption, plots.speed_against_memory(own))
    made = {picture.title for picture in found}
    if against not in made:
        if not any(cell.kind == "quality" for cell in cells):
            why = "this run scored no images (memory and speed only)"
        else:
            why = "no divider has a quality figure" if column is None else "no scored divider has a measured peak"
        absent.append(f"{against}: {why}.")
    if "What fills each peak" not in made:
        absent.append("What fills each peak: no step that ended well was split by what fills it.")
    if not any(title.startswith("Memory over") for title in made):
        absent.append("Memory over a step: no cell holds a timeline (details.timeline).")
    if "Speed against memory" not in made:
        absent.append("Speed against memory: no step that ended well has both a peak and a speed.")
    samples, notes = _samples(cells, run, frame)
    return found + samples, absent + notes


def _keep(found: list[Picture], name: str, title: str, caption: str, figure: Figure | None) -> None:
    if figure is not None:
        found.append(Picture(name, title, caption, figure))


def _groups(frame: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pairs of batch size and precision, each with the suffix of its figures' names: none where there is but one."""
    pairs = list(frame[["batch_size", "mixed_precision"]].drop_duplicates().itertuples(index=False, name=None))
    for batch_size, precision in pairs:
        suffix = f"-b{batch_size:.0f}-{precision}" if len(pairs) > 1 else ""
        yield suffix, {"batch_size": batch_size, "mixed_precision": precision}


def _rivals(frame: pd.DataFrame, unchanged: pd.DataFrame) -> pd.Series:
    """The lines of variants that have a batch size or precision of their own: they are to be seen beside the experiment."""
    known = set(zip(unchanged["batch_size"], unchanged["mixed_precision"], strict=True))
    pairs = zip(frame["variant"], frame["batch_size"], frame["mixed_precision"], strict=True)
    return pd.Series([bool(variant) and (n, p) not in known for variant, n, p in pairs], index=frame.index, dtype=bool)


def _variants(frame: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(name for name in frame["variant"] if name))


def _same(frame: pd.DataFrame, settings: dict[str, Any]) -> pd.Series:
    matches = pd.Series(True, index=frame.index)
    for name, value in settings.items():
        matches &= frame[name].eq(value) | (frame[name].isna() if pd.isna(value) else False)
    return matches


def _cells(cells: Sequence[CellResult], settings: dict[str, Any]) -> list[CellResult]:
    return [c for c in cells if c.kind == "measure" and all(tables.axis(c, name) == value for name, value in settings.items())]


def _samples(cells: Sequence[CellResult], run: Path, frame: pd.DataFrame) -> tuple[list[Picture], list[str]]:
    """The grids the quality cells name, titled with their variant, divider and its figure; of several trainings the first."""
    grids: dict[str, Path] = {}
    notes: list[str] = []
    column = tables.distance_column(frame)
    counts = tables.sample_counts(frame)
    scores = tables.quality(cells)
    for subject, (cell, *_) in tables.subjects(cells).items():
        variant, divider = subject
        where = f"{variant}, d = {divider}" if variant else f"d = {divider}"
        grid = cell.details.get("grid")
        path = run / str(grid)
        if not grid or not path.is_file():
            missing = f"{grid} is not there" if grid else "the cell names no grid of samples"
            notes.append(f"Samples at {where}: {missing if cell.status == 'ok' else cell.status.replace('_', ' ')}.")
        elif not _is_image(path):
            notes.append(f"Samples at {where}: {grid} cannot be read as an image.")
        else:
            score = scores.get(subject, {}).get(column or "")
            figure = f"   ({_brief(column, counts)} {number(score)})" if column and score is not None else ""
            grids[f"{where}{figure}"] = path
    if not grids:
        return [], [*notes, "Samples: there is no grid of samples to show."]
    reference = run / "samples" / "reference.png"
    shown = reference if reference.is_file() and _is_image(reference) else None
    if shown is None:
        notes.append("Reference images: samples/reference.png is not there or cannot be read.")
    named = f"; in brackets its {quality_label(column, counts)}" if column else ""
    caption = f"Samples, not picked: the first images of each divider, from the same noise{named}."
    drawn = sample_grids(grids, shown)
    return [Picture("samples", "Samples", caption, drawn)] if drawn else [], notes


def _brief(column: str, num_images: Sequence[float]) -> str:
    return {"frechet_inception_distance": f"FID{tag(num_images)}", "held_out_loss": "loss"}.get(column, "distance")


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


def _show(axes: plots.Axes, title: str, image: object) -> None:
    axes.imshow(image, cmap="gray")  # type: ignore[arg-type]  # the colour map serves single-channel images only
    axes.set_title(title, fontsize=8, pad=3)
    axes.set_axis_off()
