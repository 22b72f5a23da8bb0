"""Patches for the patch-level distance: where they lie, that they are untouched pixels, and what their distance sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from degrade import blurred, noisy, shuffled

from pbbench.data.images import open_images
from pbbench.model.patching import merge, split
from pbbench.quality.extractors import metric_names
from pbbench.quality.features import PATCHES_PER_IMAGE, cut_patches, patch_size
from pbbench.quality.fid import score

NAME = "random_features_patch_frechet_distance"


@pytest.fixture(scope="module")
def halves() -> tuple[torch.Tensor, torch.Tensor]:
    scenes = open_images("synthetic", (32, 32), 300).batch(range(300))
    return scenes[:150], scenes[150:]


def distance(images: torch.Tensor, reference: torch.Tensor) -> float:
    return score(list(images), list(reference), metrics=["patch"], extractor="random")[NAME]


@pytest.mark.parametrize(
    ("image", "patch"), [((128, 128), (32, 32)), ((256, 256), (64, 64)), ((32, 32), (16, 16)), ((64, 256), (32, 64))]
)
def test_size(image: tuple[int, int], patch: tuple[int, int]) -> None:
    assert patch_size(*image) == patch


def test_patches_are_the_images_own_pixels_whatever_the_batch() -> None:
    images = torch.randint(0, 256, (10, 3, 32, 48), dtype=torch.uint8)
    whole = cut_patches(images, 0)
    assert whole.shape == (10 * PATCHES_PER_IMAGE, 3, 16, 24)
    assert torch.equal(whole, torch.cat([cut_patches(images[:3], 0), cut_patches(images[3:], 3)]))
    for row in (0, 7, 39):
        inside = images[row // PATCHES_PER_IMAGE].unfold(1, 16, 1).unfold(2, 24, 1)  # C y x h w
        assert (inside == whole[row][:, None, None]).flatten(3).all(-1).all(0).any()


def test_places_reach_every_pixel_evenly() -> None:
    """Also across the borders of any divider's patches: a grid would keep to some of them."""
    rows = torch.arange(32, dtype=torch.uint8)[:, None].expand(32, 32)
    images = torch.stack([rows, rows.T]).expand(4000, 2, 32, 32)
    tops, lefts = cut_patches(images, 0)[:, :, 0, 0].T
    for corner in (tops, lefts):
        counts = corner.long().bincount(minlength=17)
        assert len(counts) == 17
        assert counts.min() > 0.8 * counts.float().mean()


def test_names() -> None:
    assert metric_names("published", 2049, 2048, "patches")[0].frechet == "patch_frechet_inception_distance"
    assert metric_names("published", 2048, 2048, "patches")[0].frechet == "few_images_inception_patch_frechet_distance"
    assert metric_names("unverified", 9999, 2048, "patches")[0].frechet == "unverified_inception_patch_frechet_distance"
    assert metric_names("random", 9999, 366, "patches")[0].frechet == NAME


def test_orders_what_a_worse_generator_does(halves: tuple[torch.Tensor, torch.Tensor]) -> None:
    half, reference = halves
    floor = distance(half, reference)
    blurs = [distance(blurred(half, radius), reference) for radius in (0.5, 1, 2)]
    noises = [distance(noisy(half, sigma), reference) for sigma in (10, 30)]
    shuffles = [distance(shuffled(half, d), reference) for d in (2, 4, 8)]
    for worse in (blurs, noises, shuffles):
        assert [floor, *worse] == sorted([floor, *worse])
    assert blurs[1] > 1.5 * floor
    assert shuffles[1] > 1.5 * floor


@pytest.mark.parametrize("d", [2, 4, 8])
def test_sees_the_seams_of_every_divider(halves: tuple[torch.Tensor, torch.Tensor], d: int) -> None:
    """Patches of a shade of their own: each is a fine patch, only its borders tell."""
    half, reference = halves
    shade = torch.randint(-80, 81, (d * d * len(half), 1, 1, 1), generator=torch.Generator().manual_seed(0))
    stepped = merge((split(half, d).short() + shade).clamp(0, 255).to(torch.uint8), d)
    assert distance(stepped, reference) > 1.2 * distance(half, reference)


class Counted(list[torch.Tensor]):
    """A list that counts its reads and can tell its content apart."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)

    def content_fingerprint(self) -> str:
        return "the same"


def test_whole_and_patches_share_one_pass_and_one_cache(halves: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    samples, reference = list(halves[0][:50]), Counted(halves[1][:60])
    settings: dict[str, Any] = {"extractor": "random", "cache": tmp_path}
    both = score(samples, reference, metrics=["fid", "patch"], **settings)
    once = reference.reads
    assert once <= 60 + 2  # each image once, and the first for its size
    assert (both["num_patches"], both["num_images"]) == (4 * 50, 50)
    assert "16×16" in both["patches"]
    assert score(samples, reference, metrics=["fid", "patch"], **settings) == both
    assert score(samples, reference, metrics=["patch"], **settings)[NAME] == both[NAME]
    assert reference.reads == once + 2  # their size was asked for, twice
    assert len(list(tmp_path.iterdir())) == 2


def test_too_small_images_have_no_patches() -> None:
    scenes = list(open_images("synthetic", (12, 12), 100).batch(range(100)))
    found = score(scenes[:50], scenes[50:], metrics=["fid", "patch"], extractor="random")
    assert found[NAME] is None
    assert "smaller than 8×8" in found["reasons"][NAME]
    assert found["random_features_frechet_distance"] > 0


def test_photographs_are_ordered(shared: Path) -> None:
    """CIFAR-10: half against half is the floor; blur and shuffled patches lie above it, in order of their strength."""
    photographs = open_images(str(shared / "data" / "cifar10-test.zip"), (32, 32), 800)
    half, reference = photographs.batch(range(400)), photographs.batch(range(400, 800))
    floor = distance(half, reference)
    blurs = [distance(blurred(half, radius), reference) for radius in (0.5, 1, 2)]
    shuffles = [distance(shuffled(half, d), reference) for d in (2, 4, 8)]
    for worse in (blurs, shuffles):
        assert [floor, *worse] == sorted([floor, *worse])
    assert min(*blurs[1:], *shuffles[1:]) > 2 * floor
