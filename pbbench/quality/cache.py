"""Features of reference images kept between scores, under a key of everything that decides them.

torch-fidelity's own cache is keyed by a name the caller makes up and unpickles what it finds; this one is keyed by the
data's content, its size, the extractor with its weights, and the libraries' versions, and holds safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbbench.quality.batches import Images

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
    """Written aside and renamed, so that a reader never meets half a file and writers do not collide."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    features = features.contiguous()
    data = save({"features": features}, metadata={**key, CHECKSUM: _checksum(features)})
    handle, aside = tempfile.mkstemp(prefix=".features-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(aside, _path(folder, key))
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _checksum(features: Tensor) -> str:
    return hashlib.sha256(features.numpy().tobytes()).hexdigest()


def _path(folder: Path, key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"features-{digest[:32]}.safetensors"
