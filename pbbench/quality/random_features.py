"""A stand-in feature extractor that needs no download: fixed random filters, measured as log energies on a pyramid.

It serves where Inception's weights are not to be had: it orders blur, noise, wrong colours, broken layout and seams, but it
knows nothing of what the images show. Energies averaged over an image take a seam for an edge like others; so the profiles also
say along which rows and columns edges lie: in real images anywhere, in patches that do not fit at their borders. Its distances
are never called FID and compare with nothing but themselves (same version, same image size, same number of images).

Importing this module imports torch_fidelity (seconds) and registers the extractor there under ``RANDOM_FEATURES``, so that
``torch_fidelity.calculate_metrics(feature_extractor=RANDOM_FEATURES, …)`` takes it too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

RANDOM_FEATURES = "pbbench-random-features-v2"
"""The name under which torch-fidelity knows it; the version changes whenever a feature does."""

LAYER = "log-energies"
NUM_SCALES, FIRST, SECOND, LAYOUT, PROFILE = 4, 24, 40, 4, 31
NUM_FEATURES = NUM_SCALES * (FIRST + SECOND) + 3 * LAYOUT**2 + 2 * PROFILE
SEED = 0
FLOOR = 1e-4
"""Added to every mean square before its logarithm: about one grey level of 255, squared."""


class RandomFeatures(FeatureExtractorBase):
    """uint8 N, 3, H, W (H, W ≥ 8) → float32 N, 366: the colours of a 4 × 4 layout, per scale the log energies of two layers
    of random filters, then the log energies of 31 columns' and 31 rows' steps to the next. Works at the images' own
    resolution, deterministic on one device."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(SEED)
        self.register_buffer("first", _filters((NUM_SCALES, FIRST, 3, 5, 5), generator))
        self.register_buffer("second", _filters((NUM_SCALES, SECOND, FIRST, 3, 3), generator))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = images.float() / 127.5 - 1  # N 3 H W
        features = [F.adaptive_avg_pool2d(x, LAYOUT).flatten(1)]  # colour and layout
        for scale in range(NUM_SCALES):
            r = F.relu(F.conv2d(_pad(x, 2), self.first[scale]))  # N 24 H W: edges and textures of either polarity
            features.append(_log_energy(r))
            contrast = F.avg_pool2d(_pad(r.square().mean(1, keepdim=True), 2), 5, stride=1)  # N 1 H W
            r = F.avg_pool2d(r / (contrast + FLOOR).sqrt(), 2)  # N 24 H/2 W/2: where they lie, whatever the contrast
            features.append(_log_energy(F.conv2d(_pad(r, 1), self.second[scale])))
            if min(x.shape[2:]) >= 8:
                x = F.avg_pool2d(x, 2)
        x = images.float() / 127.5 - 1
        features += [_profile(x.diff(dim=3).square().mean((1, 2))), _profile(x.diff(dim=2).square().mean((1, 3)))]
        return (torch.cat(features, 1),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


def _filters(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random filters of zero mean and unit norm: they answer to structure, not to brightness."""
    weight = torch.randn(shape, generator=generator)
    weight -= weight.mean((-2, -1), keepdim=True)
    return weight / weight.flatten(2).norm(dim=2)[:, :, None, None, None]


def _pad(x: Tensor, by: int) -> Tensor:
    return F.pad(x, (by, by, by, by), mode="reflect")


def _log_energy(r: Tensor) -> Tensor:
    """N, K, H, W → N, K: half the logarithm of the mean square, 0 at an amplitude of one tenth."""
    return 0.5 * torch.log((r.square().mean((2, 3)) + FLOOR) / 0.01)


def _profile(mean_square: Tensor) -> Tensor:
    """N, W - 1 → N, PROFILE: the log energies of so many stretches of equal length."""
    stretches = F.adaptive_avg_pool1d(mean_square[:, None], PROFILE)[:, 0]
    return 0.5 * torch.log((stretches + FLOOR) / 0.01)


if RANDOM_FEATURES not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(RANDOM_FEATURES, RandomFeatures)
