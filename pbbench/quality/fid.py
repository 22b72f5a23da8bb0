"""Distances between two sets of images through torch-fidelity: Frechet and kernel distance, precision and recall.

Features come from torch-fidelity's Inception (or the random stand-in, see ``extractors``), metrics from its metric functions,
with every setting pinned in ``SETTINGS``: ``calculate_metrics`` on the same images gives the same digits (tests hold it to
that). Calling the functions instead of ``calculate_metrics`` keeps pickles out: weights and cached features are read by us.

The names of the results say what was computed (``metric_names``): FID and KID are Inception features with the
published weights, and FID takes more images than it has features; anything else goes under another name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.quality.batches import Images, batches, check_pair
from pbbench.quality.cache import feature_key, load_features, store_features
from pbbench.quality.weights import INCEPTION, MissingWeightsError, Weights, build_inception, resolve_inception_weights

__all__ = ["METRICS", "SETTINGS", "MissingWeightsError", "Weights", "metric_names", "resolve_inception_weights", "score"]

METRICS = ("fid", "kid", "prc")
SETTINGS: dict[str, Any] = {
    "kid_subsets": 100,
    "kid_kernel": "poly",
    "kid_kernel_poly_degree": 3,
    "kid_kernel_poly_gamma": None,  # 1 / number of features
    "kid_kernel_poly_coef0": 1,
    "prc_neighborhood": 3,
    "prc_batch_size": 10_000,
    "save_cpu_ram": True,  # precision and recall by blocks of rows: memory grows with the images, not with their square
    "verbose": False,
}
"""torch-fidelity's metric settings, stated, so that another version's defaults change nothing."""

Progress = Callable[[str, int, int], None]
"""Called with (which set, images done, images in all)."""


def score(
    samples: Images,
    reference: Images,
    *,
    metrics: Sequence[str] = METRICS,
    extractor: Literal["inception", "random"] = "inception",
    weights: Weights | None = None,
    kid_subset_size: int = 1000,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two sets of uint8 C, H, W images (C = 3, or 1, which is repeated) of one size.

    Returns the distances under honest names (``metric_names``), ``precision`` and ``recall`` where asked for, and beside them
    ``extractor``, ``num_images``, ``num_reference_images``, ``seed`` (of KID's subsets), ``kid_subset_size`` (clipped to the
    smaller set), ``reasons`` (name → why it is None) and ``notes`` (for the reader). ``weights`` None: they are resolved.
    ``cache`` is a folder that keeps the reference's features. Raises InputError for sets that cannot be compared, unknown
    metrics, and weights that are absent or foreign.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise InputError(f"unknown metric {', '.join(unknown) or '(none given)'}; there are {', '.join(METRICS)}")
    shape = check_pair(samples, reference, at_least=2)
    if shape[0] not in (1, 3):
        raise InputError(f"images with {shape[0]} channels cannot be scored; the extractors take 3 (or 1, which is repeated)")
    if extractor == "random" and min(shape[1:]) < 8:
        raise InputError(f"images of {shape[1]}×{shape[2]} are too small for the random extractor; it takes 8×8 or more")
    network, description, kind, identity = _build(extractor, weights, device)
    features_1 = _features(network, samples, "samples", batch_size, device, progress)
    key = feature_key(reference, shape, identity, device) if cache else None
    kept = load_features(cache, key) if cache and key else None
    features_2 = _features(network, reference, "reference images", batch_size, device, progress) if kept is None else kept
    if cache and key and kept is None:
        store_features(cache, key, features_2)

    smaller = min(len(features_1), len(features_2))
    frechet, kernel, notes = metric_names(kind, smaller, features_1.shape[1])
    result: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    if "fid" in metrics:
        result[frechet] = _frechet(features_1, features_2)
        if result[frechet] is None:
            reasons[frechet] = "the square root of the covariances' product failed numerically"
    if "kid" in metrics:
        size = min(kid_subset_size, smaller)
        result[f"{kernel}_mean"], result[f"{kernel}_std"] = _kernel(features_1, features_2, size, seed)
        result["kid_subset_size"] = size
        if result[f"{kernel}_std"] is None:
            reasons[f"{kernel}_std"] = "every subset is the whole set"
        if size < kid_subset_size:
            notes.append(f"subsets of the kernel distance hold {size} images, not {kid_subset_size}: one set has no more")
    if "prc" in metrics:
        result["precision"], result["recall"] = _precision_recall(features_1, features_2)
        if result["precision"] is None:
            reasons["precision"] = reasons["recall"] = f"takes more than {SETTINGS['prc_neighborhood']} images in each set"
    return result | {
        "extractor": description,
        "num_images": len(features_1),
        "num_reference_images": len(features_2),
        "seed": seed,
        "reasons": reasons,
        "notes": notes,
    }


def metric_names(kind: str, num_images: int, num_features: int) -> tuple[str, str, list[str]]:
    """(name of the Frechet distance, name of the kernel distance without ``_mean``, notes for the reader).

    ``kind`` is published, unverified (the weights file is another) or random; ``num_images`` counts the smaller set. With no
    more images than features their covariance is singular and the Frechet distance biased upward, so it is not called FID; the
    kernel distance is unbiased at any number.
    """
    few = num_images <= num_features
    notes = [f"{num_images} images for {num_features} features: the Frechet distance is biased upward"] if few else []
    if kind == "random":
        notes.append("random features, not FID: compare only figures of this extractor, image size and number of images")
        return "random_features_frechet_distance", "random_features_kernel_distance", notes
    if kind == "unverified":
        notes.append("the weights are not the published Inception weights: this is not FID")
        return "unverified_inception_frechet_distance", "unverified_inception_kernel_distance", notes
    frechet = "few_images_inception_frechet_distance" if few else "frechet_inception_distance"
    return frechet, "kernel_inception_distance", notes


def _build(extractor: str, weights: Weights | None, device: torch.device | str) -> tuple[Any, str, str, str]:
    """(network on the device, its description, published | unverified | random, what identifies it in the cache)."""
    if extractor == "random":
        from pbbench.quality.extractors import LAYER, NUM_FEATURES, RANDOM_FEATURES, RandomFeatures

        network: Any = RandomFeatures(RANDOM_FEATURES, [LAYER]).eval().to(device)
        description = f"{RANDOM_FEATURES}, {NUM_FEATURES} features, float32"
        return network, description, "random", description
    weights = weights or resolve_inception_weights()
    network = build_inception(weights).to(device)
    precision = str(next(network.parameters()).dtype).removeprefix("torch.")  # read off: asking for float64 gives float32
    description = f"{INCEPTION}, 2048 features, {precision}, weights sha256 {weights.sha256[:8]}"
    kind = "published" if weights.published else "unverified"
    return network, description, kind, f"{description}: {weights.sha256}"


@torch.no_grad()
def _features(
    network: Any, images: Images, name: str, batch_size: int, device: torch.device | str, progress: Progress | None
) -> Tensor:
    """float32 images × features on the CPU. TF32 is off: it would make the figure depend on the GPU's generation."""
    found: list[Tensor] = []
    done = 0
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for batch in batches(images, batch_size, name):
            rgb = batch.to(device).expand(-1, 3, -1, -1)  # N 3 H W: of a grey image the one channel three times
            found.append(network(rgb)[0].cpu())
            done += len(batch)
            if progress:
                progress(name, done, len(images))
    return torch.cat(found)


# Heusel et al. 2017, equation 6
def _frechet(features_1: Tensor, features_2: Tensor) -> float | None:
    """None where rounding has spoiled the matrix square root (a distance far below 0)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    one, two = fid_features_to_statistics(features_1), fid_features_to_statistics(features_2)
    distance = fid_statistics_to_metric(one, two, verbose=False)["frechet_inception_distance"]
    total_variance = float(one["sigma"].trace() + two["sigma"].trace())
    if not distance >= -1e-4 * total_variance:
        return None
    return max(distance, 0.0)  # between equal sets rounding leaves about −1e-7


# Binkowski et al. 2018, section 4
def _kernel(features_1: Tensor, features_2: Tensor, subset_size: int, seed: int) -> tuple[float, float | None]:
    """(mean, standard deviation over the subsets; None where all subsets are the same)."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(features_1, features_2, kid_subset_size=subset_size, rng_seed=seed, **SETTINGS)
    varied = subset_size < max(len(features_1), len(features_2))
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"] if varied else None


# Kynkäänniemi et al. 2019, equation 2
def _precision_recall(features_1: Tensor, features_2: Tensor) -> tuple[float | None, float | None]:
    """(precision, recall) of the samples (1) against the reference (2); None where a set has too few neighbours."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(features_1), len(features_2)) <= SETTINGS["prc_neighborhood"]:
        return None, None
    found = prc_features_to_metric(features_1, features_2, **SETTINGS)
    return found["precision"], found["recall"]
