"""The two steps a sweep measures and a prediction traces: one place builds them, so that both see the same work.

``train_step`` and ``sample_step`` are the very functions that training and sampling run; here they only get their arguments.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pbbench.experiment.experiment import Experiment
from pbbench.memory.prediction.fake import Step
from pbbench.model.diffusion import Diffusion
from pbbench.model.placement import arranged, cast_weights
from pbbench.model.sampling import autocast, sample_step
from pbbench.model.unet import PatchUNet
from pbbench.sweep.grid import Cell


@dataclass
class Workload(Step):
    """A step to run again and again, what exists before it, and how many images one run of it handles."""

    images: int = 1


def build_model(experiment: Experiment, device: torch.device) -> PatchUNet:
    """The network of ``experiment.model``, made where it stays (fake tensors cannot be moved). Its weights are random."""
    with device:
        return arranged(PatchUNet(experiment.model))


def _images(experiment: Experiment, cell: Cell, device: torch.device) -> Tensor:
    height, width = experiment.model.size
    return torch.rand(cell.batch_size, experiment.model.channels, height, width, device=device) * 2 - 1  # N, C, H, W


def _average(experiment: Experiment, model: PatchUNet, device: torch.device) -> list[Tensor]:
    """The averaged weights that lie in ``device``'s memory during a step; none where they are kept in the host's.

    On "cpu", which also stands for a GPU that is not there (a prediction), they are the host's only where the experiment does
    not itself run on the CPU.
    """
    section = experiment.training
    if section.ema_device == "cpu" and (device.type != "cpu" or experiment.device != "cpu"):
        return []
    dtype = getattr(torch, section.ema_dtype)
    return [torch.empty_like(parameter, dtype=dtype, requires_grad=False) for parameter in model.parameters()]


def sampling_workload(experiment: Experiment, cell: Cell, device: torch.device) -> Workload:
    """One denoising step of ``cell.batch_size`` images at t = T/2, with the noise it adds."""
    model = cast_weights(build_model(experiment, device), cell.mixed_precision).eval().requires_grad_(False)
    diffusion = Diffusion(experiment.diffusion, device)
    x_t, noise = _images(experiment, cell, device), _images(experiment, cell, device)
    t = torch.full((cell.batch_size,), experiment.diffusion.num_train_timesteps // 2, device=device)

    def step() -> None:
        with torch.no_grad(), autocast(device, cell.mixed_precision):
            sample_step(model, diffusion, x_t, t, noise, cell.patch_batch_size)

    return Workload(step, model, inputs=(x_t, t, noise), images=cell.batch_size)


class FlopCount(TorchDispatchMode):
    """Floating-point operations (a multiply-add is two) by torch's own formulas, without FlopCounterMode's module tracking,
    which costs more than the step itself. ``total`` grows while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def training_workload(experiment: Experiment, cell: Cell, device: torch.device) -> Workload:
    """One optimizer step: every micro-batch, the update, and the average of the weights held beside it."""
    from pbbench.training.optimizers import build_optimizer
    from pbbench.training.setup import build_accelerator
    from pbbench.training.train import train_step

    section = experiment.training.model_copy(update={"mixed_precision": cell.mixed_precision, "trackers": ()})
    experiment = experiment.model_copy(update={"training": section})
    accelerator = build_accelerator(experiment, device.type)
    bare = build_model(experiment, device).set_recompute(section.recompute)
    ema = _average(experiment, bare, device)
    model = accelerator.prepare_model(bare, device_placement=False)
    optimizer = accelerator.prepare_optimizer(build_optimizer(bare, experiment.training), device_placement=False)
    diffusion = Diffusion(experiment.diffusion, device)
    x_start, noise = _images(experiment, cell, device), _images(experiment, cell, device)
    t = torch.randint(0, experiment.diffusion.num_train_timesteps, (cell.batch_size,), device=device)
    section = experiment.training

    def step() -> None:
        for _ in range(section.gradient_accumulation_steps):
            with accelerator.accumulate(model) if section.gradient_accumulation_steps > 1 else nullcontext():
                train_step(
                    model,
                    x_start,
                    t,
                    noise,
                    diffusion=diffusion,
                    optimizer=optimizer,
                    accelerator=accelerator,
                    patch_batch_size=cell.patch_batch_size,
                    max_grad_norm=section.max_grad_norm,
                )

    images = cell.batch_size * section.gradient_accumulation_steps
    inner = getattr(optimizer, "optimizer", optimizer)
    return Workload(step, bare, inner, inputs=(x_start, t, noise), ema=ema, images=images)
