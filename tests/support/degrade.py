"""What a worse generator does to images, done to real ones: the quality measures must see it. uint8 N, 3, H, W throughout."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter

from pbbench.model.patching import merge, split


def shuffled(images: torch.Tensor, d: int, seed: int = 0) -> torch.Tensor:
    """Every image's d × d patches in another order: patches fine, layout broken."""
    n, c, h, w = images.shape
    patches = split(images, d).view(d * d, n, c, h // d, w // d)  # d² N C h w
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(d * d, generator=generator) for _ in range(n)], dim=1)  # d² N
    return merge(patches[order, torch.arange(n)].flatten(0, 1), d)


def blurred(images: torch.Tensor, radius: float) -> torch.Tensor:
    """Gaussian blur as Pillow does it."""
    pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius)) for image in images)
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Normal noise of ``sigma`` grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def mosaic(images: torch.Tensor, divider: int) -> torch.Tensor:
    """Each patch where it was, of an image drawn for it alone."""
    generator, made = torch.Generator().manual_seed(0), images.clone()
    h, w = images.shape[2] // divider, images.shape[3] // divider
    for row in range(divider):
        for column in range(divider):
            at = (..., slice(row * h, (row + 1) * h), slice(column * w, (column + 1) * w))
            made[at] = images[at][torch.randperm(len(images), generator=generator)]
    return made
