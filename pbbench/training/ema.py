"""The exponential moving average of the weights: what sampling uses.

Before ``start_step`` the average is a plain copy of the weights; from then on, every ``update_every`` optimizer steps,
average ← decay · average + (1 − decay) · weights. It holds no counters of its own: the step is an argument, so a resumed
run needs the averaged weights and nothing else.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from pbbench.config import TrainingConfig
from pbbench.model.unet import PatchUNet


class ExponentialMovingAverage:
    """``model`` is the averaged network: the same class and device as the trained one, without gradients."""

    def __init__(self, model: PatchUNet, training: TrainingConfig) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = training.ema_decay
        self.update_every = training.ema_update_every
        self.start_step = training.ema_start_step

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, *, about_to_be_read: bool = False) -> None:
        """After optimizer step ``step`` (counted from 1); ``model`` is the trained network, not its DDP wrapper.

        While the average is a plain copy, it is copied only when someone reads it next: a checkpoint, a sample grid, or
        the first step that averages.
        """
        if step < self.start_step:
            if about_to_be_read or step == self.start_step - 1:
                torch._foreach_copy_(_tensors(self.model), _tensors(model))
        elif step % self.update_every == 0 and not about_to_be_read:
            torch._foreach_lerp_(_tensors(self.model), _tensors(model), 1 - self.decay)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, then buffers, in the order of their definition."""
    return [*model.parameters(), *model.buffers()]
