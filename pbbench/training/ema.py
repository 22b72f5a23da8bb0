"""The exponential moving average of the weights: what sampling uses.

Before ``start_step`` the average is a plain copy of the weights; from then on, every ``update_every`` optimizer steps,
average ← decay · average + (1 − decay) · weights. It holds no counters of its own: the step is an argument, from which the
number of updates so far and so the decay of a warm-up follow, and a resumed run needs the averaged weights and nothing else.

It may be kept on the host, or in bfloat16. Rounded to the nearest, a bfloat16 average would stand still: a step is 0.005 of
a difference that is itself small, and the last of 8 bits is 0.004 of the value. So it is rounded up or down with the
probability that makes the mean right, by random numbers that depend on the step alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pbbench.experiment.settings import TrainingConfig
from pbbench.model.placement import arranged
from pbbench.model.unet import PatchUNet


class ExponentialMovingAverage:
    """``model`` is where the average is kept, ``network`` the averaged network to sample from or to save."""

    def __init__(self, model: PatchUNet, training: TrainingConfig) -> None:
        device = next(model.parameters()).device if training.ema_device == "same" else torch.device("cpu")
        self.model = _empty_like(model, device, getattr(torch, training.ema_dtype))
        self.training = training
        every, phase = training.ema_update_every, training.ema_update_phase
        self.last_copy = (max(training.ema_start_step, 1) - 1 - phase) // every * every + phase
        """The last step before the start that an update would have been due after (none where it is not above 0)."""
        _copy(model, self.model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, *, about_to_be_read: bool = False) -> None:
        """After optimizer step ``step`` (counted from 1); ``model`` is the trained network, not its DDP wrapper.

        While the average is a plain copy, it is copied only when someone reads it next: a checkpoint, a sample grid, or
        the first step that averages.
        """
        before, after = (self.training.ema_updates(s) for s in (step - 1, step))
        if step == self.last_copy or (step < self.last_copy and about_to_be_read):
            _copy(model, self.model)
        elif after > before and not about_to_be_read:
            self._average(model, step, self.training.ema_decay_after(before))

    def network(self, device: torch.device | str) -> PatchUNet:
        """The averaged network in float32 on ``device``: ``model`` itself where it is that already, else a copy of it."""
        kept = next(self.model.parameters())
        if kept.dtype == torch.float32 and kept.device.type == torch.device(device).type:
            return self.model
        network = _empty_like(self.model, torch.device(device), torch.float32)
        _copy(self.model, network)
        return network

    def _average(self, model: nn.Module, step: int, decay: float) -> None:
        averages: list[Tensor] = [*self.model.parameters()]
        weights: list[Tensor] = [*model.parameters()]
        if averages[0].dtype == torch.float32 and averages[0].device == weights[0].device:
            torch._foreach_lerp_(averages, weights, 1 - decay)
            return
        generator = torch.Generator(averages[0].device).manual_seed(step)
        for average, weight in zip(averages, weights, strict=True):  # one at a time: temporaries of one parameter's size
            exact = average.float().lerp_(weight.to(average.device), 1 - decay)  # a float32 average is its own float()
            if average.dtype != torch.float32:
                average.copy_(round_randomly(exact, generator))


def round_randomly(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values, finite, rounded to one of their two bfloat16 neighbours, nearer ones more often; x itself is used up.

    The upper 16 bits of a float32 are a bfloat16: a random number below 2^16 added to the lower 16 carries over with the
    probability that they are of the way to the next.
    """
    bits = x.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits &= -(2**16)
    return x.to(torch.bfloat16)


def _empty_like(model: PatchUNet, device: torch.device, dtype: torch.dtype) -> PatchUNet:
    """A network of the same shape, weights not set: made on the meta device, so that no second copy exists meanwhile."""
    with torch.device("meta"):
        network = PatchUNet(model.config)
    return arranged(network.to(dtype).to_empty(device=device)).eval().requires_grad_(False)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    torch._foreach_copy_([*target.parameters()], [*source.parameters()])
