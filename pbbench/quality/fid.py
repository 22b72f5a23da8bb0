"""Distances between two sets of images through torch-fidelity: Frechet (of images, and of patches at full resolution) and
kernel distance, precision and recall.

Features come from torch-fidelity's Inception (or another of ``extractors``), metrics from its metric functions,
with every setting pinned in ``SETTINGS``: ``calculate_metrics`` on the same images gives the same digits (tests hold it to
that). Calling the functions instead of ``calculate_metrics`` keeps pickles out: weights and cached features are read by us.

The names of the results say what was computed (``metric_names``): FID and KID are Inception features with the
published weights, and FID takes more images than it has features; anything else goes under another name. Beside each distance
stands its 95% interval (see ``intervals``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.processes import Processes
from pbbench.quality.batches import Images, check_pair
from pbbench.quality.extractors import EXTRACTORS, Distances, build_extractor, metric_names
from pbbench.quality.features import PATCHES_PER_IMAGE, SMALLEST, WHOLE, Progress, extract_cached, patch_cut
from pbbench.quality.intervals import FEWEST, TOO_FEW, frechet_left_out, interval, kernel_left_out, random_groups
from pbbench.quality.weights import MissingWeightsError, Weights, resolve_inception_weights

__all__ = ["METRICS", "SETTINGS", "MissingWeightsError", "resolve_inception_weights", "score"]

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


def score(
    samples: Images,
    reference: Images,
    *,
    metrics: Sequence[str] = ("fid", "kid", "prc"),
    extractor: Literal["inception", "random"] = "inception",
    weights: Weights | None = None,
    kid_subset_size: int = 1000,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Compare two sets of uint8 C, H, W images (C = 3, or 1, which is repeated) of one size.

    Returns the distances under honest names (``metric_names``), each with its 95% interval [low, high] as ``NAME_interval``,
    precision and recall (of other features than the published Inception's under other names, too) where asked for, and beside
    them ``extractor``, ``num_images``, ``num_reference_images``, ``seed`` (of KID's subsets and the intervals' groups),
    ``kid_subset_size`` (clipped to the smaller set), ``num_patches`` and ``patches`` (how they were cut), ``left_out`` (name →
    the distance without each group of samples, see ``intervals``), ``reasons`` (name → why it is None) and ``notes`` (for the
    reader). ``weights`` None: they are resolved. ``cache`` is a folder that keeps the features of sets that say what they hold
    (``content_fingerprint``). ``processes``: they share the images out and
    all call this with the same; the first returns the figures, the others {}. Raises InputError for sets that cannot be
    compared, unknown metrics, and weights that are absent or foreign.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise InputError(f"unknown metric {', '.join(unknown) or '(none given)'}; there are {', '.join(METRICS)}")
    shape = check_pair(samples, reference, at_least=2)
    if shape[0] not in (1, 3):
        raise InputError(f"images with {shape[0]} channels cannot be scored; the extractors take 3 (or 1, which is repeated)")
    smallest = EXTRACTORS[extractor].smallest
    if min(shape[1:]) < smallest:
        what = f"images of {shape[1]}×{shape[2]} are too small for the {extractor} extractor"
        raise InputError(f"{what}; it takes {smallest}×{smallest} or more")
    built = build_extractor(extractor, weights, device)
    possible = {"images": WHOLE, "patches": patch_cut(*shape[1:])}
    wanted = {of: cut for of, cut in possible.items() if any(METRICS[metric].of == of for metric in metrics)}
    cuts = [cut for cut in wanted.values() if cut]
    of_samples, of_reference = (
        extract_cached(built, images, name, shape, cuts, batch_size, cache, progress, processes)
        for images, name in ((samples, "samples"), (reference, "reference images"))
    )
    if processes.rank > 0:
        return {}

    found, groups = Found(), random_groups(len(samples), seed)
    for of, cut in wanted.items():
        rows = cut.rows if cut else PATCHES_PER_IMAGE
        names, notes = metric_names(built.kind, rows * min(len(samples), len(reference)), built.num_features, of)
        found.notes += [note for note in notes if note not in found.notes]
        if cut is None:
            why = f"patches would be smaller than {SMALLEST}×{SMALLEST} pixels"
            found.values[names.frechet], found.reasons[names.frechet] = None, why
            continue
        features = of_samples[cut.name], of_reference[cut.name]
        pair = Pair(*features, groups.repeat_interleave(rows), names, kid_subset_size, seed)
        for name, metric in METRICS.items():
            if name in metrics and metric.of == of:
                metric.add(found, pair)
        if of == "patches":
            found.values |= {"num_patches": rows * len(samples), "patches": cut.name}
    return found.values | {
        "extractor": built.description,
        "num_images": len(samples),
        "num_reference_images": len(reference),
        "seed": seed,
        "left_out": found.left_out,
        "reasons": found.reasons,
        "notes": found.notes,
    }


@dataclass(frozen=True)
class Pair:
    """The features of two sets, whole or in patches, and what is done with them."""

    samples: Tensor  # rows × features
    reference: Tensor
    groups: Tensor
    """The group of each row of the samples, for the intervals."""
    names: Distances
    kid_subset_size: int
    seed: int


@dataclass
class Found:
    """Figures as they are found, with the reasons for those that are None."""

    values: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def add_frechet(found: Found, pair: Pair) -> None:
    name = pair.names.frechet
    found.values[name] = distance = _frechet(pair.samples, pair.reference)
    found.values[f"{name}_interval"] = None
    if distance is None:
        found.reasons[name] = "the square root of the covariances' product failed numerically"
        found.reasons[f"{name}_interval"] = "there is no distance"
    elif len(pair.groups) < FEWEST:
        found.reasons[f"{name}_interval"] = TOO_FEW
    else:
        left_out = frechet_left_out(pair.samples, pair.reference, pair.groups)
        found.left_out[name] = left_out.tolist()
        low, high = interval(distance, left_out)
        found.values[f"{name}_interval"] = [max(low, 0.0), high]


def add_kernel(found: Found, pair: Pair) -> None:
    name, size = pair.names.kernel, min(pair.kid_subset_size, len(pair.samples), len(pair.reference))
    mean, spread = _kernel(pair.samples, pair.reference, size, pair.seed)
    found.values |= {f"{name}_mean": mean, f"{name}_std": spread, f"{name}_mean_interval": None, "kid_subset_size": size}
    if spread is None:
        found.reasons[f"{name}_std"] = "every subset is the whole set"
    if len(pair.groups) < FEWEST:
        found.reasons[f"{name}_mean_interval"] = TOO_FEW
    else:
        of_subsets = (spread or 0.0) ** 2 / SETTINGS["kid_subsets"]  # that another choice of subsets would make
        left_out = kernel_left_out(pair.samples, pair.reference, pair.groups)
        found.left_out[f"{name}_mean"] = left_out.tolist()
        found.values[f"{name}_mean_interval"] = interval(mean, left_out, of_subsets)
    if size < (asked := pair.kid_subset_size):
        found.notes.append(f"subsets of the kernel distance hold {size} images, not {asked}: one set has no more")


def add_precision_recall(found: Found, pair: Pair) -> None:
    names = pair.names.precision, pair.names.recall
    found.values |= zip(names, _precision_recall(pair.samples, pair.reference), strict=True)
    if found.values[names[0]] is None:
        found.reasons |= dict.fromkeys(names, f"takes more than {SETTINGS['prc_neighborhood']} images in each set")


@dataclass(frozen=True)
class Metric:
    add: Callable[[Found, Pair], None]
    of: Literal["images", "patches"] = "images"
    """What of an image goes through the extractor."""


METRICS = {
    "fid": Metric(add_frechet),
    "kid": Metric(add_kernel),
    "prc": Metric(add_precision_recall),
    "patch": Metric(add_frechet, of="patches"),
}
"""``quality.metrics`` → how its figures are found: the place to add one. The setting, which knows no torch, names the same ones
(a test compares them)."""


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
