"""Images for the quality measures: batches of uint8 N, C, H, W out of any set of uint8 C, H, W tensors, checked.

Every measure reads its images through here, in order; the next batch is decoded while the current one is worked on.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from pbbench.errors import InputError


class Images(Protocol):
    """A sequence of uint8 C, H, W tensors of one size: ``data.images.ImageSet``, any such Dataset, or a list. A set that
    holds only a process's share of its images states their (C, H, W) as ``image_shape``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def image_shape(images: Images, name: str) -> tuple[int, int, int]:
    """(C, H, W) of the first image. Raises InputError where the set is empty or holds something else than uint8 images."""
    if len(images) == 0:
        raise InputError(f"the {name} are empty: there is no image to score")
    stated: tuple[int, int, int] | None = getattr(images, "image_shape", None)
    if stated is not None:
        return stated
    image = images[0]
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        kind = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"the {name} must be uint8 tensors of shape (channels, height, width); the first is {kind}")
    channels, height, width = image.shape
    return channels, height, width


def check_pair(samples: Images, reference: Images, at_least: int = 1) -> tuple[int, int, int]:
    """The common (C, H, W) of two sets. Raises InputError where either has too few images or their sizes differ:
    an extractor would resize each on its own, and the score would then measure the resizing."""
    shape, other = image_shape(samples, "samples"), image_shape(reference, "reference images")
    for images, name in ((samples, "samples"), (reference, "reference images")):
        if len(images) < at_least:
            raise InputError(f"the {name} are too few: {len(images)}; a distance between sets takes at least {at_least}")
    if shape != other:
        raise InputError(
            f"the samples are {_text(shape)} and the reference images {_text(other)}; bring one set to the other's size first"
        )
    return shape


def batches(images: Images, batch_size: int, name: str = "images", share: range | None = None) -> Iterator[Tensor]:
    """Batches of uint8 N, C, H, W in order, of the images numbered ``share`` (None: all). Raises InputError, naming the index,
    where an image's size is another."""
    shape = image_shape(images, name)
    share = range(len(images)) if share is None else share
    if not share:
        return

    def read(start: int) -> Tensor:
        batch = [images[index] for index in range(start, min(start + batch_size, share.stop))]
        for offset, image in enumerate(batch):
            if image.shape != shape:
                raise InputError(f"image {start + offset} of the {name} is {_text(image.shape)}, the first is {_text(shape)}")
        return torch.stack(batch)  # N C H W

    with ThreadPoolExecutor(1) as ahead:
        starts = share[::batch_size]
        following = ahead.submit(read, share.start)
        for start in starts:
            batch = following.result()
            if start != starts[-1]:
                following = ahead.submit(read, start + batch_size)
            yield batch


def _text(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}×{width} with {channels} channel{'s' if channels != 1 else ''}"
