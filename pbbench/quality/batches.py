"""Images for the quality measures: batches of uint8 N, C, H, W out of any Dataset of uint8 C, H, W tensors, checked.

Every measure reads its images through here, in order, one batch in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pbbench.errors import InputError

Images = Dataset[Tensor]
"""A sized Dataset of uint8 C, H, W tensors of one size (training.data.ImageSet is one)."""


def count(images: Images) -> int:
    return len(images)  # type: ignore[arg-type]


def image_shape(images: Images, name: str) -> tuple[int, int, int]:
    """(C, H, W) of the first image. Raises InputError where the set is empty or holds something else than uint8 images."""
    if count(images) == 0:
        raise InputError(f"the {name} are empty: there is no image to score")
    image = images[0]
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        kind = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"the {name} must be uint8 tensors of shape (channels, height, width); the first is {kind}")
    channels, height, width = image.shape
    return channels, height, width


def check_pair(samples: Images, reference: Images, at_least: int = 2) -> tuple[int, int, int]:
    """The common (C, H, W) of two sets. Raises InputError where either has too few images or their sizes differ:
    an extractor would resize each on its own, and the score would then measure the resizing."""
    for images, name in ((samples, "samples"), (reference, "reference images")):
        if 0 < count(images) < at_least:
            raise InputError(
                f"{count(images)} image in the {name}; at least {at_least} are needed for a distance between two sets"
            )
    shape, other = image_shape(samples, "samples"), image_shape(reference, "reference images")
    if shape != other:
        raise InputError(
            f"the samples are {_text(shape)} and the reference images {_text(other)}; resize one set to the other's size first"
        )
    return shape


def batches(images: Images, batch_size: int, name: str = "images") -> Iterator[Tensor]:
    """Batches of uint8 N, C, H, W in order. Raises InputError, naming the index, where an image's size is another."""
    shape = image_shape(images, name)
    for start in range(0, count(images), batch_size):
        batch = [images[index] for index in range(start, min(start + batch_size, count(images)))]
        for offset, image in enumerate(batch):
            if image.shape != shape:
                raise InputError(f"image {start + offset} of the {name} is {_text(image.shape)}, the first is {_text(shape)}")
        yield torch.stack(batch)  # N C H W


def _text(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}×{width} with {channels} channel{'s' if channels != 1 else ''}"
