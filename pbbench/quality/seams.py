"""The seam score: do patch borders show in the samples more than the same lines show in real images?

raw = mean absolute difference of the pixel pairs that straddle a patch border / that of all other neighbouring pairs,
vertical and horizontal pairs pooled, all channels. A border that is no seam has a raw figure near 1, but not at 1: in
JPEG photographs some of these lines are the codec's own block borders. Hence score = raw of the samples over raw of the
reference images at the same divider: 1 is "no more seams than the data", whatever the codec did. On 2 × 1,000 CIFAR-10 JPEGs
the score is 1.00 between photographs, 0.86 to 1.00 after a Gaussian blur of radius up to 2, 3.0 to 3.6 after shuffling
the patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.quality.batches import Images, batches, check_pair, image_shape
from pbbench.quality.intervals import FEWEST, NUM_GROUPS, interval, random_groups


def seam_score(samples: Images, reference: Images, patch_divider: int, *, batch_size: int = 256) -> float | None:
    """raw(samples) / raw(reference) at d = ``patch_divider``; None at d = 1. Near 1: no seams; above: seams show.

    Raises InputError where the sets' sizes differ, an image does not divide, or one set has nothing to compare with
    (no difference at all inside the patches, or, in the reference, across their borders).
    """
    if patch_divider == 1:
        return None
    check_pair(samples, reference)
    of_samples = raw_seam(samples, patch_divider, batch_size=batch_size, name="samples")
    of_reference = raw_seam(reference, patch_divider, batch_size=batch_size, name="reference images")
    if of_reference == 0:
        raise InputError("the reference images do not differ across patch borders at all; the seam score is undefined")
    return of_samples / of_reference


def seam_score_interval(
    samples: Images, reference: Images, patch_divider: int, *, batch_size: int = 256, seed: int = 0
) -> list[float] | None:
    """The 95% interval [low, high] of ``seam_score`` over the draw of samples (see ``intervals``); None at d = 1, of too few
    samples, and where it cannot be had because nearly all of them are flat. Raises what ``seam_score`` raises."""
    if patch_divider == 1 or len(samples) < FEWEST:
        return None
    of_reference = raw_seam(reference, patch_divider, batch_size=batch_size, name="reference images")
    sums, pairs = _sums(samples, patch_divider, batch_size, "samples")
    of_groups = torch.zeros(NUM_GROUPS, 2, dtype=torch.int64).index_add_(0, random_groups(len(samples), seed), sums)
    left_out = (sums.sum(0) - of_groups).double() / torch.tensor(pairs)  # G 2
    if not (left_out[:, 1] > 0).all():
        return None
    figure = _ratio(sums.sum(0).tolist(), pairs) / of_reference
    return interval(figure, left_out[:, 0] / left_out[:, 1] / of_reference)


def raw_seam(images: Images, patch_divider: int, *, batch_size: int = 256, name: str = "images") -> float:
    """The raw figure of one set of uint8 images at d = ``patch_divider`` ≥ 2.

    Differences are summed as integers: exact, whatever the batch size. Raises InputError where the images do not divide
    into patches of two pixels or more, or are flat inside every patch.
    """
    sums, pairs = _sums(images, patch_divider, batch_size, name)
    total = sums.sum(0).tolist()
    if total[1] == 0:
        raise InputError(f"the {name} are flat inside their patches; a seam score has nothing to compare their borders with")
    return _ratio(total, pairs)


def _ratio(sums: list[int], pairs: tuple[int, int]) -> float:
    return (sums[0] / pairs[0]) / (sums[1] / pairs[1])


def _sums(images: Images, d: int, batch_size: int, name: str) -> tuple[Tensor, tuple[int, int]]:
    """(int64 N × 2: each image's sums of differences across patch borders and elsewhere; the pairs of each in an image)."""
    channels, height, width = image_shape(images, name)
    if d < 2 or height % d or width % d or min(height, width) < 2 * d:
        raise InputError(
            f"{name} of {height}×{width} do not divide into {d}×{d} patches of two pixels or more; the seam score takes a "
            "divider of 2 or more that does"
        )
    found = []
    for batch in batches(images, batch_size, name):
        sums = torch.zeros(len(batch), 2, dtype=torch.int64)
        for x in (batch, batch.transpose(-1, -2)):  # neighbours along the height, then along the width
            difference = neighbour_difference(x)  # N C H-1 W
            patch = x.shape[2] // d
            at_borders = difference[:, :, patch - 1 :: patch].sum((1, 2, 3))  # of N C d-1 W
            sums += torch.stack([at_borders, difference.sum((1, 2, 3)) - at_borders], dim=1)
        found.append(sums)
    borders = channels * (d - 1) * (height + width)
    everywhere = channels * ((height - 1) * width + (width - 1) * height)
    return torch.cat(found), (borders, everywhere - borders)


def neighbour_difference(x: Tensor) -> Tensor:
    """|x[i + 1] − x[i]| along the height: uint8 N, C, H, W to int16 N, C, H − 1, W."""
    wide = x.to(torch.int16)
    return (wide[:, :, 1:] - wide[:, :, :-1]).abs()
