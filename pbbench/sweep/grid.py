"""Axes to cells: the list of everything a sweep will run, in order, decided before anything starts. No torch.

A **measure** cell is one (patch_divider, patch_batch_size, batch_size, mixed_precision, repeat) in a fresh process: memory and
speed of a sampling step and of a training step. A **quality** cell trains one divider once (how the pass is chunked does not
change the result), samples and scores. Memory and speed of every divider come first: they take minutes, quality takes hours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pbbench.config import Experiment, Precision, resolve_patch_batch_size
from pbbench.errors import InputError


@dataclass(frozen=True)
class Cell:
    """One process's worth of work. ``patch_batch_size`` is the effective number of patches in a pass."""

    id: str
    kind: Literal["measure", "quality"]
    patch_divider: int
    patch_batch_size: int
    batch_size: int
    mixed_precision: Precision
    repeat: int = 0

    def axes(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("id", "kind")}

    def describe(self) -> str:
        """For a person watching: "d=4: 8 patches a pass, batch 8"."""
        if self.kind == "quality":
            return f"d={self.patch_divider}: train, sample, score"
        precision = "" if self.mixed_precision == "no" else f", {self.mixed_precision}"
        again = f", repeat {self.repeat}" if self.repeat else ""
        patches = "patch" if self.patch_batch_size == 1 else "patches"
        passes = f"{self.patch_batch_size} {patches} a pass, batch {self.batch_size}"
        return f"d={self.patch_divider}: {passes}{precision}{again}"


def plan(experiment: Experiment) -> list[Cell]:
    """The cells in the order they run, each once: settings that come to the same number of patches a pass are one cell.

    Raises InputError where a divider does not fit the image.
    """
    sweep, training = experiment.sweep, experiment.training
    for divider in sweep.dividers:
        experiment.with_divider(divider)
    strangers = [d for d in sweep.checkpoints if d not in {str(divider) for divider in sweep.dividers}]
    if strangers:
        raise InputError(f"sweep.checkpoints names divider {', '.join(strangers)}, which is not among the sweep's dividers")
    batch_sizes = sweep.batch_sizes or (training.batch_size,)
    precisions = sweep.mixed_precisions or (training.mixed_precision,)
    if sweep.quality:
        _check_sources(experiment)
    cells: dict[str, Cell] = {}
    for repeat, divider, setting, batch, precision in product(
        range(sweep.repeats), sweep.dividers, sweep.patch_batch_sizes, batch_sizes, precisions
    ):
        patches = resolve_patch_batch_size(setting, batch, divider)
        name = f"d{divider}-p{patches}-b{batch}-{precision}" + (f"-r{repeat}" if repeat else "")
        cells.setdefault(name, Cell(name, "measure", divider, patches, batch, precision, repeat))
    if sweep.quality:
        for divider in sweep.dividers:
            patches = resolve_patch_batch_size(training.patch_batch_size, training.batch_size, divider)
            name = f"d{divider}-quality"
            cells[name] = Cell(name, "quality", divider, patches, training.batch_size, training.mixed_precision)
    return list(cells.values())


def _check_sources(experiment: Experiment) -> None:
    """What quality cells will need hours later is looked for now. Raises InputError for what is not there."""
    from pbbench.training.sources import Prepared, open_source

    if experiment.data.source != "synthetic":
        source = open_source(experiment.data.source)
        if isinstance(source, Prepared):
            source.check_size(experiment.model.size)
    for divider, folder in experiment.sweep.checkpoints.items():
        if not ((Path(folder) / "config.json").is_file() or (Path(folder) / "checkpoints").is_dir()):
            raise InputError(f"sweep.checkpoints.{divider}: {folder} is not a folder that pbbench train or convert wrote")
    weights = experiment.quality.inception_weights
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"quality.inception_weights: there is no file {weights}")
