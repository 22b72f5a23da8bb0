"""Distances between two sets of images through torch-fidelity: Frechet and kernel distance, precision and recall.

Every setting is pinned in ``SETTINGS``. The names of the results say what was computed: FID and KID are Inception features
with the published weights, and FID needs more images than it has features; anything else goes under another name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.quality.batches import Images, batches, check_pair, count
from pbbench.quality.weights import INCEPTION, INCEPTION_LAYER, Weights, build_inception, resolve_inception_weights

__all__ = ["SETTINGS", "Weights", "resolve_inception_weights", "score"]

SETTINGS: dict[str, Any] = {
    "kid_subsets": 100,
    "kid_kernel": "poly",
    "kid_kernel_poly_degree": 3,
    "kid_kernel_poly_gamma": None,  # 1 / number of features
    "kid_kernel_poly_coef0": 1,
    "prc_neighborhood": 3,
    "prc_batch_size": 10_000,
    "save_cpu_ram": False,
    "verbose": False,
}
"""torch-fidelity's metric settings: its defaults, stated, so that another version's defaults change nothing."""

METRICS = ("fid", "kid", "prc")
Extractor = Literal["inception", "random"]
Progress = Callable[[str, int, int], None]
"""Called with (which set, images done, images in all)."""


def score(
    samples: Images,
    reference: Images,
    *,
    metrics: Sequence[str] = METRICS,
    extractor: Extractor = "inception",
    weights: Weights | None = None,
    kid_subset_size: int = 1000,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two Datasets of uint8 C, H, W images (C = 3, or 1, which is repeated) of one size.

    Returns the distances under honest names (see ``metric_names``), ``precision`` and ``recall`` where asked for, and beside
    them ``extractor``, ``num_images``, ``num_reference_images``, ``seed`` (of KID's subsets), ``kid_subset_size`` (clipped to
    the smaller set), ``reasons`` (for what is None) and ``notes`` (for the reader). ``cache`` is a folder for the
    reference's features. Raises InputError for bad sets, unknown metrics and missing weights.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise InputError(f"unknown metric {', '.join(unknown) or '(none given)'}; there are {', '.join(METRICS)}")
    channels, height, width = check_pair(samples, reference)
    if channels not in (1, 3):
        raise InputError(f"images with {channels} channels cannot be scored; the extractors take 3 (or 1, which is repeated)")
    if extractor == "random" and min(height, width) < 8:
        raise InputError(f"images of {height}×{width} are too small for the random extractor; it takes 8×8 or more")
    network, identity, kind = _build(extractor, weights, device)
    features_1 = _features(network, samples, batch_size, device, "samples", progress)
    features_2 = _reference_features(network, identity, reference, batch_size, device, cache, progress)
    smaller = min(len(features_1), len(features_2))
    names, notes = metric_names(kind, smaller, features_1.shape[1])
    result: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    if "fid" in metrics:
        result[names["frechet"]], reason = _frechet(features_1, features_2)
        reasons |= {names["frechet"]: reason} if reason else {}
    if "kid" in metrics:
        size = min(kid_subset_size, smaller)
        result |= _kernel(features_1, features_2, names["kernel"], size, seed)
        if size < kid_subset_size:
            notes.append(
                f"the kernel distance uses subsets of {size} images (asked: {kid_subset_size}), all there are in one set"
            )
    if "prc" in metrics:
        found = _precision_recall(features_1, features_2)
        result |= found
        if found["precision"] is None:
            why = f"needs more than {SETTINGS['prc_neighborhood']} images in each set"
            reasons |= {"precision": why, "recall": why}
    return result | {
        "extractor": identity,
        "num_images": len(features_1),
        "num_reference_images": len(features_2),
        "seed": seed,
        "reasons": reasons,
        "notes": notes,
    }


def metric_names(kind: str, num_images: int, num_features: int) -> tuple[dict[str, str], list[str]]:
    """The names of the Frechet and kernel distance, and notes for the reader.

    ``kind`` is published, unverified or random; ``num_images`` counts the smaller set. The Frechet distance needs the covariance
    of all features, so with no more images than features it is biased upward and is not called FID; the kernel distance
    is unbiased at any number.
    """
    few = num_images <= num_features
    notes = [f"{num_images} images for {num_features} features: the Frechet distance is biased upward"] if few else []
    if kind == "random":
        notes.append("random features, not FID: compare only figures of this extractor, image size and number of images")
        return {"frechet": "random_features_frechet_distance", "kernel": "random_features_kernel_distance"}, notes
    if kind == "unverified":
        notes.append("the weights are not the published Inception weights: this is not FID")
        return {"frechet": "unverified_inception_frechet_distance", "kernel": "unverified_inception_kernel_distance"}, notes
    frechet = "few_images_inception_frechet_distance" if few else "frechet_inception_distance"
    return {"frechet": frechet, "kernel": "kernel_inception_distance"}, notes


def _build(extractor: Extractor, weights: Weights | None, device: torch.device | str) -> tuple[Any, str, str]:
    """(network on the device, its description for the result's ``extractor``, published | unverified | random)."""
    if extractor == "random":
        from pbbench.quality.extractors import LAYER, RANDOM_FEATURES, RandomFeatures

        network: Any = RandomFeatures(RANDOM_FEATURES, [LAYER]).eval().to(device)
        return network, f"{RANDOM_FEATURES} float32", "random"
    weights = weights or resolve_inception_weights()
    network = build_inception(weights).to(device)
    precision = str(next(network.parameters()).dtype).removeprefix("torch.")  # read off: asking for float64 gives float32
    identity = f"{INCEPTION} layer {INCEPTION_LAYER} {precision} weights sha256 {weights.sha256[:8]}"
    return network, identity, "published" if weights.published else "unverified"


@torch.no_grad()
def _features(
    network: Any, images: Images, batch_size: int, device: torch.device | str, name: str, progress: Progress | None
) -> Tensor:
    """float32 (images, features) on the CPU. TF32 and cuDNN's search are off: they would make the figure depend on the GPU."""
    found = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for batch in batches(images, batch_size, name):
            rgb = batch.to(device).expand(-1, 3, -1, -1)  # grey images: the one channel three times
            found.append(network(rgb)[0].cpu())
            if progress:
                progress(name, sum(map(len, found)), count(images))
    return torch.cat(found)


def _frechet(features_1: Tensor, features_2: Tensor) -> tuple[float | None, str | None]:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    one, two = fid_features_to_statistics(features_1), fid_features_to_statistics(features_2)
    value = fid_statistics_to_metric(one, two, verbose=False)["frechet_inception_distance"]
    scale = float(one["sigma"].trace() + two["sigma"].trace())
    if value < -1e-4 * scale:
        return None, f"the matrix square root failed: {value} with a total variance of {scale}"
    return max(value, 0.0), None  # rounding leaves about −1e-7 between equal sets


def _kernel(features_1: Tensor, features_2: Tensor, name: str, subset_size: int, seed: int) -> dict[str, Any]:
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(features_1, features_2, kid_subset_size=subset_size, rng_seed=seed, **SETTINGS)
    mean, spread = found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
    return {f"{name}_mean": mean, f"{name}_std": spread, "kid_subset_size": subset_size}


def _precision_recall(features_1: Tensor, features_2: Tensor) -> dict[str, float | None]:
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(features_1), len(features_2)) <= SETTINGS["prc_neighborhood"]:
        return {"precision": None, "recall": None}
    found = prc_features_to_metric(features_1, features_2, **SETTINGS)
    return {"precision": found["precision"], "recall": found["recall"]}


def _reference_features(
    network: Any,
    identity: str,
    reference: Images,
    batch_size: int,
    device: torch.device | str,
    cache: Path | None,
    progress: Progress | None,
) -> Tensor:
    """The reference's features, from ``cache`` where the same content, size and extractor have been there before."""
    fingerprint = getattr(reference, "fingerprint", None)
    if cache is None or fingerprint is None:
        return _features(network, reference, batch_size, device, "reference images", progress)
    from safetensors.torch import load_file, save_file

    key = json.dumps({"data": fingerprint(), "num_images": count(reference), "extractor": identity}, sort_keys=True)
    path = cache / f"features-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    try:
        features = load_file(path)["features"]
        if features.ndim == 2 and len(features) == count(reference):
            return features
    except Exception:  # absent or damaged: computed again and written anew
        pass
    features = _features(network, reference, batch_size, device, "reference images", progress)
    cache.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{id(features)}.aside")
    save_file({"features": features.contiguous()}, aside, metadata={"key": key})
    aside.replace(path)
    return features
