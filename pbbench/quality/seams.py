"""Seams: do patch borders show in the samples more than the same lines show in real images? Two figures, at the lines of one d.

**Score**: raw = mean absolute difference of the pixel pairs that straddle a patch border / that of all other neighbouring
pairs, vertical and horizontal pairs pooled, all channels; score = raw of the samples over raw of the reference images. A
border that is no seam has a raw figure near 1, but not at 1: in JPEG photographs some of these lines are the codec's own
block borders. 1 is "no more seams than the data". Being a ratio it is blind in noise (steps of 20 grey levels between the
patches: 1.75, with pixel noise of σ = 40 on top 0.99), and a blur, which makes what lies between the borders smoother, raises
it.

**Excess**: Δ = mean squared difference of the pairs at borders − that of all other pairs; excess = √(Δ of the samples − Δ of
the reference), with the sign of what is under the root: the root-mean-square step at a border, in grey levels, beyond what
the data have there. Noise adds 2σ² to both means and so cancels. A blur across the borders does make it smaller.

Neither is 0 or 1 by itself at d = 1: the undivided model's figures at the lines of d are what a divider's are to be held
against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.quality.batches import Images, batches, check_pair, image_shape
from pbbench.quality.intervals import FEWEST, NUM_GROUPS, interval, random_groups


def seam_figures(
    samples: Images, reference: Images, patch_divider: int, *, batch_size: int = 256, seed: int = 0
) -> dict[str, Any]:
    """Both figures at the lines of d = ``patch_divider`` ≥ 2, whatever made the samples.

    Returns {"seam_score", "seam_excess" (grey levels of 255), "seam_excess_square" (what is under its root), the 95%
    intervals over the draw of samples of the first two as ``NAME_interval``, and "left_out": the score and the square without
    each group of samples (``intervals``)}. No intervals of fewer than 40 samples, nor where nearly all of them are flat.

    Raises InputError where the sets' sizes differ, an image does not divide, or one set has nothing to compare with (no
    difference at all inside the patches, or, in the reference, across their borders).
    """
    check_pair(samples, reference)
    reference_sums, pairs = _sums(reference, patch_divider, batch_size, "reference images")
    sums, _ = _sums(samples, patch_divider, batch_size, "samples")
    known = _Figures(reference_sums.sum(0), len(reference), pairs)
    if known.raw("reference images") == 0:
        raise InputError("the reference images do not differ across patch borders at all; the seam score is undefined")

    def against(sums: Tensor, count: Any) -> tuple[Tensor, Tensor]:
        here = _Figures(sums, count, pairs)
        return here.raw("samples") / known.raw("reference images"), here.excess_square() - known.excess_square()

    score, square = against(sums.sum(0), len(samples))
    found: dict[str, Any] = {"seam_score": score.item(), "seam_excess": _signed_root(square.item())}
    found |= {"seam_excess_square": square.item(), "seam_score_interval": None, "seam_excess_interval": None, "left_out": {}}
    groups = random_groups(len(samples), seed)
    kept = sums.sum(0) - torch.zeros(NUM_GROUPS, 4, dtype=torch.int64).index_add_(0, groups, sums)  # G 4
    if len(samples) >= FEWEST and (kept[:, 1] > 0).all():
        scores, squares = against(kept, len(samples) - groups.bincount(minlength=NUM_GROUPS))
        found["seam_score_interval"] = interval(found["seam_score"], scores)
        found["seam_excess_interval"] = [_signed_root(end) for end in interval(square.item(), squares)]
        found["left_out"] = {"seam_score": scores.tolist(), "seam_excess_square": squares.tolist()}
    return found


def raw_seam(images: Images, patch_divider: int, *, batch_size: int = 256, name: str = "images") -> float:
    """The raw figure of one set of uint8 images at d = ``patch_divider`` ≥ 2.

    Differences are summed as integers: exact, whatever the batch size. Raises InputError where the images do not divide
    into patches of two pixels or more, or are flat inside every patch.
    """
    sums, pairs = _sums(images, patch_divider, batch_size, name)
    return _Figures(sums.sum(0), len(images), pairs).raw(name).item()


@dataclass(frozen=True)
class _Figures:
    """Of one set of images, or of several at once."""

    sums: Tensor
    """int64 … × 4: of differences at borders, of all others; of their squares likewise."""
    num_images: Any
    pairs: tuple[int, int]
    """Pairs of each in an image."""

    def raw(self, name: str) -> Tensor:
        if not (self.sums[..., 1] > 0).all():
            raise InputError(
                f"the {name} are flat inside their patches; a seam score has nothing to compare their borders with"
            )
        return (self.sums[..., 0].double() / self.pairs[0]) / (self.sums[..., 1].double() / self.pairs[1])

    def excess_square(self) -> Tensor:
        """Δ, in grey levels squared."""
        at_borders, elsewhere = (self.sums[..., 2 + k].double() / (self.pairs[k] * self.num_images) for k in range(2))
        return at_borders - elsewhere


def _signed_root(x: float) -> float:
    return math.copysign(math.sqrt(abs(x)), x)


def _sums(images: Images, d: int, batch_size: int, name: str) -> tuple[Tensor, tuple[int, int]]:
    """(int64 N × 4: each image's sums of differences across patch borders and elsewhere, and of their squares; the pairs of
    each in an image)."""
    channels, height, width = image_shape(images, name)
    if d < 2 or height % d or width % d or min(height, width) < 2 * d:
        raise InputError(
            f"{name} of {height}×{width} do not divide into {d}×{d} patches of two pixels or more; the seam score takes a "
            "divider of 2 or more that does"
        )
    found = []
    for batch in batches(images, batch_size, name):
        sums = torch.zeros(len(batch), 4, dtype=torch.int64)
        for x in (batch, batch.transpose(-1, -2)):  # neighbours along the height, then along the width
            difference = neighbour_difference(x).int()  # N C H-1 W
            patch = x.shape[2] // d
            for first, of_pairs in ((0, difference), (2, difference * difference)):
                at_borders = of_pairs[:, :, patch - 1 :: patch].sum((1, 2, 3))  # of N C d-1 W
                sums[:, first] += at_borders
                sums[:, first + 1] += of_pairs.sum((1, 2, 3)) - at_borders
        found.append(sums)
    borders = channels * (d - 1) * (height + width)
    everywhere = channels * ((height - 1) * width + (width - 1) * height)
    return torch.cat(found), (borders, everywhere - borders)


def neighbour_difference(x: Tensor) -> Tensor:
    """|x[i + 1] − x[i]| along the height: uint8 N, C, H, W to int16 N, C, H − 1, W."""
    wide = x.to(torch.int16)
    return (wide[:, :, 1:] - wide[:, :, :-1]).abs()
