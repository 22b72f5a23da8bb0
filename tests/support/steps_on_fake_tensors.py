"""The sampling and the training step on fake tensors, traced, for tests of what they hold. Nothing is computed.

Bytes are live storage, each rounded up to 512. Chunks are alike, so ``few_chunks`` runs the first two of them only: in
training the second is the first that finds gradients there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.experiment.settings import resolve_patch_batch_size
from pbbench.memory.prediction.fake import predict
from pbbench.memory.tracer.live import LiveTrace
from pbbench.model import patching
from pbbench.sweep.grid import Cell
from pbbench.sweep.workload import sampling_workload, training_workload

MIB = 2**20
CPU = torch.device("cpu")


def few_chunks(patch: pytest.MonkeyPatch) -> None:
    """Let both steps run two chunks: the first two in sampling; in training, which begins with the last, the last two."""

    def first(num_rows: int, patch_batch_size: int | None) -> list[slice]:
        return patching.row_chunks(num_rows, patch_batch_size)[:2]

    def last(num_rows: int, patch_batch_size: int | None) -> list[slice]:
        return patching.row_chunks(num_rows, patch_batch_size)[-2:]

    patch.setattr("pbbench.model.unet.row_chunks", first)
    patch.setattr("pbbench.training.train.row_chunks", last)


def measured(
    model: dict[str, Any], batch_size: int, patches: int | str, training: dict[str, Any] | None = None
) -> tuple[Experiment, Cell]:
    """The experiment of a network (fields of ModelConfig), and its cell with so many patches a pass (or "index", "all")."""
    experiment = parse_experiment({"model": model, "training": {"batch_size": batch_size, **(training or {})}}, "the test")
    d = experiment.model.patch_divider
    size = resolve_patch_batch_size(patches, batch_size, d)  # type: ignore[arg-type]
    return experiment, Cell("cell", "measure", d, size, batch_size, experiment.training.mixed_precision)


def sampling(model: dict[str, Any], batch_size: int, patches: int | str, **training: Any) -> LiveTrace:
    experiment, cell = measured(model, batch_size, patches, training)
    return predict(lambda: sampling_workload(experiment, cell, CPU))


def training(model: dict[str, Any], batch_size: int, patches: int | str, **settings: Any) -> LiveTrace:
    experiment, cell = measured(model, batch_size, patches, settings)
    return predict(lambda: training_workload(experiment, cell, CPU))


def without_average(live: LiveTrace) -> int:
    """A training step's peak in bytes, less the averaged weights beside it."""
    return live.peak_bytes - live.by_category["ema"]
