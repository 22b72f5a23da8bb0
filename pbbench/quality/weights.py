"""Inception's weights: where they come from, and that they are what they say, before anything is computed with them.

torch-fidelity unpickles any weights file it is given and accepts whatever lies in torch hub's cache. Here a file is
opened by ``torch.load(weights_only=True)`` (no code can run), its tensors are matched with torch-fidelity's own network, and
its SHA-256 decides whether the result may be called FID.
"""

from __future__ import annotations

import hashlib
import io
import os
import queue
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pbbench.errors import InputError, one_line

WEIGHTS_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's own download (tests compare it with torch-fidelity's constant)."""
WEIGHTS_NAME = WEIGHTS_URL.rpartition("/")[2]
PUBLISHED_SHA256 = "6726825d"
"""First digits of the published file's SHA-256; torch hub's convention puts them into its name."""
WEIGHTS_VARIABLE = "PBBENCH_INCEPTION_WEIGHTS"
INCEPTION = "inception-v3-compat"
"""torch-fidelity's name of the network that FID is defined on."""
INCEPTION_LAYER = "2048"


@dataclass(frozen=True)
class Weights:
    """A checked weights file."""

    path: Path
    sha256: str
    origin: str
    """Where the path came from: the option, the environment variable, torch hub's cache or the download."""

    @property
    def published(self) -> bool:
        """Only with the published file may a distance be called FID or KID."""
        return self.sha256.startswith(PUBLISHED_SHA256)


def hub_cache() -> Path:
    """Where torch hub (and so torch-fidelity) keeps the file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME


def resolve_inception_weights(
    path: str | os.PathLike[str] | None = None,
    *,
    allow_download: bool = True,
    timeout_seconds: float = 5.0,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """The first of: ``path``, $PBBENCH_INCEPTION_WEIGHTS, torch hub's cache, torch-fidelity's download; checked.

    ``timeout_seconds`` bounds the wait for the server (name resolution included) and for each next block; ``progress`` is
    called with (bytes so far, bytes in all or 0). Raises InputError where a named file is absent or foreign, or where there
    is none and it cannot be had; a named file is never passed over for the next source.
    """
    variable = os.environ.get(WEIGHTS_VARIABLE)
    if path is not None:
        return check_weights(Path(path).expanduser(), "--inception-weights")
    if variable:
        return check_weights(Path(variable).expanduser(), WEIGHTS_VARIABLE)
    cached = hub_cache()
    if cached.exists():
        return check_weights(cached, "torch hub's cache")
    if not allow_download:
        raise InputError(_missing("downloading is switched off"))
    _download(cached, timeout_seconds, progress)
    return check_weights(cached, "download")


def check_weights(path: Path, origin: str) -> Weights:
    """Open without executing anything, match names and shapes with torch-fidelity's network, hash. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{origin}: no Inception weights file at {path}; {_remedy()}")
    try:
        state = _read(path, map_location="meta")
        with torch.device("meta"):
            _network(state)
    except Exception as error:  # anything a foreign file can make torch.load or load_state_dict raise
        raise InputError(
            f"{origin}: {path} does not hold torch-fidelity's Inception weights ({one_line(error)[:160]}); {_remedy()}"
        ) from None
    with path.open("rb") as file:
        return Weights(path, hashlib.file_digest(file, "sha256").hexdigest(), origin)


def build_inception(weights: Weights) -> Any:
    """torch-fidelity's extractor with these weights, in eval mode on the CPU. It is given a copy of the tensors that were
    read safely, so the file itself is never unpickled."""
    return _network(_read(weights.path, map_location="cpu"))


def _read(path: Path, map_location: str) -> Any:
    return torch.load(path, weights_only=True, map_location=map_location)


def _network(state: Any) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError("it is not a dict of tensors")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return FeatureExtractorInceptionV3(INCEPTION, [INCEPTION_LAYER], feature_extractor_weights_path=buffer)


def _download(target: Path, timeout: float, progress: Callable[[int, int], None] | None) -> None:
    """Fetch the published file aside, check its SHA-256, rename it into place. Raises InputError."""
    aside = None
    try:
        response = _open_url(WEIGHTS_URL, timeout)
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, size, total = hashlib.sha256(), 0, int(response.headers.get("Content-Length") or 0)
        with response, tempfile.NamedTemporaryFile(prefix=f".{target.name}.", dir=target.parent, delete=False) as file:
            aside = Path(file.name)
            while block := response.read(1 << 20):
                digest.update(block)
                file.write(block)
                size += len(block)
                if progress:
                    progress(size, total)
        if not digest.hexdigest().startswith(PUBLISHED_SHA256):
            raise InputError(_missing(f"the download from {WEIGHTS_URL} is damaged: sha256 {digest.hexdigest()[:16]}…"))
        os.replace(aside, target)
    except OSError as error:  # URLError and timeouts included
        raise InputError(_missing(f"the download failed ({one_line(error)})")) from None
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def _open_url(url: str, timeout: float) -> Any:
    """urlopen in a thread: its timeout does not cover name resolution, which may hang for minutes without a network."""
    answer: queue.Queue[Any] = queue.Queue()

    def ask() -> None:
        try:
            answer.put(urllib.request.urlopen(url, timeout=timeout))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        result = answer.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout:g} s") from None
    if isinstance(result, Exception):
        raise result
    return result


def _missing(why: str) -> str:
    return f"Inception weights {WEIGHTS_NAME} are needed for FID and {why}; {_remedy()}"


def _remedy() -> str:
    return (
        f"fetch {WEIGHTS_URL} on a machine with a network, then give it with --inception-weights FILE or "
        f"{WEIGHTS_VARIABLE}=FILE, or put it at {hub_cache()}"
    )
