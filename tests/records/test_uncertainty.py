"""Intervals of figures and of their differences: how often they hold the truth, paired and not, over samples and trainings."""

from __future__ import annotations

import numpy as np
import pytest

from pbbench.records.uncertainty import NUM_GROUPS, Training, difference, estimate, student_t


def trained(images: np.ndarray, shift: float = 0.0, draw: int = 0) -> Training:
    """A model whose figure is the mean over its images, shifted."""
    groups = np.arange(len(images)) % NUM_GROUPS
    left_out = [float(images[groups != group].mean() + shift) for group in range(NUM_GROUPS)]
    return Training(float(images.mean() + shift), left_out, (draw,))


def test_students_t() -> None:
    assert student_t(1) == pytest.approx(12.706, abs=1e-3)
    assert student_t(19) == pytest.approx(2.0930, abs=1e-4)


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    images = np.random.default_rng(0).normal(size=NUM_GROUPS)
    found = estimate([trained(images)])
    assert found.reach == pytest.approx(2.093 * images.std(ddof=1) / NUM_GROUPS**0.5, rel=1e-3)
    assert (found.sampling, found.training) == (found.reach, None)


def test_shared_noise_makes_a_small_difference_certain() -> None:
    """Two models that differ by 0.1 on the same images, whose own spread is 1: paired it is seen, of other draws it is not."""
    rng = np.random.default_rng(1)
    shared = rng.normal(size=200)
    a, b = trained(shared), trained(shared + rng.normal(scale=0.05, size=200), 0.1)
    paired = difference([a], [b])
    assert paired.decided
    assert difference([a], [b]).value == pytest.approx(0.1, abs=0.02)
    assert difference([b], [a]).value < 0
    elsewhere = trained(rng.normal(size=200), 0.1, draw=1)
    assert (difference([a], [elsewhere]).reach or 0) > 10 * (paired.reach or 1)


def test_trainings_that_vary_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(size=200)
    one = [trained(shared, shift) for shift in (-0.5, 0.0, 0.5)]
    other = [trained(shared, 0.3 + shift) for shift in (-0.4, 0.1, 0.6)]
    found = difference(one, other)
    assert found.sampling == pytest.approx(0, abs=1e-9)
    assert found.training is not None
    assert found.training > 0.5
    assert not found.decided
    assert difference(one[1:2], other[1:2]).training is None


@pytest.mark.parametrize("trainings", [1, 3])
def test_holds_the_truth_nineteen_times_of_twenty(trainings: int) -> None:
    rng, held = np.random.default_rng(3), 0
    for _ in range(400):
        models = []
        for truth in (0.0, 0.2):
            spread = 0.0 if trainings == 1 else 0.3
            models.append(
                [
                    trained(rng.normal(size=100), truth + rng.normal(scale=spread), int(rng.integers(2**40)))
                    for _ in range(trainings)
                ]
            )
        low, high = difference(*models).ends or (0, 0)
        held += low <= 0.2 <= high
    assert held >= 0.92 * 400


def test_without_groups_or_seeds_nothing_is_known() -> None:
    found = difference([Training(1.0)], [Training(2.0)])
    assert (found.value, found.reach, found.ends, found.decided) == (1.0, None, None, False)
    assert difference([Training(1.0), Training(1.1)], [Training(2.0), Training(2.2)]).decided
