"""How far a distance would move if other samples were drawn: 95% intervals by the grouped jackknife.

The samples fall at random into 20 groups, and the distance θ is computed 20 times with one of them left out (the patches of
an image go together). Its variance is (G − 1) / G · Σ (θ_g − mean)², the interval θ ± t · √variance with Student's t at G − 1
degrees of freedom (Shao and Tu 1995, "The Jackknife and Bootstrap", section 2.3; Kott 2001, "The delete-a-group jackknife").

The usual bootstrap would be wrong here: of N images drawn with repetition only 63% are distinct, and a Frechet distance grows
as the number of distinct images falls (its bias goes with 1/N; Chong and Forsyth 2020), so that every resampled figure lies
above the one it should surround. Leaving out repeats no image, and the little that N falls by shifts all θ_g alike.

An interval is about the mean of the figure of its name: of FID-10k over all draws of 10,000 samples of the same model. The
reference images are the yardstick and are taken as they are; the bias of N samples and the difference that another training
makes are not in it. The 20 figures themselves are kept: two models that drew the same images from the same noise move
together, and the difference of their figures, group by group, has an interval of its own (``records.uncertainty``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pbbench.records.uncertainty import NUM_GROUPS, jackknife_variance, student_t

FEWEST = 2 * NUM_GROUPS
"""Images: with fewer there is no interval."""
TOO_FEW = f"takes {FEWEST} samples or more"


def random_groups(num_images: int, seed: int) -> Tensor:
    """int64 N: the group of each image. At random, because the files of a folder may lie class by class."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed)) % NUM_GROUPS


def interval(figure: float, left_out: Tensor, other_variance: float = 0.0) -> list[float]:
    """[low, high] around ``figure``, given it NUM_GROUPS times with one group left out; ``other_variance`` is added."""
    reach = student_t(NUM_GROUPS - 1) * math.sqrt(jackknife_variance(left_out.tolist()) + other_variance)
    return [figure - reach, figure + reach]


def means_left_out(values: Tensor, groups: Tensor) -> Tensor:
    """The mean of N values, float64, once without each group."""
    sums = torch.zeros(NUM_GROUPS, dtype=torch.float64).index_add_(0, groups, values.double())
    return (values.double().sum() - sums) / (len(values) - groups.bincount(minlength=NUM_GROUPS))


def frechet_left_out(samples: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    """The Frechet distance of samples (N × D) and reference (M × D), float64, once without each group of samples.

    With R = FᵀF the reference's covariance, tr (ΣR)^½ is the sum of the singular values of the centred samples times Fᵀ over
    √(N − 1): one symmetric eigenvalue problem of the smallest of N, M and D a group, and no square root of a matrix.
    """
    centre = reference.double().mean(0)
    x, y = samples.double() - centre, reference.double() - centre  # N D, M D
    root = torch.linalg.qr(y, mode="r").R / math.sqrt(len(y) - 1)  # k D: rootᵀ · root is the reference's covariance
    z = x @ root.T  # N k
    if len(z) < z.shape[1]:
        z = torch.linalg.qr(z.T, mode="r").R.T  # N N: turned, with the same singular values whatever rows are left out
    moment, squares = z.T @ z, x.square().sum(1)
    found = []
    for out in (groups == group for group in range(NUM_GROUPS)):
        kept = ~out
        n = int(kept.sum())
        mean_x, mean_z = x[kept].mean(0), z[kept].mean(0)
        scatter = moment - z[out].T @ z[out] - n * torch.outer(mean_z, mean_z)
        trace_root = torch.linalg.eigvalsh(scatter).clamp(min=0).sqrt().sum() / math.sqrt(n - 1)
        trace_x = (squares[kept].sum() - n * mean_x.square().sum()) / (n - 1)
        found.append(mean_x.square().sum() + trace_x + root.square().sum() - 2 * trace_root)
    return torch.stack(found)


def kernel_left_out(samples: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    """The unbiased squared maximum mean discrepancy, kernel (x·y / D + 1)³, once without each group of samples; less the
    reference's own term, which is the same each time."""
    members = torch.nn.functional.one_hot(groups, NUM_GROUPS).float()  # N G
    within = torch.zeros(NUM_GROUPS, NUM_GROUPS, dtype=torch.float64)
    across = torch.zeros(NUM_GROUPS, dtype=torch.float64)
    for rows, own in zip(samples.split(1000), members.split(1000), strict=True):
        with_samples = _kernel(rows, samples) @ members  # n G: of each row, the sum over each group
        with_samples -= _kernel_of_self(rows) * own  # pairs of an image with itself do not count
        within += own.double().T @ with_samples.double()
        across += own.double().T @ _kernel(rows, reference).sum(1).double()
    sizes = groups.bincount(minlength=NUM_GROUPS)
    n = len(samples) - sizes
    inside = within.sum() - 2 * within.sum(1) + within.diagonal()
    return inside / (n * (n - 1)) - 2 * (across.sum() - across) / (n * len(reference))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_of_self(x: Tensor) -> Tensor:
    return (x.square().sum(1, keepdim=True) / x.shape[1] + 1) ** 3
