"""The optimizers: how each is built, and the state that a checkpoint holds of it; ``OPTIMIZERS`` is the place to add one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pbbench.experiment.settings import TrainingConfig


@dataclass(frozen=True)
class Entry:
    kind: type[torch.optim.Optimizer]
    build: Callable[[Iterable[nn.Parameter], TrainingConfig], torch.optim.Optimizer]
    state: Callable[[dict[str, Any], nn.Parameter], dict[str, Tensor]]
    """(parameter group, parameter) → tensors as its first step makes them, to be filled from a checkpoint."""


def _adam(parameters: Iterable[nn.Parameter], training: TrainingConfig) -> torch.optim.Adam:
    """As released. Fused: one pass over each parameter without temporaries of its size, and no wait under fp16."""
    return torch.optim.Adam(parameters, lr=training.learning_rate, fused=True)


def _adam_state(group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Tensor]:
    on_device = group.get("fused") or group.get("capturable")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


OPTIMIZERS = {"adam": Entry(torch.optim.Adam, _adam, _adam_state)}


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of ``model``'s parameters."""
    return OPTIMIZERS["adam"].build(model.parameters(), training)


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that the first step would."""
    entry = next(entry for entry in OPTIMIZERS.values() if type(optimizer) is entry.kind)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = entry.state(group, parameter)
