"""How far a quality figure may be off, in two parts: by the draw of samples, and by the training.

**Sampling.** Beside a figure stand 20 more, each with one of 20 groups of samples left out (``quality.intervals`` makes them).
Their jackknife variance (G − 1) / G · Σ (θ_g − mean)² says how far other samples of the same model would move the figure
(Shao and Tu 1995, "The Jackknife and Bootstrap", section 2.3). Models that drew the same images from the same noise move
together: the difference of their figures is taken group by group, and its variance is that of the differences.

**Training.** Trainings that differ by their seed alone vary by more than their samples do; the variance of their mean is
s² / n. Of a single training this part is not known, and is said not to be.

Reaches are half the width of a 95% interval: Student's t times the standard error, the degrees of freedom of both parts put
together by Welch and Satterthwaite's formula (Welch 1947).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NUM_GROUPS = 20


@dataclass(frozen=True)
class Training:
    """A figure of one trained model."""

    value: float
    left_out: Sequence[float] | None = None
    """The figure without each group of samples; None: too few samples, or a figure that has none."""
    draw: tuple[object, ...] = ()
    """What decides the draw of samples: models of equal draws have their images and noise in common."""


@dataclass(frozen=True)
class Estimate:
    """A figure or a difference of two, the mean over trainings, with the reach of its 95% interval."""

    value: float
    sampling: float | None
    """Reach over the draw of samples; None: not known."""
    training: float | None
    """Reach over trainings; None: trained once, so not known."""
    reach: float | None
    """Of both parts that are known."""

    @property
    def decided(self) -> bool:
        """Is it further from 0 than its interval reaches?"""
        return self.reach is not None and abs(self.value) > self.reach

    @property
    def ends(self) -> tuple[float, float] | None:
        return None if self.reach is None else (self.value - self.reach, self.value + self.reach)


def student_t(degrees: float) -> float:
    """The 97.5% point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def jackknife_variance(left_out: Sequence[float]) -> float:
    return (len(left_out) - 1) * statistics.pvariance(left_out)


def estimate(trainings: Sequence[Training]) -> Estimate:
    """The mean over ``trainings`` of one model, one or more."""
    return _estimate([(trainings, 1.0)])


def difference(a: Sequence[Training], b: Sequence[Training]) -> Estimate:
    """The mean of ``b`` less that of ``a``, paired where both drew the same images from the same noise."""
    return _estimate([(b, 1.0), (a, -1.0)])


Part = tuple[Sequence[Training], float]
"""The trainings of a model, and their sign in the figure."""
Variance = tuple[float, int]
"""(variance, degrees of freedom)."""


def _estimate(parts: Sequence[Part]) -> Estimate:
    value = sum(sign * statistics.fmean(t.value for t in trainings) for trainings, sign in parts)
    sampling, training = _sampling(parts), _training(parts)
    known = [*(sampling or ()), *(training or ())]
    reaches = (_reach(part) if part else None for part in (sampling, training, known))
    return Estimate(value, *reaches)


def _sampling(parts: Sequence[Part]) -> list[Variance] | None:
    """Of equal draws the variance of the whole, else one of each part."""
    trained = [t for trainings, _ in parts for t in trainings]
    if any(t.left_out is None or len(t.left_out) != NUM_GROUPS for t in trained):
        return None
    means = [
        [sign * statistics.fmean(group) for group in zip(*(t.left_out or () for t in trainings), strict=True)]
        for trainings, sign in parts
    ]
    if len({t.draw for t in trained}) == 1:
        means = [[sum(group) for group in zip(*means, strict=True)]]
    return [(jackknife_variance(left_out), NUM_GROUPS - 1) for left_out in means]


def _training(parts: Sequence[Part]) -> list[Variance] | None:
    """The variance of each mean over trainings."""
    if any(len(trainings) < 2 for trainings, _ in parts):
        return None
    values = [[t.value for t in trainings] for trainings, _ in parts]
    return [(statistics.variance(own) / len(own), len(own) - 1) for own in values]


def _reach(variances: Sequence[Variance]) -> float:
    total = sum(variance for variance, _ in variances)
    if total == 0:
        return 0.0
    degrees = total**2 / sum(variance**2 / degrees for variance, degrees in variances)
    return student_t(degrees) * math.sqrt(total)
