"""The smallest training that has every part, and what two of them are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pbbench.experiment.experiment import Experiment, merge, parse_experiment
from pbbench.training.checkpoint import checkpoints_of

TINY = {
    "name": "tiny",
    "device": "cpu",
    "model": {"dim": 8, "dim_mults": [1, 2], "image_size": 8, "patch_divider": 2},
    "data": {"num_images": 24, "num_held_out": 2, "num_workers": 0},
    "training": {
        "batch_size": 2, "num_steps": 6, "save_every": 3, "sample_every": 0, "ema_start_step": 2, "ema_update_every": 1,
    },
    "sampling": {"sampler": "ddim", "num_inference_steps": 2, "batch_size": 3},
}  # fmt: skip


WELL_CONDITIONED = {"dim": 16, "image_size": 16}
"""For comparing gradients: with fewer channels and pixels per normalised group, rounding is magnified."""


def tiny(**sections: dict[str, Any] | Any) -> Experiment:
    return parse_experiment(merge(TINY, sections), "the test")


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def files_of(out: Path) -> dict[str, bytes]:
    """The tensors of a run's last checkpoint, as they lie on disk."""
    return {path.name: path.read_bytes() for path in sorted(checkpoints_of(out)[-1].glob("*.safetensors"))}


def state_of(out: Path) -> dict[str, Any]:
    """What a run's last checkpoint keeps beside its tensors; the seconds that it took are its own."""
    return json.loads((checkpoints_of(out)[-1] / "training_state.json").read_text()) | {"seconds": None}
