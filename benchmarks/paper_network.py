"""The paper's network, or one that differs from it by a setting, as an experiment with a single planned cell."""

from __future__ import annotations

from typing import Any

from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.sweep.grid import Cell, plan

DIM = 128
STEPS = {"sample": "Sampling", "train": "Training"}
RECOMPUTE = ("cheap", "full")

Row = dict[str, Any]


def planned(
    image_size: int,
    batch: int,
    d: int,
    passes: Any,
    *,
    dim: int = DIM,
    recompute: str = "none",
    micro_batches: int = 1,
) -> tuple[Experiment, Cell]:
    """The experiment and its cell; nothing is trained. ``passes``: patches a pass, ``all``, ``index`` or a number.

    Raises InputError where the image does not divide so far.
    """
    settings = {
        "device": "cpu",  # the network in aten
        "model": {"dim": dim, "dim_mults": [1, 2, 4, 8], "image_size": image_size},
        "training": {"recompute": recompute, "gradient_accumulation_steps": micro_batches},
        "sweep": {"dividers": [d], "batch_sizes": [batch], "patch_batch_sizes": [passes], "quality": False},
    }
    experiment = parse_experiment(settings, "benchmarks")
    return experiment, plan(experiment)[0]
