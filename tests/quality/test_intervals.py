"""The 95% intervals: the jackknife against the obvious computation, and how often it covers what it says it covers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pbbench.data.images import open_images
from pbbench.quality import fid
from pbbench.quality.fid import score
from pbbench.quality.intervals import FEWEST, NUM_GROUPS, frechet_left_out, interval, kernel_left_out, random_groups


def white(rows: int, features: int) -> torch.Tensor:
    """A reference whose mean is 0 and whose covariance is I, exactly: distances to it are known."""
    y = torch.randn(rows, features, dtype=torch.float64)
    y -= y.mean(0)
    return y @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(y.T))).T


def normal(rows: int, features: int, shift: float, widest: float) -> tuple[torch.Tensor, float]:
    """(draws of N(shift, diag(1 … widest²)), its Frechet distance to N(0, I): Σ shift² + (σ − 1)²)."""
    deviations = torch.linspace(1, widest, features, dtype=torch.float64)
    distance = features * shift**2 + float((deviations - 1).square().sum())
    return torch.randn(rows, features, dtype=torch.float64) * deviations + shift, distance


@pytest.mark.parametrize(("n", "m", "features"), [(90, 150, 40), (90, 150, 120), (90, 60, 120), (200, 70, 100)])
def test_frechet_left_out_is_the_distance_without_each_group(n: int, m: int, features: int) -> None:
    x, y = torch.randn(n, features) + 0.2, torch.randn(m, features)
    groups = random_groups(n, 0)
    slow = [fid._frechet(x[groups != group].double(), y.double()) for group in range(NUM_GROUPS)]
    assert frechet_left_out(x, y, groups).tolist() == pytest.approx(slow, rel=1e-6)


def test_kernel_left_out_is_the_double_sum_without_each_group() -> None:
    """Up to the reference's own term, which does not depend on the samples."""
    x, y = torch.randn(60, 5), torch.randn(40, 5) + 0.5
    groups = random_groups(60, 3)
    slow = []
    for group in range(NUM_GROUPS):
        kept = x[groups != group].double().numpy()
        within = [(a @ b / 5 + 1) ** 3 for i, a in enumerate(kept) for j, b in enumerate(kept) if i != j]
        slow.append(np.mean(within) - 2 * np.mean([(a @ b / 5 + 1) ** 3 for a in kept for b in y.double().numpy()]))
    assert kernel_left_out(x, y, groups).tolist() == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("widest", [1.5, 3.0])
def test_covers_a_known_distance_where_the_bias_is_small(widest: float) -> None:
    """Many samples for few features: of 200 draws about 95% of the intervals hold the closed form's distance."""
    y = white(300, 6)
    held = 0
    for seed in range(200):
        x, distance = normal(400, 6, 0.3, widest)
        low, high = interval(fid._frechet(x, y) or 0, frechet_left_out(x, y, random_groups(400, seed)))
        held += low <= distance <= high
    assert 0.89 * 200 <= held <= 0.995 * 200


@pytest.mark.parametrize(("n", "features", "shift"), [(120, 40, 0.3), (100, 120, 0.3), (120, 40, 0.0)])
def test_covers_the_mean_of_its_own_number_of_samples(n: int, features: int, shift: float) -> None:
    """Few samples for the features, or none at a distance: the figure is biased, and its interval says how it scatters
    around its own mean (what FID-N of other samples would give), not how far it lies from the true distance."""
    y = white(200, features)
    draws = 100
    figures, found = [], []
    for seed in range(draws):
        x, distance = normal(n, features, shift, 1.0)
        figures.append(fid._frechet(x, y) or 0)
        found.append(interval(figures[-1], frechet_left_out(x, y, random_groups(n, seed))))
    mean = float(np.mean(figures))
    assert 0.9 * draws <= sum(low <= mean <= high for low, high in found)
    assert np.mean([high - low for low, high in found]) < 2 * 2 * 1.98 * np.std(figures)  # not by being twice as wide
    assert mean > distance
    assert not any(low <= distance <= high for low, high in found)  # as the docstring says


def test_kernel_intervals_cover() -> None:
    y, draws = torch.randn(150, 8), 100
    found, figures = [], []
    for seed in range(draws):
        x = torch.randn(100, 8) + 0.3
        mean, spread = fid._kernel(x, y, 50, seed)
        figures.append(mean)
        found.append(interval(mean, kernel_left_out(x, y, random_groups(100, seed)), (spread or 0) ** 2 / 100))
    assert 0.9 * draws <= sum(low <= np.mean(figures) <= high for low, high in found)
    assert np.mean([high - low for low, high in found]) < 2 * 2 * 1.98 * np.std(figures)


def test_score_gives_intervals_and_says_where_it_cannot() -> None:
    scenes = list(open_images("synthetic", (16, 16), 160).batch(range(160)))
    found = score(scenes[:80], scenes[80:], metrics=["fid", "kid", "patch"], extractor="random")
    for name in ("frechet_distance", "patch_frechet_distance", "kernel_distance_mean"):
        low, high = found[f"random_features_{name}_interval"]
        assert low < found[f"random_features_{name}"] < high
    assert score(scenes[:80], scenes[80:], metrics=["fid", "kid", "patch"], extractor="random") == found
    few = score(scenes[: FEWEST - 1], scenes[80:], metrics=["fid", "kid"], extractor="random")
    for name in ("random_features_frechet_distance_interval", "random_features_kernel_distance_mean_interval"):
        assert few[name] is None
        assert "40 samples or more" in few["reasons"][name]


def test_groups_are_equal_and_random() -> None:
    groups = random_groups(1005, 7)
    assert set(groups.bincount().tolist()) == {50, 51}
    assert torch.equal(groups, random_groups(1005, 7))
    assert not torch.equal(groups, random_groups(1005, 8))
    runs = (groups[1:] == groups[:-1]).float().mean()
    assert runs < 0.1  # neighbours are in different groups, as a folder sorted by class needs it
