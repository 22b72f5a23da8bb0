"""The feature extractors and what distances between their features are called; ``EXTRACTORS`` is the place to add one.

Only Inception with the published weights makes figures named FID and KID. A column that is new here gets its words for readers
in ``records.quality_names``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pbbench.quality.weights import INCEPTION, Weights, build_inception, resolve_inception_weights


@dataclass(frozen=True)
class Distances:
    """The names of the figures of one extractor."""

    frechet: str
    kernel: str
    """Without ``_mean``."""
    note: str | None = None
    """What a reader has to know of them."""
    few_frechet: str | None = None
    """The Frechet distance of no more images than features; None: the same name."""
    precision: str = "precision"
    recall: str = "recall"


@dataclass(frozen=True)
class Extractor:
    """A network on its device, and what its features are."""

    network: Any
    """uint8 N, 3, H, W → a tuple whose first is float32 N, ``num_features``."""
    description: str
    kind: str
    """Key of ``DISTANCES``."""
    num_features: int
    identity: str
    """What tells it apart in the cache."""
    device: torch.device


@dataclass(frozen=True)
class Entry:
    build: Callable[[Weights | None, torch.device], Extractor]
    """Takes the weights where they are known; resolves them where they are None and it needs some."""
    distances: dict[str, Distances]
    """Kind of its features → the names."""
    smallest: int = 1
    """Pixels of the shorter side that it takes."""


def _inception(weights: Weights | None, device: torch.device) -> Extractor:
    weights = weights or resolve_inception_weights()
    network = build_inception(weights).to(device)
    precision = str(next(network.parameters()).dtype).removeprefix("torch.")  # read off: asking for float64 gives float32
    description = f"{INCEPTION}, 2048 features, {precision}, weights sha256 {weights.sha256[:8]}"
    kind = "published" if weights.published else "unverified"
    return Extractor(network, description, kind, 2048, f"{description}: {weights.sha256}", device)


def _random(weights: Weights | None, device: torch.device) -> Extractor:
    from pbbench.quality.random_features import LAYER, NUM_FEATURES, RANDOM_FEATURES, RandomFeatures

    network: Any = RandomFeatures(RANDOM_FEATURES, [LAYER]).eval().to(device)
    description = f"{RANDOM_FEATURES}, {NUM_FEATURES} features, float32"
    return Extractor(network, description, "random", NUM_FEATURES, description, device)


EXTRACTORS = {
    "inception": Entry(
        _inception,
        {
            "published": Distances(
                "frechet_inception_distance",
                "kernel_inception_distance",
                few_frechet="few_images_inception_frechet_distance",
            ),
            "unverified": Distances(
                "unverified_inception_frechet_distance",
                "unverified_inception_kernel_distance",
                note="the weights are not the published Inception weights: this is not FID",
                precision="unverified_inception_precision",
                recall="unverified_inception_recall",
            ),
        },
    ),
    "random": Entry(
        _random,
        {
            "random": Distances(
                "random_features_frechet_distance",
                "random_features_kernel_distance",
                note="random features, not FID: compare only figures of this extractor, image size and number of images",
                precision="random_features_precision",
                recall="random_features_recall",
            )
        },
        smallest=8,
    ),
}
DISTANCES = {kind: names for entry in EXTRACTORS.values() for kind, names in entry.distances.items()}
"""``Extractor.kind`` → the names of its distances."""


def build_extractor(name: str, weights: Weights | None, device: torch.device | str) -> Extractor:
    return EXTRACTORS[name].build(weights, torch.device(device))


def metric_names(kind: str, num_rows: int, num_features: int, of: str = "images") -> tuple[Distances, list[str]]:
    """(the names for so many images or patches, notes for the reader).

    ``num_rows`` counts the smaller set's. With no more of them than features their covariance is singular and the Frechet
    distance biased upward, so it is not called FID; the kernel distance is unbiased at any number.
    """
    names, few = DISTANCES[kind], num_rows <= num_features
    notes = [f"{num_rows} {of} for {num_features} features: the Frechet distance is biased upward"] if few else []
    notes += [names.note] if names.note else []
    frechet = (few and names.few_frechet) or names.frechet
    return replace(names, frechet=frechet.replace("frechet", "patch_frechet") if of == "patches" else frechet), notes
