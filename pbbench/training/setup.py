"""What training starts from: the network, the accelerator, the random numbers, and a folder that may be written to."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pbbench.errors import InputError, one_line
from pbbench.experiment.experiment import Experiment, differences, parse_experiment
from pbbench.experiment.presets import load_experiment
from pbbench.model.placement import arranged
from pbbench.model.unet import PatchUNet
from pbbench.training.checkpoint import last_good, read_config


def build_network(experiment: Experiment, device: str | torch.device = "cpu") -> PatchUNet:
    """The network with weights drawn from ``experiment.seed``: on the CPU, so that they are the same for every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        return arranged(PatchUNet(experiment.model).set_recompute(experiment.training.recompute).to(device))


def build_accelerator(experiment: Experiment, device: str | torch.device = "auto", *, out: Path | None = None) -> Any:
    """The ``accelerate.Accelerator`` of an experiment on "auto", "cpu" or "cuda"; trackers log below ``out``.

    Raises InputError where the device is not there or a tracker's package is not installed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    section = experiment.training
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu").type if device == "auto" else torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch finds no CUDA GPU here; use --device cpu, or auto")
    trackers = section.trackers if out is not None else ()
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"training.trackers: {name} is not installed; pip install 'pbbench[{name}]'")
    # accelerate keeps its state per process; an earlier training may have had another precision or device.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(
        device_placement=False,  # the caller places its model; moving one again fails on fake tensors
        cpu=kind == "cpu",
        mixed_precision=section.mixed_precision,
        # As a plugin, because the environment of accelerate launch overrides the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=section.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=list(trackers) or None,
        project_dir=str(out) if trackers else None,
    )
    if section.mixed_precision == "fp16" and kind == "cpu":  # accelerate would quietly compute in float32
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def settle_gradient_buckets(model: nn.Module, experiment: Experiment, device: torch.device) -> None:
    """One backward pass of one black patch whose gradients are thrown away; ``model`` is wrapped by DDP.

    DDP orders the gradients it exchanges anew after its first backward, and among more than two processes their place decides
    in which order they are added up. Were that a training step, a resumed run would round its own first one differently.
    """
    x_t = torch.zeros(1, experiment.model.channels, *experiment.model.size, device=device)  # 1 C H W
    model(x_t, torch.zeros(1, dtype=torch.int64, device=device), rows=slice(0, 1)).sum().backward()
    model.zero_grad(set_to_none=True)


def draw_noise(
    seed: int, first: int, count: int, shape: tuple[int, ...], num_train_timesteps: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Timesteps (N, int64) and noise (N, *shape) of the training images number ``first`` … ``first + count`` − 1 of a run.

    Each image's come from (seed, its number) alone: the same on resuming, on any device, and for N processes as for one
    with the N-fold batch. Drawn on the CPU; torch's generator takes 32 bits of a seed, hence numbers and not hashes, which
    would collide.
    """
    pinned = device.type == "cuda"
    t = torch.empty(count, dtype=torch.int64, pin_memory=pinned)
    noise = torch.empty(count, *shape, pin_memory=pinned)  # N C H W
    offset = int.from_bytes(hashlib.blake2b(f"training noise {seed}".encode(), digest_size=4).digest(), "big")
    generator = torch.Generator()
    for n in range(count):
        generator.manual_seed((offset + first + n) % 2**32)
        torch.randint(0, num_train_timesteps, (), generator=generator, out=t[n])
        torch.randn(shape, generator=generator, out=noise[n])
    return t.to(device, non_blocking=True), noise.to(device, non_blocking=True)


_MAY_DIFFER = (
    "name", "device", "sampling.", "quality.", "sweep.", "slurm.", "data.source", "data.num_workers", "training.num_steps",
    "training.max_seconds", "training.save_every", "training.keep_checkpoints", "training.keep_every", "training.sample_every",
    "training.num_grid_samples", "training.trackers", "training.patch_batch_size", "training.recompute", "training.ema_device",
)  # fmt: skip
"""Settings that a resumed run may change: its weights are the same within rounding. ``data.source`` may be moved or prepared;
that it holds the same images is known by their fingerprint."""


def check_folder(out: Path, experiment: Experiment, resume: bool) -> Path | None:
    """The checkpoint to go on from; None to begin. Raises InputError where ``out`` holds anything else."""
    try:
        if not out.exists():
            return None
        if not out.is_dir():
            raise InputError(f"{out} is a file; name a new folder for the run")
        if not any(out.iterdir()):
            return None
    except OSError as error:
        raise InputError(f"cannot read {out} ({one_line(error)}); name another folder") from None
    if not resume:
        raise InputError(f"{out} is not empty; go on with --resume, or name a new folder")
    if not (out / "experiment.toml").is_file():
        raise InputError(f"{out} is not the folder of a training run (no experiment.toml); name another")
    saved = last_good(out)
    if saved is not None:
        config = read_config(saved)
        old = parse_experiment(config["experiment"], str(saved / "config.json"))
    else:
        config, old = {"step": 0}, load_experiment(out / "experiment.toml")
    changed = [line for line in differences(old, experiment) if not line.startswith(_MAY_DIFFER)]
    if changed:
        raise InputError(f"{out} was begun with other settings ({'; '.join(changed)}); resume with those, or name a new folder")
    num_steps = experiment.training.num_steps
    if config["step"] > num_steps:
        raise InputError(f"{out} is at step {config['step']}; raise training.num_steps, which is {num_steps}")
    return saved
