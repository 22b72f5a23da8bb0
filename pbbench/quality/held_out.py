"""The held-out denoising loss: how well a model denoises images it was not trained on, per band of timesteps.

A distance between sets of images cannot rank short runs: their samples are all far away. The training loss on held-out
images can, once its noise is taken out: every model sees the same images, timesteps and noise (from the seed and the image's
index alone), each image meets every band once, and within a band the timesteps are spread evenly over the images.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.model.diffusion import Diffusion
from pbbench.model.sampling import sample_noise
from pbbench.model.unet import PatchUNet
from pbbench.quality.batches import Images, batches, image_shape
from pbbench.quality.intervals import FEWEST, means_left_out, random_groups


@torch.no_grad()
def held_out_loss(
    model: PatchUNet,
    diffusion: Diffusion,
    images: Images,
    *,
    seed: int,
    bands: int = 4,
    batch_size: int = 32,
    patch_batch_size: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The loss of ``model`` (give it the EMA weights) on uint8 ``images``, as ``diffusion`` trains it.

    Returns {"mean": float, "standard_error": float, "left_out": the mean without each group of images (``intervals``),
    "bands": [{"t_min", "t_max" (inclusive), "loss"}, …], "num_images": int, "seed": int}; the mean is over the bands, the error
    that of other images and their noise, None of a single image; no groups are left out of fewer than 40. batch_size and
    patch_batch_size change it by rounding only. Raises InputError for an empty set, one of another size than the model's, or
    a number of bands that does not fit.
    """
    shape = image_shape(images, "held-out images")
    channels, (height, width) = model.config.channels, model.config.size
    if shape != (channels, height, width):
        raise InputError(
            f"the held-out images are {shape[1]}×{shape[2]} with {shape[0]} channels; the model takes {height}×{width} with "
            f"{channels}"
        )
    edges = band_edges(diffusion.config.num_train_timesteps, bands)
    all_t = stratified_timesteps(len(images), edges, seed)  # bands × images
    losses = torch.zeros(bands, len(images), dtype=torch.float64)
    start = 0
    for batch in batches(images, batch_size, "held-out images"):
        x_start = batch.to(device).float() / 127.5 - 1  # N C H W in [−1, 1]
        indices = range(start, start + len(batch))
        for band in range(bands):
            t = all_t[band, start : indices.stop].to(device)  # N
            noise = sample_noise(seed, indices, band, shape, device)  # N C H W
            output = model(diffusion.q_sample(x_start, t, noise), t, patch_batch_size=patch_batch_size)
            pairs = zip(output.split(1), diffusion.target(x_start, t, noise).split(1), strict=True)
            losses[band, start : indices.stop] = torch.stack([diffusion.loss(said, target) for said, target in pairs])
        start = indices.stop
    table = [
        {"t_min": low, "t_max": high - 1, "loss": loss}
        for (low, high), loss in zip(pairwise(edges), losses.mean(1).tolist(), strict=True)
    ]
    of_images, n = losses.mean(0), len(images)
    return {
        "mean": of_images.mean().item(),
        "standard_error": of_images.std().item() / math.sqrt(n) if n > 1 else None,
        "left_out": means_left_out(of_images, random_groups(n, seed)).tolist() if n >= FEWEST else None,
        "bands": table,
        "num_images": n,
        "seed": seed,
    }


def band_edges(num_train_timesteps: int, bands: int) -> list[int]:
    """bands + 1 edges from 0 to T; band b holds edges[b] ≤ t < edges[b + 1]. Raises InputError for none or more than T."""
    if not 1 <= bands <= num_train_timesteps:
        raise InputError(f"{bands} bands do not fit {num_train_timesteps} timesteps; give 1 to {num_train_timesteps}")
    return [num_train_timesteps * band // bands for band in range(bands + 1)]


def stratified_timesteps(num_images: int, edges: list[int], seed: int) -> Tensor:
    """int64 bands × images: within its band, image n's t is drawn from one of ``num_images`` equal strata, one each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for low, high in pairwise(edges):
        stratum = torch.randperm(num_images, generator=generator)
        place = (stratum + torch.rand(num_images, generator=generator, dtype=torch.float64)) / num_images  # in [0, 1)
        rows.append(low + (place * (high - low)).long().clamp(max=high - low - 1))
    return torch.stack(rows)
