"""The random extractor: fixed, sized for short runs, and ordering what a worse generator does to images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from degrade import blurred, mosaic, noisy, shuffled

from pbbench.data.images import open_images
from pbbench.errors import InputError
from pbbench.quality.fid import score
from pbbench.quality.random_features import LAYER, NUM_FEATURES, RANDOM_FEATURES, RandomFeatures


@pytest.fixture(scope="module")
def halves() -> tuple[torch.Tensor, torch.Tensor]:
    scenes = open_images("synthetic", (32, 32), 400).batch(range(400))
    return scenes[:200], scenes[200:]


def features(images: torch.Tensor) -> torch.Tensor:
    return RandomFeatures(RANDOM_FEATURES, [LAYER])(images)[0]


def distance(images: torch.Tensor, reference: torch.Tensor) -> float:
    return score(list(images), list(reference), metrics=["fid"], extractor="random")["random_features_frechet_distance"]


def test_fixed_in_every_process() -> None:
    """The figures of a run must mean the same tomorrow: weights from the seed alone, and not from the global generator."""
    images = torch.arange(3 * 16 * 16).view(1, 3, 16, 16).to(torch.uint8)
    torch.manual_seed(1)
    one = features(images)
    torch.manual_seed(2)
    assert torch.equal(one, features(images))
    pinned = torch.tensor(
        [-0.8, -1.3251084, 0.7064694, 0.5828848, -2.0628717, 0.2302224]
    )  # a change here needs another name than v2
    torch.testing.assert_close(one[0, [0, 48, 100, 303, 304, 335]], pinned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (32, 32), (64, 128)])
def test_any_size_gives_the_same_number_of_finite_features(size: tuple[int, int]) -> None:
    images = torch.stack([torch.zeros(3, *size), torch.full((3, *size), 255.0), torch.rand(3, *size) * 255]).to(torch.uint8)
    found = features(images)
    assert found.shape == (3, NUM_FEATURES)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert torch.allclose(features(images[2:]), found[2:], atol=1e-5)  # an image's features do not depend on its batch


def test_orders_what_a_worse_generator_does(halves: tuple[torch.Tensor, torch.Tensor]) -> None:
    half, reference = halves
    floor = distance(half, reference)
    blurs = [distance(blurred(half, radius), reference) for radius in (0.5, 1, 2, 4)]
    noises = [distance(noisy(half, sigma), reference) for sigma in (10, 30, 90)]
    shuffles = [distance(shuffled(half, d), reference) for d in (2, 4, 8)]
    assert [floor, *blurs] == sorted([floor, *blurs])
    assert [floor, *noises] == sorted([floor, *noises])
    assert [floor, *shuffles] == sorted([floor, *shuffles])
    assert blurs[1] > 1.5 * floor
    assert shuffles[0] > 1.5 * floor


def test_sees_colour_layout_and_lost_variety(halves: tuple[torch.Tensor, torch.Tensor]) -> None:
    half, reference = halves
    floor = distance(half, reference)
    redder = (half + torch.tensor([60, 0, 0]).view(3, 1, 1)).clamp(0, 255).to(torch.uint8)
    assert distance(redder, reference) > 1.05 * floor
    assert distance(half.flip(2), reference) > 1.2 * floor  # upside down
    assert distance(half[:20].repeat(10, 1, 1, 1), reference) > 1.5 * floor  # twenty images, ten times each


def test_patches_that_do_not_fit_are_seen_as_such(halves: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Each patch real and where it belongs, but of another image than its neighbours; and whole images in offset patches."""
    half, reference = halves
    floor = distance(half, reference)
    mosaics = [distance(mosaic(half, d), reference) for d in (2, 4, 8)]
    assert mosaics == sorted(mosaics)
    assert mosaics[0] > 1.8 * floor
    levels = torch.randint(-20, 21, (len(half), 1, 4, 4), generator=torch.Generator().manual_seed(0))
    offset = (half + levels.repeat_interleave(8, 2).repeat_interleave(8, 3)).clamp(0, 255).to(torch.uint8)
    assert distance(offset, reference) > 1.05 * floor


def test_too_small_images_are_refused() -> None:
    images = [torch.zeros(3, 6, 8, dtype=torch.uint8)] * 4
    with pytest.raises(InputError, match="6×8 are too small for the random extractor"):
        score(images, images, extractor="random")


def test_photographs_are_ordered(shared: Path) -> None:
    """CIFAR-10: half against half is the floor; blur, noise and shuffled patches lie above it, in order."""
    photographs = open_images(str(shared / "data" / "cifar10-test.zip"), (32, 32))
    order = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(0))
    half, reference = photographs.batch(order[:500].numpy()), photographs.batch(order[500:1000].numpy())
    floor = distance(half, reference)
    blurs = [distance(blurred(half, radius), reference) for radius in (0.5, 1, 2)]
    shuffles = [distance(shuffled(half, d), reference) for d in (2, 4, 8)]
    noises = [distance(noisy(half, sigma), reference) for sigma in (20, 60)]
    for worse in (blurs, shuffles, noises):
        assert [floor, *worse] == sorted([floor, *worse])
    assert min(blurs[1], *shuffles, *noises[1:]) > 2 * floor
    assert floor < 0.2 * distance(shuffled(half, 8), reference)


def test_the_floor_of_photographs_is_within_its_interval(shared: Path) -> None:
    """Two halves differ by chance alone: other halves give a figure that the interval of the first allows for."""
    photographs = open_images(str(shared / "data" / "cifar10-test.zip"), (32, 32), 2000)
    reference = photographs.batch(range(1000))
    found = [
        score(list(photographs.batch(range(first, first + 500))), list(reference), metrics=["fid"], extractor="random")
        for first in (1000, 1500)
    ]
    name = "random_features_frechet_distance"
    (low, high), figure = found[0][f"{name}_interval"], found[0][name]
    assert low < found[1][name] < high
    assert high - low < figure
