"""The held-out denoising loss: how well a model denoises images it was not trained on, per band of timesteps.

A distance between sets of images cannot rank short runs: their samples are all far away. The training loss on held-out
images can, if its noise is taken out: every model sees the same images, timesteps and noise (from the seed and the image's
index alone), and each image meets every band once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.model.diffusion import Diffusion
from pbbench.model.unet import PatchUNet
from pbbench.quality.batches import Images, batches, count, image_shape


def timesteps(num_images: int, num_train_timesteps: int, bands: int, seed: int) -> Tensor:
    """int64 (bands, num_images): for each band one t per image, spread evenly over the band (stratified), in an order drawn
    from the seed. Band b covers T·b/bands ≤ t < T·(b + 1)/bands, rounded down."""
    generator = torch.Generator().manual_seed(seed)
    edges = band_edges(num_train_timesteps, bands)
    rows = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        place = torch.randperm(num_images, generator=generator).double() + torch.rand(num_images, generator=generator).double()
        rows.append(low + (place / num_images * (high - low)).long().clamp(max=high - low - 1))
    return torch.stack(rows)


def band_edges(num_train_timesteps: int, bands: int) -> list[int]:
    """bands + 1 edges from 0 to T. Raises InputError where there are more bands than timesteps, or none."""
    if not 1 <= bands <= num_train_timesteps:
        raise InputError(
            f"{bands} bands of timesteps do not fit {num_train_timesteps} timesteps; give 1 to {num_train_timesteps}"
        )
    return [num_train_timesteps * band // bands for band in range(bands + 1)]


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
    """The loss of ``model`` (pass the EMA model) on uint8 ``images``, in the diffusion's own loss and target.

    Returns {"mean": float, "bands": [{"t_min", "t_max" (inclusive), "loss"}, …], "num_images": int, "seed": int}. The
    result depends on batch_size and patch_batch_size by rounding only. Raises InputError for an empty set or one of
    another size than the model's.
    """
    shape = image_shape(images, "held-out images")
    expected = (model.config.channels, *model.config.size)
    if shape != expected:
        raise InputError(f"the held-out images are {shape} (channels, height, width), the model takes {expected}")
    num_images, edges = count(images), band_edges(diffusion.config.num_train_timesteps, bands)
    all_t = timesteps(num_images, diffusion.config.num_train_timesteps, bands, seed)  # bands N
    elements = num_images * shape[0] * shape[1] * shape[2]
    losses = [0.0] * bands
    start = 0
    for batch in batches(images, batch_size, "held-out images"):
        x_start = (batch.to(device).float() / 127.5) - 1  # N C H W in [-1, 1]
        for band in range(bands):
            noise = torch.stack([_noise(seed, start + n, band, shape) for n in range(len(batch))]).to(device)
            t = all_t[band, start : start + len(batch)].to(device)
            output = model(diffusion.q_sample(x_start, t, noise), t, patch_batch_size=patch_batch_size)
            losses[band] += float(diffusion.loss(output.float(), diffusion.target(x_start, t, noise), total=elements))
        start += len(batch)
    table = [{"t_min": edges[b], "t_max": edges[b + 1] - 1, "loss": losses[b]} for b in range(bands)]
    return {"mean": sum(losses) / bands, "bands": table, "num_images": num_images, "seed": seed}


def _noise(seed: int, index: int, band: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal C, H, W from (seed, image index, band), drawn on the CPU: the same on every device and batch."""
    mixed = (seed * 1_000_003 + index) * 1_009 + band + 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed % 2**63))
