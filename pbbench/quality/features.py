"""From images to features: an extractor run once over a set, on whole images and on patches of them, and the reference's
features kept between scores.

Images go from memory straight into the network; no file lies between sampling and scoring. Several processes share them out by
whole batches, the batches that one process would make, so that not even the rounding depends on their number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbbench.processes import Processes
from pbbench.quality import patches
from pbbench.quality.batches import Images, batches
from pbbench.quality.cache import feature_key, load_features, store_features
from pbbench.quality.weights import INCEPTION, Weights, build_inception, resolve_inception_weights

Progress = Callable[[str, int, int], None]
"""Called with (which set, images done, images in this process's share)."""


@dataclass(frozen=True)
class Cut:
    """What of each image goes through the extractor; ``name`` keys the cached features."""

    name: str
    cut: Callable[[Tensor, int], Tensor]
    """(batch N, C, H, W; index of its first image) → what the network sees."""


WHOLE = Cut("whole images", lambda batch, first: batch)


def patch_cut(height: int, width: int) -> Cut:
    return Cut(patches.description(height, width), patches.cut_patches)


@dataclass(frozen=True)
class Extractor:
    """A network on its device, and what its features are."""

    network: Any
    description: str
    kind: str
    """published or unverified (Inception with those weights), or random."""
    num_features: int
    identity: str
    """What tells it apart in the cache."""
    device: torch.device


def build_extractor(name: str, weights: Weights | None, device: torch.device | str) -> Extractor:
    """ "random" or "inception"; of the latter ``weights`` are resolved where they are None."""
    device = torch.device(device)
    if name == "random":
        from pbbench.quality.extractors import LAYER, NUM_FEATURES, RANDOM_FEATURES, RandomFeatures

        network: Any = RandomFeatures(RANDOM_FEATURES, [LAYER]).eval().to(device)
        description = f"{RANDOM_FEATURES}, {NUM_FEATURES} features, float32"
        return Extractor(network, description, "random", NUM_FEATURES, description, device)
    weights = weights or resolve_inception_weights()
    network = build_inception(weights).to(device)
    precision = str(next(network.parameters()).dtype).removeprefix("torch.")  # read off: asking for float64 gives float32
    description = f"{INCEPTION}, 2048 features, {precision}, weights sha256 {weights.sha256[:8]}"
    kind = "published" if weights.published else "unverified"
    return Extractor(network, description, kind, 2048, f"{description}: {weights.sha256}", device)


@torch.no_grad()
def extract(
    extractor: Extractor,
    images: Images,
    name: str,
    cuts: Sequence[Cut],
    batch_size: int,
    progress: Progress | None,
    processes: Processes,
) -> dict[str, Tensor]:
    """Name of the cut → float32 rows × features on the CPU, in the first process; in the others there are none. Each image is
    read once, whatever is cut from it. TF32 is off: it would make the figure depend on the GPU's generation."""
    share = processes.share(len(images), batch_size)
    found = {cut.name: [torch.empty(0, extractor.num_features)] for cut in cuts}
    done = 0
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for batch in batches(images, batch_size, name, share) if cuts else ():
            for cut in cuts:
                for part in cut.cut(batch, share.start + done).split(batch_size):
                    rgb = part.to(extractor.device).expand(-1, 3, -1, -1)  # N 3 H W: a grey image's channel three times
                    found[cut.name].append(extractor.network(rgb)[0].cpu())
            done += len(batch)
            if progress:
                progress(name, done, len(share))
    return {cut: processes.gather(torch.cat(parts)) for cut, parts in found.items()}


def extract_reference(
    extractor: Extractor,
    images: Images,
    shape: tuple[int, int, int],
    cuts: Sequence[Cut],
    batch_size: int,
    cache: Path | None,
    progress: Progress | None,
    processes: Processes,
) -> dict[str, Tensor]:
    """As ``extract``; with a ``cache`` folder only what it does not hold is computed, and then stored there. The first process
    alone reads and writes it, and the others compute with it what it lacks."""
    cache = cache if processes.rank == 0 else None
    settings = {"extractor": extractor.identity, "device": extractor.device.type, "batch_size": batch_size}
    keys = {cut: feature_key(images, shape, {"cut": cut.name, **settings}) if cache else None for cut in cuts}
    kept = {cut: load_features(cache, key) if cache and key else None for cut, key in keys.items()}
    absent = [cut for cut in cuts if processes.any_of_all(processes.rank == 0 and kept[cut] is None)]
    found = extract(extractor, images, "reference images", absent, batch_size, progress, processes)
    for cut in absent:
        if cache and (key := keys[cut]):
            with contextlib.suppress(OSError):  # a full disk costs the next score time, not this one its figures
                store_features(cache, key, found[cut.name])
    return {cut.name: features for cut, features in kept.items() if features is not None} | found
