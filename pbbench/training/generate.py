"""From a checkpoint to images: batches of uint8 samples, and a folder of PNG files.

The image of an index is the same whatever the batch: its noise comes from (seed, image index, step).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbbench.config import Experiment, SamplingConfig, merge, parse_experiment
from pbbench.errors import InputError, one_line
from pbbench.model.diffusion import Diffusion
from pbbench.model.sampling import sample, to_uint8
from pbbench.model.unet import PatchUNet


def generate(
    model: PatchUNet,
    diffusion: Diffusion,
    config: SamplingConfig,
    num_images: int,
    device: torch.device,
    progress: Callable[[dict[str, Any]], None] = lambda state: None,
) -> list[Tensor]:
    """Images 0 … num_images − 1 of ``config.seed`` as uint8 tensors (C, H, W) on the CPU."""
    images: list[Tensor] = []
    started = time.perf_counter()
    for first in range(0, num_images, config.batch_size):
        indices = range(first, min(first + config.batch_size, num_images))
        x = sample(model, diffusion, config, indices, device=device)  # N, C, H, W
        images += to_uint8(x, config.to_uint8).cpu().unbind()
        elapsed = time.perf_counter() - started
        rate = len(images) / elapsed
        progress(
            {
                "step": len(images),
                "num_steps": num_images,
                "images_per_second": rate,
                "seconds_left": (num_images - len(images)) / rate,
            }
        )
    return images


def sample_settings(experiment: Experiment, overrides: Iterable[dict[str, Any]]) -> Experiment:
    """A checkpoint's experiment with options laid on. Raises InputError for a value that does not fit."""
    values = experiment.model_dump(mode="json")
    for override in overrides:
        values = merge(values, override)
    changed = parse_experiment(values, "options laid on the checkpoint's settings")
    if changed.model != experiment.model or changed.diffusion != experiment.diffusion:
        raise InputError("a checkpoint's model and diffusion cannot be changed when sampling; only sampling.* can")
    return changed


def sample_to_folder(
    checkpoint: Path, num_images: int, out: Path, overrides: Iterable[dict[str, Any]], device_name: str
) -> Path:
    """Write ``num_images`` PNG files, 000000.png and on, into ``out``, which must be empty or new. Returns ``out``."""
    from pbbench.training.checkpoint import load_model

    device = torch.device(device_name)
    model, experiment = load_model(checkpoint, device)
    experiment = sample_settings(experiment, overrides)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not an empty folder; choose another, nothing is written over")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {one_line(error)}") from None
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sampling", total=num_images)
        diffusion = Diffusion(experiment.diffusion, device)
        images = generate(
            model, diffusion, experiment.sampling, num_images, device, lambda state: bar.update(task, completed=state["step"])
        )
    save_images(images, out)
    return out


def save_images(images: Iterable[Tensor], folder: Path) -> None:
    """uint8 (C, H, W) as 000000.png and on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        save_png(image, folder / f"{index:06}.png")


def save_png(image: Tensor, path: Path) -> None:
    """One uint8 (C, H, W) image of one or three channels."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)
