"""The seam score: do patch borders show in the samples more than the same lines show in real images?

raw = mean absolute difference of the pixel pairs that straddle a patch border / that of all other neighbouring pairs,
vertical and horizontal pairs pooled, all channels. A border that is no seam has a raw figure near 1, but not at 1: in
JPEG photographs some of the lines coincide with the codec's block grid. Hence score = raw of the samples over raw of the
reference images at the same divider: 1 is "no more seams than the data", whatever the codec did.
"""

from __future__ import annotations

from torch import Tensor

from pbbench.errors import InputError
from pbbench.quality.batches import Images, batches, check_pair, image_shape


def raw_seam(images: Images, patch_divider: int, *, batch_size: int = 256) -> float | None:
    """The raw figure of one set of uint8 images at d = ``patch_divider``; None at d = 1 (no borders).

    Differences are summed as integers, so the figure does not depend on the batch size. Raises InputError where the
    image does not divide into d × d patches of at least two pixels, or where no other pair differs (flat images).
    """
    if patch_divider == 1:
        return None
    _, height, width = image_shape(images, "images")
    if height % patch_divider or width % patch_divider or min(height, width) < 2 * patch_divider:
        raise InputError(
            f"images of {height}×{width} do not divide into {patch_divider}×{patch_divider} patches of two pixels or more"
        )
    border_sum = border_pairs = other_sum = other_pairs = 0
    for batch in batches(images, batch_size):
        for x in (batch, batch.transpose(-1, -2)):  # neighbours along the height, then along the width
            difference = neighbour_difference(x)  # N C H-1 W
            at_border = difference[:, :, x.shape[2] // patch_divider - 1 :: x.shape[2] // patch_divider]  # N C d-1 W
            border, everything = int(at_border.sum()), int(difference.sum())
            border_sum, border_pairs = border_sum + border, border_pairs + at_border.numel()
            other_sum, other_pairs = other_sum + everything - border, other_pairs + difference.numel() - at_border.numel()
    if other_sum == 0:
        raise InputError("the images are flat inside their patches; a seam score has nothing to compare borders with")
    return (border_sum / border_pairs) / (other_sum / other_pairs)


def neighbour_difference(x: Tensor) -> Tensor:
    """|x[i + 1] − x[i]| along the height of uint8 N, C, H, W, as int16 N, C, H − 1, W."""
    wide = x.short()
    return (wide[:, :, 1:] - wide[:, :, :-1]).abs()


def seam_score(samples: Images, reference: Images, patch_divider: int, *, batch_size: int = 256) -> float | None:
    """raw(samples) / raw(reference) at d = ``patch_divider``; None at d = 1. Near 1: no seams; above: seams show.

    Raises InputError where the sets' sizes differ or an image does not divide.
    """
    if patch_divider == 1:
        return None
    check_pair(samples, reference, at_least=1)
    raw_samples = raw_seam(samples, patch_divider, batch_size=batch_size)
    raw_reference = raw_seam(reference, patch_divider, batch_size=batch_size)
    assert raw_samples is not None and raw_reference is not None
    if raw_reference == 0:
        raise InputError("the reference images have no difference across patch borders at all; the seam score is undefined")
    return raw_samples / raw_reference
