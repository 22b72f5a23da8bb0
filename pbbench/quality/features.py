"""From images to features: an extractor run once over a set, on whole images and on patches of them, and the features of real
images kept between scores.

Images go from memory straight into the network; no file lies between sampling and scoring. Several processes share them out by
whole batches, the batches that one process would make, so that not even the rounding depends on their number.

Patches are cut out at full resolution: Inception sees every image at 299 × 299, so of a larger one the fine detail is gone
before its features are taken (as in the patch FID of Chai et al. 2022, "Any-resolution training"). One size serves all
dividers, so that their figures compare. The places are random, drawn from the image's index alone: a fixed grid would have its
lines where some dividers have their patch borders, and would never show those seams.

torch-fidelity's own cache is keyed by a name the caller makes up and unpickles what it finds; this one is keyed by everything
that decides the features (the data's content, its size, the extractor with its weights, the libraries' versions), and holds
safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbbench.errors import StorageError
from pbbench.processes import Processes
from pbbench.quality.batches import Images, batches
from pbbench.quality.extractors import Extractor
from pbbench.records.files import write_bytes

Progress = Callable[[str, int, int], None]
"""Called with (which set, images done, images in this process's share)."""

PATCHES_PER_IMAGE = 4
SMALLEST = 8
"""Pixels: patches with a shorter side are not scored."""
PATCH_SEED = 0


@dataclass(frozen=True)
class Cut:
    """What of each image goes through the extractor; ``name`` keys the cached features."""

    name: str
    cut: Callable[[Tensor, int], Tensor]
    """(batch N, C, H, W; index of its first image) → what the network sees."""
    rows: int = 1
    """What becomes of one image."""


WHOLE = Cut("whole images", lambda batch, first: batch)


def patch_cut(height: int, width: int) -> Cut | None:
    """The cut into patches, in words what a figure rests on; None where they would be smaller than ``SMALLEST``."""
    h, w = patch_size(height, width)
    if min(h, w) < SMALLEST:
        return None
    name = f"{PATCHES_PER_IMAGE} patches of {h}×{w} an image, at random places (seed {PATCH_SEED})"
    return Cut(name, cut_patches, PATCHES_PER_IMAGE)


def patch_size(height: int, width: int) -> tuple[int, int]:
    """A quarter of each side, but 32 pixels where that is more, and never above half: 32 × 32 of 128², 16 × 16 of 32²."""
    return min(max(height // 4, 32), height // 2), min(max(width // 4, 32), width // 2)


def cut_patches(batch: Tensor, first: int) -> Tensor:
    """Images ``first`` and on of a set, N, C, H, W, to N · 4, C, h, w: the four of an image one after another."""
    height, width = batch.shape[-2:]
    h, w = patch_size(height, width)
    generator = np.random.default_rng(PATCH_SEED)
    generator.bit_generator.advance(first * PATCHES_PER_IMAGE * 2)  # type: ignore[attr-defined]  # one step a number
    places = generator.random((len(batch), PATCHES_PER_IMAGE, 2))  # in [0, 1)
    top, left = (places * (height - h + 1, width - w + 1)).astype(int).transpose(2, 0, 1)  # N 4 each
    cut = [
        image[:, y : y + h, x : x + w]
        for image, ys, xs in zip(batch, top.tolist(), left.tolist(), strict=True)
        for y, x in zip(ys, xs, strict=True)
    ]
    return torch.stack(cut)


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


def extract_cached(
    extractor: Extractor,
    images: Images,
    name: str,
    shape: tuple[int, int, int],
    cuts: Sequence[Cut],
    batch_size: int,
    cache: Path | None,
    progress: Progress | None,
    processes: Processes,
) -> dict[str, Tensor]:
    """As ``extract``; with a ``cache`` folder only what it does not hold is computed, and then stored there: of sets that say
    what they hold, such as the reference images. The first process alone reads and writes it, and the others compute with it
    what it lacks."""
    cache = cache if processes.rank == 0 else None
    settings = {"extractor": extractor.identity, "device": extractor.device.type, "batch_size": batch_size}
    keys = {cut: feature_key(images, shape, {"cut": cut.name, **settings}) if cache else None for cut in cuts}
    kept = {cut: load_features(cache, key) if cache and key else None for cut, key in keys.items()}
    absent = [cut for cut in cuts if processes.any_of_all(processes.rank == 0 and kept[cut] is None)]
    found = extract(extractor, images, name, absent, batch_size, progress, processes)
    for cut in absent:
        if cache and (key := keys[cut]):
            with contextlib.suppress(StorageError):  # a full disk costs the next score time, not this one its figures
                store_features(cache, key, found[cut.name])
    return {cut.name: features for cut, features in kept.items() if features is not None} | found


CHECKSUM = "features_sha256"
"""Among a file's metadata: safetensors itself would not notice a changed byte."""


def feature_key(images: Images, shape: tuple[int, int, int], settings: dict[str, Any]) -> dict[str, str] | None:
    """What the features depend on; None where the set does not say what it holds (``content_fingerprint()``). ``settings``: the
    extractor with its weights, what it is shown of an image, the device, and the batch size (which decides the rounding)."""
    fingerprint = getattr(images, "content_fingerprint", None)
    if fingerprint is None:
        return None
    facts: dict[str, Any] = {
        **settings,
        "data": fingerprint(),  # the files' content, and how they become pixels
        "num_images": len(images),
        "shape": shape,
        "torch": torch.__version__,
        "torch_fidelity": version("torch-fidelity"),
        "pillow": version("pillow"),  # the decoder: another version may round a JPEG's pixels differently
    }
    return {name: str(value) for name, value in facts.items()}


def load_features(folder: Path, key: dict[str, str]) -> Tensor | None:
    """float32 rows × features; None where there are none for this key or the file is damaged or another's."""
    from safetensors import safe_open

    try:
        with safe_open(_path(folder, key), framework="pt") as file:
            features = file.get_tensor("features")
            return features if file.metadata() == {**key, CHECKSUM: _checksum(features)} else None
    except Exception:  # absent or damaged: the caller computes them and stores them anew
        return None


def store_features(folder: Path, key: dict[str, str], features: Tensor) -> None:
    """Whole or not at all, so that a reader never meets half a file and writers do not collide. Raises StorageError."""
    from safetensors.torch import save

    features = features.contiguous()
    write_bytes(_path(folder, key), save({"features": features}, metadata={**key, CHECKSUM: _checksum(features)}))


def _checksum(features: Tensor) -> str:
    return hashlib.sha256(features.numpy().tobytes()).hexdigest()


def _path(folder: Path, key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"features-{digest[:32]}.safetensors"
