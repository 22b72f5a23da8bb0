"""The seam score against a slow count over pixels, on sets with known answers, and on photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from degrade import blurred, shuffled

from pbbench.data.images import open_images
from pbbench.errors import InputError
from pbbench.quality.intervals import interval, random_groups
from pbbench.quality.seams import raw_seam, seam_score, seam_score_interval


def slow_raw(images: torch.Tensor, d: int) -> float:
    """The definition, pair by pair."""
    _, _, height, width = images.shape
    borders, others = [], []
    for image in images.tolist():
        for plane in image:
            for y in range(height):
                for x in range(width):
                    if y + 1 < height:
                        pairs = borders if (y + 1) % (height // d) == 0 else others
                        pairs.append(abs(plane[y + 1][x] - plane[y][x]))
                    if x + 1 < width:
                        pairs = borders if (x + 1) % (width // d) == 0 else others
                        pairs.append(abs(plane[y][x + 1] - plane[y][x]))
    return float(np.mean(borders) / np.mean(others))


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    return open_images("synthetic", (32, 32), 200).batch(range(200))


@pytest.mark.parametrize(("d", "size"), [(2, (8, 8)), (4, (8, 16)), (3, (12, 6))])
def test_raw_is_the_definition(d: int, size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (5, 3, *size), dtype=torch.uint8)
    assert raw_seam(list(images), d) == pytest.approx(slow_raw(images, d), rel=1e-12)


def test_exact_in_any_batches(scenes: torch.Tensor) -> None:
    assert raw_seam(list(scenes), 4, batch_size=7) == raw_seam(list(scenes), 4, batch_size=200)


def test_uint8_differences_do_not_wrap() -> None:
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[:, 4:] = 255  # one border of d = 2 carries all the difference …
    image[:, 1, 1] = 10  # … but for one pixel's four pairs
    border, other = 255 * 8 / 16, 4 * 10 / 96
    assert raw_seam([image], 2) == pytest.approx(border / other)


@pytest.mark.parametrize("d", [2, 4, 8])
def test_sees_shuffled_patches_and_no_seams_elsewhere(scenes: torch.Tensor, d: int) -> None:
    half, other = scenes[:100], scenes[100:]
    assert seam_score(list(half), list(other), d) == pytest.approx(1, abs=0.15)
    assert (seam_score(list(shuffled(half, d)), list(other), d) or 0) > 2.5


def test_a_constant_offset_per_patch_shows(scenes: torch.Tensor) -> None:
    """What independent denoising does to colours: a step of a few grey levels at each border."""
    offset = torch.randint(-12, 13, (len(scenes), 3, 4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    stepped = (scenes.short() + offset).clamp(0, 255).to(torch.uint8)
    assert (seam_score(list(stepped), list(scenes), 4) or 0) > 1.3


def test_interval_is_the_jackknife_and_covers(scenes: torch.Tensor) -> None:
    """Against the score computed anew without each group; of two draws of 100 scenes each lies in the other's interval."""
    half, other = scenes[:100], scenes[100:]
    groups = random_groups(100, 5)
    slow = torch.tensor([seam_score(list(half[groups != group]), list(other), 4) for group in range(20)])
    found = seam_score_interval(list(half), list(other), 4, seed=5)
    assert found == pytest.approx(interval(seam_score(list(half), list(other), 4) or 0, slow), rel=1e-6)
    score = seam_score(list(half), list(other), 4)
    assert score is not None
    assert found is not None
    assert found[0] < 1 < found[1]  # the halves are alike
    assert found[1] - found[0] < 0.3
    assert seam_score_interval(list(half), list(other), 1) is None
    assert seam_score_interval(list(half[:39]), list(other), 4) is None
    flat = torch.full_like(half, 7)
    flat[0] = half[0]
    assert seam_score_interval(list(flat), list(other), 4) is None  # without the first image nothing is left to divide by


def test_null_without_borders(scenes: torch.Tensor) -> None:
    assert seam_score(list(scenes), list(scenes), 1) is None


def test_photographs_have_the_known_figures(shared: Path) -> None:
    """A thousand CIFAR-10 JPEGs: raw 1.19, 1.13, 1.06 (± 0.01 from thousand to thousand); shuffled near 3.7 (a score above
    3); a blur leaves the score near 1."""
    photographs = open_images(str(shared / "data" / "cifar10-test.zip"), (32, 32))
    order = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(0))
    one, two = photographs.batch(order[:1000].numpy()), photographs.batch(order[1000:2000].numpy())
    for d, raw in ((2, 1.19), (4, 1.13), (8, 1.06)):
        assert raw_seam(list(one), d) == pytest.approx(raw, abs=0.03)
        assert 3.4 < raw_seam(list(shuffled(one, d)), d) < 4.0
        assert seam_score(list(two), list(one), d) == pytest.approx(1, abs=0.05)
        assert (seam_score(list(shuffled(two, d)), list(one), d) or 0) > 2.5
        for radius in (0.5, 1, 2):
            assert 0.8 < (seam_score(list(blurred(two, radius)), list(one), d) or 0) < 1.2


@pytest.mark.parametrize("d", [0, -2, 3, 32])
def test_divider_that_does_not_fit(scenes: torch.Tensor, d: int) -> None:
    with pytest.raises(InputError, match="do not divide"):
        seam_score(list(scenes), list(scenes), d)


def test_sets_with_nothing_to_compare(scenes: torch.Tensor) -> None:
    flat = [torch.full((3, 32, 32), 7, dtype=torch.uint8)] * 2
    with pytest.raises(InputError, match="samples are flat"):
        seam_score(flat, list(scenes), 2)
    with pytest.raises(InputError, match="bring one set"):
        seam_score(list(scenes[:, :, :16]), list(scenes), 2)
    with pytest.raises(InputError, match="samples are empty"):
        seam_score([], list(scenes), 2)
    with pytest.raises(InputError, match="image 1 of the samples is 16×16"):
        seam_score([scenes[0], scenes[0][:, :16, :16]], list(scenes), 2)
