"""The seam score against a slow count over pixels, on sets with known answers, and on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from degrade import blurred, shuffled

from pbbench.data.images import open_images
from pbbench.errors import InputError
from pbbench.quality.intervals import interval, random_groups
from pbbench.quality.seams import raw_seam, seam_figures


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


def seam_score(samples: Any, reference: Any, d: int) -> float:
    return seam_figures(samples, reference, d)["seam_score"]


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
    assert seam_score(list(shuffled(half, d)), list(other), d) > 2.5


def test_a_constant_offset_per_patch_shows(scenes: torch.Tensor) -> None:
    """What independent denoising does to colours: a step of a few grey levels at each border."""
    offset = torch.randint(-12, 13, (len(scenes), 3, 4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    stepped = (scenes.short() + offset).clamp(0, 255).to(torch.uint8)
    assert seam_score(list(stepped), list(scenes), 4) > 1.3


def test_interval_is_the_jackknife_and_covers(scenes: torch.Tensor) -> None:
    """Against the score computed anew without each group; of two draws of 100 scenes each lies in the other's interval."""
    half, other = scenes[:100], scenes[100:]
    groups = random_groups(100, 5)
    found = seam_figures(list(half), list(other), 4, seed=5)
    slow = [seam_figures(list(half[groups != group]), list(other), 4) for group in range(20)]
    for name in ("seam_score", "seam_excess_square"):
        assert found["left_out"][name] == pytest.approx([without[name] for without in slow], rel=1e-6, abs=1e-6)
    expected = interval(found["seam_score"], torch.tensor(found["left_out"]["seam_score"]))
    low, high = found["seam_score_interval"]
    assert [low, high] == pytest.approx(expected, rel=1e-6)
    assert low < 1 < high  # the halves are alike
    assert high - low < 0.3
    assert seam_figures(list(half[:39]), list(other), 4)["seam_score_interval"] is None
    flat = torch.full_like(half, 7)
    flat[0] = half[0]
    assert (
        seam_figures(list(flat), list(other), 4)["seam_score_interval"] is None
    )  # without the first nothing is left to divide by


def stepped(images: torch.Tensor, step: int) -> torch.Tensor:
    """Every other patch of 4 × 4 brighter, float; from images drawn together so far that nothing is clipped."""
    dark = (torch.arange(32).view(32, 1) // 8 + torch.arange(32) // 8) % 2
    return images.float() / 4 + 96 + step * (dark - 0.5)


def test_noise_hides_seams_from_the_ratio_and_not_from_the_excess(scenes: torch.Tensor) -> None:
    """A step of 20 grey levels at every border, in clean images and in such with noise of σ = 20: the excess is 20 in both."""
    noise = 20 * torch.randn(scenes.shape)
    found = {}
    for name, more in (("clean", torch.zeros_like(noise)), ("noisy", noise)):
        seamed, plain = ((stepped(scenes, step) + more).round().clamp(0, 255).to(torch.uint8) for step in (20, 0))
        found[name] = seam_figures(list(seamed), list(plain), 4)
        low, high = found[name]["seam_excess_interval"]
        assert low < found[name]["seam_excess"] < high
        assert found[name]["seam_excess"] == pytest.approx(20, abs=1.5)
        assert abs(seam_figures(list(plain[:100]), list(plain[100:]), 4)["seam_excess"]) < 6
    assert found["clean"]["seam_score"] > 2
    assert found["noisy"]["seam_score"] < 1.4


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
        assert seam_score(list(shuffled(two, d)), list(one), d) > 2.5
        for radius in (0.5, 1, 2):
            assert 0.8 < seam_score(list(blurred(two, radius)), list(one), d) < 1.2


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
