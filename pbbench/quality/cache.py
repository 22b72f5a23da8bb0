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


def feature_key(
    images: Images, shape: tuple[int, int, int], extractor: str, device: torch.device | str
) -> dict[str, str] | None:
    """What the features depend on; None where the set does not say what it holds (no ``fingerprint()``)."""
    fingerprint = getattr(images, "fingerprint", None)
    if fingerprint is None:
        return None
    facts: dict[str, Any] = {
        "data": fingerprint(),
        "num_images": len(images),
        "shape": shape,
        "extractor": extractor,
        "device": torch.device(device).type,
        "torch": torch.__version__,
        "torch_fidelity": version("torch-fidelity"),
    }
    return {name: str(value) for name, value in facts.items()}


def load_features(folder: Path, key: dict[str, str]) -> Tensor | None:
    """float32 images × features; None where there are none for this key or the file is damaged or another's."""
    from safetensors import safe_open

    try:
        with safe_open(_path(folder, key), framework="pt") as file:
            features = file.get_tensor("features") if file.metadata() == key else None
    except Exception:  # absent or damaged: the caller computes them and stores them anew
        return None
    usable = features is not None and features.ndim == 2 and len(features) == int(key["num_images"])
    return features if usable else None


def store_features(folder: Path, key: dict[str, str], features: Tensor) -> None:
    """Written aside and renamed, so that a reader never meets half a file and writers do not collide."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    data = save({"features": features.contiguous()}, metadata=key)
    handle, aside = tempfile.mkstemp(prefix=".features-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(aside, _path(folder, key))
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _path(folder: Path, key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"features-{digest[:32]}.safetensors"
