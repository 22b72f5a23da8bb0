"""Scores: slow oracles, torch-fidelity's own entry point to the last digit, and names that say what was done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import scipy.linalg
import torch
from degrade import blurred
from PIL import Image

from pbbench.data.images import open_images
from pbbench.errors import InputError
from pbbench.experiment.settings import QualityConfig
from pbbench.quality import fid, score_sets, weights
from pbbench.quality.extractors import DISTANCES, metric_names
from pbbench.quality.features import feature_key, load_features, store_features
from pbbench.quality.fid import score
from pbbench.quality.random_features import RANDOM_FEATURES
from pbbench.records.quality_names import DISTANCE_WORDS, QUALITY_HEADERS


class Counted:
    """A set that counts how often its images are read."""

    def __init__(self, images: torch.Tensor, content: str = "one") -> None:
        self.images, self.content, self.reads = images, content, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        return self.images[index]

    def content_fingerprint(self) -> str:
        return self.content


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    return open_images("synthetic", (16, 16), 120).batch(range(120))


def as_folder(images: torch.Tensor, folder: Path) -> str:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:04d}.png")
    return str(folder)


def own(samples: str, reference: str, **settings: Any) -> dict[str, float]:
    """torch-fidelity's public entry point on two folders."""
    import torch_fidelity

    return torch_fidelity.calculate_metrics(
        input1=samples,
        input2=reference,
        cuda=False,
        cache=False,
        verbose=False,
        fid=True,
        kid=True,
        prc=True,
        rng_seed=5,
        **settings,
    )


# The mathematics


def test_frechet_distance_against_the_matrix_square_root() -> None:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½), with SciPy's square root in float64."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    two = rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12)) + 1
    root = scipy.linalg.sqrtm(np.cov(one.T) @ np.cov(two.T)).real
    oracle = np.sum((one.mean(0) - two.mean(0)) ** 2) + np.trace(np.cov(one.T) + np.cov(two.T) - 2 * root)
    assert fid._frechet(torch.from_numpy(one), torch.from_numpy(two)) == pytest.approx(oracle, rel=1e-8)


def test_kernel_distance_against_double_sums() -> None:
    """The unbiased estimate of the squared maximum mean discrepancy, kernel (x·y / D + 1)³, pair by pair."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)), rng.normal(size=(9, 5)) + 0.5

    def k(a: Any, b: Any) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within = sum(k(s[i], s[j]) for s in (x, y) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    oracle = within - 2 * sum(k(a, b) for a in x for b in y) / 81
    mean, spread = fid._kernel(torch.from_numpy(x), torch.from_numpy(y), 9, seed=0)
    assert mean == pytest.approx(oracle, rel=1e-9)
    assert spread is None  # a hundred times the same nine against the same nine


def test_precision_and_recall_on_points_on_a_line() -> None:
    """Samples inside one half of the reference: all are realistic, half of the reference is covered."""
    reference = torch.cat((torch.linspace(0, 1, 20), torch.linspace(10, 11, 20)))[:, None]
    samples = torch.linspace(0, 1, 30)[:, None]
    assert fid._precision_recall(samples, reference) == (1.0, 0.5)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (60, 40), (5, 4)])
def test_precision_and_recall_against_brute_force(n: int, m: int) -> None:
    """A point counts where some point of the other set has it within the distance of its own third neighbour."""
    rng = np.random.default_rng(n)
    samples, reference = rng.normal(size=(n, 3)), rng.normal(size=(m, 3)) * 1.3 + 0.4

    def inside(points: Any, others: Any) -> float:
        held = 0
        for point in points:
            for i, other in enumerate(others):
                third = sorted(np.linalg.norm(other - neighbour) for j, neighbour in enumerate(others) if j != i)[2]
                if np.linalg.norm(point - other) <= third:
                    held += 1
                    break
        return held / len(points)

    precision, recall = fid._precision_recall(torch.from_numpy(samples), torch.from_numpy(reference))
    assert precision == pytest.approx(inside(samples, reference), abs=1e-6)
    assert recall == pytest.approx(inside(reference, samples), abs=1e-6)
    assert 0 < precision <= 1


def test_equal_sets_are_at_distance_zero(scenes: torch.Tensor) -> None:
    found = score(list(scenes), list(scenes), extractor="random")
    assert 0 <= found["random_features_frechet_distance"] < 1e-4
    assert found["random_features_precision"] == found["random_features_recall"] == 1


def test_a_failed_square_root_is_null_not_zero(monkeypatch: pytest.MonkeyPatch, scenes: torch.Tensor) -> None:
    import torch_fidelity.metric_fid

    for broken in (-5.0, float("nan")):
        monkeypatch.setattr(
            torch_fidelity.metric_fid, "fid_statistics_to_metric", lambda *_, v=broken, **__: {"frechet_inception_distance": v}
        )
        found = score(list(scenes), list(scenes), metrics=["fid"], extractor="random")
        assert found["random_features_frechet_distance"] is None
        assert "failed numerically" in found["reasons"]["random_features_frechet_distance"]


# Agreement with torch-fidelity
# (The order of the images counts: it decides which of them a subset of the kernel distance holds, and the rounding.)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # theirs
def test_random_features_agree_with_calculate_metrics(scenes: torch.Tensor, tmp_path: Path) -> None:
    one, two = scenes[:60], blurred(scenes[60:], 1)
    theirs = own(
        as_folder(one, tmp_path / "a"), as_folder(two, tmp_path / "b"),
        feature_extractor=RANDOM_FEATURES, batch_size=16, kid_subset_size=40,
    )  # fmt: skip
    ours = score(list(one), list(two), extractor="random", batch_size=16, kid_subset_size=40, seed=5)
    assert ours["random_features_frechet_distance"] == theirs["frechet_inception_distance"]
    assert ours["random_features_kernel_distance_mean"] == theirs["kernel_inception_distance_mean"]
    assert ours["random_features_kernel_distance_std"] == theirs["kernel_inception_distance_std"]
    both = ours["random_features_precision"], ours["random_features_recall"]
    assert both == (theirs["precision"], theirs["recall"])


def test_inception_path(inception_file: Path, scenes: torch.Tensor) -> None:
    """Kernel distance and precision/recall of Inception (VGG16 would be torch-fidelity's choice for the latter)."""
    one, two = scenes[:4], blurred(scenes[4:8], 2)
    checked = weights.resolve_inception_weights(inception_file)
    found = score(list(one), list(two), metrics=["kid", "prc"], weights=checked, batch_size=4)
    assert found["unverified_inception_kernel_distance_mean"] > 0
    assert found["kid_subset_size"] == 4
    assert 0 <= found["unverified_inception_precision"] <= 1
    assert found["extractor"] == f"inception-v3-compat, 2048 features, float32, weights sha256 {checked.sha256[:8]}"
    assert any("not the published" in note for note in found["notes"])
    assert not [name for name in found if name.startswith(("frechet_inception", "kernel_inception"))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_inception_agrees_with_calculate_metrics(
    inception_file: Path, scenes: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folders, the same file: the same digits. With the published file they would bear the published names."""
    one, two = scenes[:6], blurred(scenes[6:12], 1)
    theirs = own(
        as_folder(one, tmp_path / "a"), as_folder(two, tmp_path / "b"), feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file), batch_size=6, kid_subset_size=4,
    )  # fmt: skip
    checked = weights.resolve_inception_weights(inception_file)
    monkeypatch.setattr(weights, "PUBLISHED_SHA256", checked.sha256[:8])
    ours = score(list(one), list(two), weights=checked, batch_size=6, kid_subset_size=4, seed=5)
    assert ours["few_images_inception_frechet_distance"] == theirs["frechet_inception_distance"]
    assert ours["kernel_inception_distance_mean"] == theirs["kernel_inception_distance_mean"]
    assert ours["kernel_inception_distance_std"] == theirs["kernel_inception_distance_std"]
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])


# Names


@pytest.mark.parametrize(
    ("kind", "num_images", "frechet", "kernel"),
    [
        ("published", 2049, "frechet_inception_distance", "kernel_inception_distance"),
        ("published", 2048, "few_images_inception_frechet_distance", "kernel_inception_distance"),
        ("unverified", 50_000, "unverified_inception_frechet_distance", "unverified_inception_kernel_distance"),
        ("unverified", 10, "unverified_inception_frechet_distance", "unverified_inception_kernel_distance"),
        ("random", 50_000, "random_features_frechet_distance", "random_features_kernel_distance"),
    ],
)
def test_only_fid_is_called_fid(kind: str, num_images: int, frechet: str, kernel: str) -> None:
    names, _ = metric_names(kind, num_images, 2048)
    assert (names.frechet, names.kernel) == (frechet, kernel)


def test_few_images_are_said(scenes: torch.Tensor) -> None:
    found = score(list(scenes[:50]), list(scenes[50:]), extractor="random", kid_subset_size=1000)
    assert (found["num_images"], found["num_reference_images"], found["seed"]) == (50, 70, 0)
    assert found["kid_subset_size"] == 50
    assert any("50 images for 366 features" in note for note in found["notes"])
    assert any("subsets of the kernel distance hold 50" in note for note in found["notes"])
    few = score(list(scenes[:3]), list(scenes[50:]), extractor="random", metrics=["prc"])
    assert (few["random_features_precision"], few["random_features_recall"]) == (None, None)
    assert "more than 3 images" in few["reasons"]["random_features_precision"]


def test_the_settings_name_the_metrics_of_the_table() -> None:
    """The settings and the command line know no torch, so the names stand in both."""
    names = get_args(get_args(QualityConfig.model_fields["metrics"].annotation)[0])
    assert names == tuple(fid.METRICS) == score_sets.KNOWN


@pytest.mark.parametrize("kind", DISTANCES)
def test_every_name_of_a_distance_has_its_words(kind: str) -> None:
    for of in ("images", "patches"):
        for num_rows in (1, 10_000):
            names, _ = metric_names(kind, num_rows, 2048, of)
            assert {names.frechet, f"{names.kernel}_mean"} <= set(DISTANCE_WORDS) & set(QUALITY_HEADERS)
            assert {names.precision, names.recall} <= set(QUALITY_HEADERS)


# The cache of reference features


def test_reference_is_read_once_and_again_when_it_changes(scenes: torch.Tensor, tmp_path: Path) -> None:
    samples, reference = list(scenes[:40]), Counted(scenes[40:])
    settings: dict[str, Any] = {"extractor": "random", "cache": tmp_path / "cache"}
    fresh = score(samples, list(scenes[40:]), extractor="random")
    assert score(samples, reference, **settings) == fresh
    reads = reference.reads
    assert score(samples, reference, **settings) == fresh
    assert reference.reads == reads + 1  # its size was asked for, nothing computed
    other = Counted(blurred(scenes[40:], 2), content="two")
    assert score(samples, other, **settings) != fresh
    fewer = Counted(scenes[50:], content="one")
    assert score(samples, fewer, **settings)["num_reference_images"] == 70
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_damaged_cache_is_computed_anew(scenes: torch.Tensor, tmp_path: Path) -> None:
    samples, reference = list(scenes[:40]), Counted(scenes[40:])
    fresh = score(samples, reference, extractor="random", cache=tmp_path)
    (file,) = tmp_path.iterdir()
    sound = file.read_bytes()
    one_byte = sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:]
    for damage in (b"", b"not safetensors", sound[:-50], one_byte):
        file.write_bytes(damage)
        assert score(samples, reference, extractor="random", cache=tmp_path) == fresh
        assert list(tmp_path.iterdir()) == [file]
        reads = reference.reads
        assert score(samples, reference, extractor="random", cache=tmp_path) == fresh
        assert reference.reads == reads + 1  # its size was asked for: the features are there again


@pytest.mark.parametrize("changed", ["data", "num_images", "shape", "extractor", "cut", "torch", "torch_fidelity", "pillow"])
def test_every_part_of_the_key_counts(scenes: torch.Tensor, tmp_path: Path, changed: str) -> None:
    key = feature_key(Counted(scenes), (3, 16, 16), {"extractor": "one", "cut": "whole images"})
    assert key is not None
    assert changed in key
    features = torch.rand(len(scenes), 5)
    store_features(tmp_path, key, features)
    assert torch.equal(load_features(tmp_path, key), features)
    assert load_features(tmp_path, key | {changed: "7"}) is None


def test_a_cache_that_cannot_be_written_costs_no_score(scenes: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    samples, reference = list(scenes[:40]), Counted(scenes[40:])
    found = score(samples, reference, extractor="random", cache=tmp_path / "file" / "cache")
    assert found == score(samples, reference, extractor="random")


def test_sets_without_a_fingerprint_are_not_cached(scenes: torch.Tensor, tmp_path: Path) -> None:
    score(list(scenes[:40]), list(scenes[40:]), extractor="random", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


# Input


def test_grey_images_count_as_their_own_colours(scenes: torch.Tensor) -> None:
    grey = scenes[:, :1]
    rgb = grey.expand(-1, 3, -1, -1)
    assert score(list(grey[:60]), list(grey[60:]), extractor="random") == score(
        list(rgb[:60]), list(rgb[60:]), extractor="random"
    )


def test_progress_is_told(scenes: torch.Tensor) -> None:
    told: list[tuple[str, int, int]] = []
    score(list(scenes[:40]), list(scenes[40:]), extractor="random", batch_size=30, progress=lambda *state: told.append(state))
    assert told[:2] == [("samples", 30, 40), ("samples", 40, 40)]
    assert told[-1] == ("reference images", 80, 80)


def bad_sets() -> Iterator[Any]:
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    yield pytest.param([], [image] * 4, "samples are empty", id="no samples")
    yield pytest.param([image] * 4, [], "reference images are empty", id="no reference")
    yield pytest.param([image], [image] * 4, "samples are too few: 1", id="one sample")
    yield pytest.param([image] * 4, [image], "reference images are too few: 1", id="one reference image")
    yield pytest.param([image] * 4, [image[:, :8]] * 4, "16×16 with 3 channels and the reference images 8×16", id="other size")
    yield pytest.param([image, image[:, :8]], [image] * 4, "image 1 of the samples is 8×16", id="mixed sizes")
    yield pytest.param([image.float()] * 4, [image] * 4, "must be uint8", id="float")
    yield pytest.param([image[0]] * 4, [image] * 4, "must be uint8 tensors of shape", id="no channels")
    yield pytest.param(["a"] * 4, [image] * 4, "the first is str", id="no tensors")
    yield pytest.param([image[:2]] * 4, [image[:2]] * 4, "2 channels cannot be scored", id="two channels")


@pytest.mark.parametrize(("samples", "reference", "message"), list(bad_sets()))
def test_sets_that_cannot_be_compared(samples: Any, reference: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(samples, reference, extractor="random")


@pytest.mark.parametrize("metrics", [["isc"], ["fid", "x"], []])
def test_unknown_metrics(metrics: list[str], scenes: torch.Tensor) -> None:
    with pytest.raises(InputError, match="unknown metric"):
        score(list(scenes), list(scenes), metrics=metrics, extractor="random")
