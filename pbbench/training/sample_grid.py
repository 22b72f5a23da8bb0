"""A grid of samples on the way: what the averaged weights draw so far, as one PNG."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch

from pbbench.experiment.experiment import Experiment
from pbbench.model.diffusion import Diffusion
from pbbench.model.sampling import sample, to_uint8
from pbbench.model.unet import PatchUNet
from pbbench.records.files import write_bytes


def save_sample_grid(path: Path, model: PatchUNet, diffusion: Diffusion, experiment: Experiment, accelerator: Any) -> None:
    """Draw ``training.num_grid_samples`` images as ``experiment.sampling`` says and save them, in rows, as a PNG.

    Every process draws its share, so that none waits long; noise comes from the image's index, so the grid does not depend
    on their number. To be called by all processes; the main one writes.
    """
    settings, count = experiment.sampling, experiment.training.num_grid_samples
    share = math.ceil(count / accelerator.num_processes)  # some draw beyond the grid's end; those are dropped
    first = share * accelerator.process_index
    drawn = []
    for start in range(first, first + share, settings.batch_size):
        indices = range(start, min(start + settings.batch_size, first + share))
        images = sample(model, diffusion, settings, indices, device=accelerator.device)
        drawn.append(to_uint8(images, settings.to_uint8))
    gathered = accelerator.gather(torch.cat(drawn))  # uint8, processes · share, C, H, W
    if accelerator.is_main_process:
        write_grid(path, gathered[:count].cpu())


def write_grid(path: Path, images: torch.Tensor) -> None:
    """uint8 images N C H W, nearly square, one grey pixel between them. One channel is grey, three are colour."""
    from PIL import Image

    N, C, H, W = images.shape
    columns = math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    canvas = torch.full((C, rows * (H + 1) + 1, columns * (W + 1) + 1), 128, dtype=torch.uint8)
    for n, image in enumerate(images):
        top, left = n // columns * (H + 1) + 1, n % columns * (W + 1) + 1
        canvas[:, top : top + H, left : left + W] = image
    pixels = canvas[0] if C not in (3, 4) else canvas.permute(1, 2, 0)
    encoded = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(encoded, "PNG")
    write_bytes(path, encoded.getvalue())
