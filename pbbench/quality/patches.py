"""Patches at full resolution, for the patch-level Frechet distance.

Inception sees every image at 299 × 299, so of a larger one the fine detail is gone before its features are taken; a patch cut
out at the image's own pixels keeps it (as in the patch FID of Chai et al. 2022, "Any-resolution training").

One size serves all dividers, so that their figures compare. The places are random, drawn from the image's index alone: a fixed
grid would have its lines where some dividers have their patch borders, and would never show those seams.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PATCHES_PER_IMAGE = 4
SMALLEST = 8
"""Pixels: patches with a shorter side are not scored."""
SEED = 0


def patch_size(height: int, width: int) -> tuple[int, int]:
    """A quarter of each side, but 32 pixels where that is more, and never above half: 32 × 32 of 128², 16 × 16 of 32²."""
    return min(max(height // 4, 32), height // 2), min(max(width // 4, 32), width // 2)


def cut_patches(batch: Tensor, first: int) -> Tensor:
    """Images ``first`` and on of a set, N, C, H, W, to N · 4, C, h, w: the four of an image one after another."""
    height, width = batch.shape[-2:]
    h, w = patch_size(height, width)
    generator = np.random.default_rng(SEED)
    generator.bit_generator.advance(first * PATCHES_PER_IMAGE * 2)  # type: ignore[attr-defined]  # one step a number
    places = generator.random((len(batch), PATCHES_PER_IMAGE, 2))  # in [0, 1)
    top, left = (places * (height - h + 1, width - w + 1)).astype(int).transpose(2, 0, 1)  # N 4 each
    cut = [
        image[:, y : y + h, x : x + w]
        for image, ys, xs in zip(batch, top.tolist(), left.tolist(), strict=True)
        for y, x in zip(ys, xs, strict=True)
    ]
    return torch.stack(cut)


def description(height: int, width: int) -> str:
    """The cut in words: what a figure rests on and what keys its cached features."""
    h, w = patch_size(height, width)
    return f"{PATCHES_PER_IMAGE} patches of {h}×{w} an image, at random places (seed {SEED})"
