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


def raw_seam(images: Images, patch_divider: int, *, batch_size: int = 256, name: str = "images") -> float:
    """The raw figure of one set of uint8 images at d = ``patch_divider`` ≥ 2.

    Differences are summed as integers: exact, whatever the batch size. Raises InputError where the images do not divide
    into patches of two pixels or more, or are flat inside every patch.
    """
    d = patch_divider
    _, height, width = image_shape(images, name)
    if d < 2 or height % d or width % d or min(height, width) < 2 * d:
        raise InputError(
            f"{name} of {height}×{width} do not divide into {d}×{d} patches of two pixels or more; the seam score takes a "
            "divider of 2 or more that does"
        )
    border_sum = border_pairs = other_sum = other_pairs = 0
    for batch in batches(images, batch_size, name):
        for x in (batch, batch.transpose(-1, -2)):  # neighbours along the height, then along the width
            difference = neighbour_difference(x)  # N C H-1 W
            patch = x.shape[2] // d
            border = difference[:, :, patch - 1 :: patch]  # N C d-1 W
            at_borders, everywhere = int(border.sum()), int(difference.sum())
            border_sum, border_pairs = border_sum + at_borders, border_pairs + border.numel()
            other_sum, other_pairs = other_sum + everywhere - at_borders, other_pairs + difference.numel() - border.numel()
    if other_sum == 0:
        raise InputError(f"the {name} are flat inside their patches; a seam score has nothing to compare their borders with")
    return (border_sum / border_pairs) / (other_sum / other_pairs)


def neighbour_difference(x: Tensor) -> Tensor:
    """|x[i + 1] − x[i]| along the height: uint8 N, C, H, W to int16 N, C, H − 1, W."""
    wide = x.to(torch.int16)
    return (wide[:, :, 1:] - wide[:, :, :-1]).abs()
