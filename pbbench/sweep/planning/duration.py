"""How long a sweep takes, before it runs: from each cell's arithmetic, its launches of kernels and what the harness does
beside.

A step's time is that of ``search.relative_cost``: on a GPU each pass takes its arithmetic or its launches, whichever is
longer; on a CPU both. The rates (``MACHINES``) are of one H200 seen through a virtual machine, where a launch takes some 50
µs (5 to 10 elsewhere), and of one thread of an AMD EPYC. It is good for "minutes or hours", within a factor of two on
machines like these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pbbench.experiment.experiment import Experiment
from pbbench.experiment.settings import resolve_patch_batch_size
from pbbench.sweep.grid import UNLIMITED, Cell, resolve
from pbbench.sweep.planning.search import Machine, one_pass, relative_cost
from pbbench.sweep.shipped import checkpoint_of

MACHINES = {
    "cuda": Machine(flops_per_second=50e12, bytes_per_second=3e12, seconds_per_kernel=50e-6),
    "cpu": Machine(flops_per_second=47e9, bytes_per_second=10e9, seconds_per_kernel=22e-6, overlapping=False),
}
STARTING = {"cuda": 8.0, "cpu": 1.5}
"""Seconds from a cell's start to its first step."""
PREDICTING = 4.0
"""Seconds for the predictions beside a measured cell."""
IMAGES_SCORED_PER_SECOND = {"cuda": 500.0, "cpu": 350.0}
UNTIMED_STEPS = 2
"""Beside the warm-up and the timed ones: one in parts, one traced."""
WORDS = {
    "cuda": "an H200 that takes 50 µs to launch a kernel, as through a virtual machine; elsewhere it is quicker",
    "cpu": "one thread of an AMD EPYC",
}


@dataclass
class Durations:
    """Estimated seconds of a sweep's cells; what was counted of a network is kept."""

    experiment: Experiment

    def __post_init__(self) -> None:
        self.kind = "cpu" if self.experiment.device == "cpu" else "cuda"
        self._counted: dict[Any, tuple[int, int, int]] = {}

    def of(self, cell: Cell) -> float:
        experiment = resolve(self.experiment, cell)
        if cell.kind == "quality":
            return self._quality(experiment, cell)
        sweep, micro = experiment.sweep, experiment.training.gradient_accumulation_steps
        steps = sweep.warmup_steps + sweep.measured_steps + UNTIMED_STEPS
        given = (cell.batch_size, cell.patch_batch_size, cell.mixed_precision)
        sample, train = (self._step(experiment, cell.patch_divider, step, *given) for step in ("sample_step", "train_step"))
        return STARTING[self.kind] + PREDICTING + steps * (sample + micro * train)

    def in_all(self, cells: Sequence[Cell]) -> float:
        return sum(self.of(cell) for cell in cells)

    def _quality(self, experiment: Experiment, cell: Cell) -> float:
        training, sampling, quality = experiment.training, experiment.sampling, experiment.quality
        d, count = cell.patch_divider, quality.num_images
        given = (cell.batch_size, cell.patch_batch_size, training.mixed_precision)
        if checkpoint_of(experiment, d, cell.variant) is not None:
            train = 0.0
        elif training.num_steps >= UNLIMITED:
            train = training.max_seconds or 0.0
        else:
            step = self._step(experiment, d, "train_step", *given)
            train = training.num_steps * training.gradient_accumulation_steps * step
        patches = resolve_patch_batch_size(sampling.patch_batch_size, sampling.batch_size, d)
        step = self._step(experiment, d, "sample_step", sampling.batch_size, patches, sampling.mixed_precision)
        calls = -(-count // sampling.batch_size) * (sampling.num_inference_steps or 50)
        scored = (2 * count + quality.num_reference_images) / IMAGES_SCORED_PER_SECOND[self.kind]
        return STARTING[self.kind] + train + calls * step + scored

    def _step(self, experiment: Experiment, divider: int, step: str, batch: int, patches: int, precision: Any) -> float:
        """Seconds of one pass over a (micro-)batch."""
        key = (experiment.model, experiment.training.recompute, divider, step, precision)
        if key not in self._counted:
            self._counted[key] = one_pass(experiment, step, divider, experiment.training.recompute, precision)
        flops, kernels, weights = self._counted[key]
        passes = -(-batch * divider**2 // patches)
        return relative_cost(flops * batch, passes, kernels, weights, precision, step, MACHINES[self.kind])


def clock(seconds: float) -> str:
    """2:05, or 1:02:05 with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
