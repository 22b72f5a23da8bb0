"""Inception's weights: where they come from, and that they are what they say, before anything is computed with them.

torch-fidelity unpickles any weights file it is given and accepts whatever lies in torch hub's cache. Here a file is
opened by ``torch.load(weights_only=True)`` (no code can run), its tensors are matched with torch-fidelity's own network, and
its SHA-256 decides whether the result may be called FID.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import pickle
import queue
import tempfile
import threading
import urllib.request
import warnings
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


class MissingWeightsError(InputError):
    """No weights were named and none could be had: the one case in which a stand-in extractor may be chosen instead."""


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

    ``timeout_seconds`` bounds the wait for the server (name resolution included) and then for each block; ``progress`` is
    called with (bytes so far, bytes in all or 0). A file that was named is never passed over for the next source: where it is
    absent, unreadable or foreign, InputError says so. MissingWeightsError: none was named, and there is none.
    """
    if path is not None:
        return check_weights(Path(path).expanduser(), "--inception-weights")
    if variable := os.environ.get(WEIGHTS_VARIABLE):
        return check_weights(Path(variable).expanduser(), WEIGHTS_VARIABLE)
    cached = hub_cache()
    if cached.exists():
        return check_weights(cached, "torch hub's cache")
    if not allow_download:
        raise MissingWeightsError(_missing("downloading is switched off"))
    _download(cached, timeout_seconds, progress)
    return check_weights(cached, "download")


def check_weights(path: Path, origin: str) -> Weights:
    """Open without executing anything, match names and shapes with torch-fidelity's network, hash. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{origin}: there is no file at {path}; {_remedy()}")
    try:
        _network(_read(path, "meta"), "meta")  # names and shapes only: nothing is allocated
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except Exception as error:  # a foreign file can make torch.load and load_state_dict raise nearly anything
        again = f"delete it or {_remedy()}" if path == hub_cache() else _remedy()
        raise InputError(f"{origin}: {path} {_what_is_wrong(error)}; {again}") from None
    return Weights(path, sha256, origin)


def build_inception(weights: Weights) -> Any:
    """torch-fidelity's extractor with these weights, in eval mode on the CPU. It is given a copy of the tensors that were
    read safely, so the file itself is never unpickled."""
    return _network(_read(weights.path, "cpu"), "cpu")


def _read(path: Path, device: str) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on foreign pickles: the error that follows says what matters
        state = torch.load(path, weights_only=True, map_location=device)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise TypeError("not a dict of tensors")
    return state


def _network(state: dict[str, torch.Tensor], device: str) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with torch.device(device):
        return FeatureExtractorInceptionV3(
            INCEPTION, [INCEPTION_LAYER], feature_extractor_weights_path=buffer, feature_extractor_internal_dtype="float32"
        )


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or one_line(error)})"
    if isinstance(error, pickle.UnpicklingError):
        return "is not a torch file of plain tensors (anything else is refused unread: it could run code)"
    if isinstance(error, TypeError) or "state_dict" in str(error):
        return "holds other tensors than torch-fidelity's Inception network has"
    return "is damaged or not a torch file"


def _download(target: Path, timeout: float, progress: Callable[[int, int], None] | None) -> None:
    """Fetch the published file aside, check its SHA-256, rename it into place. Raises MissingWeightsError."""
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
            raise MissingWeightsError(_missing(f"what came from the network is damaged (sha256 {digest.hexdigest()[:8]}…)"))
        aside.chmod(0o644)
        aside.replace(target)
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        raise MissingWeightsError(_missing(f"the download failed ({one_line(error)})")) from None
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def _open_url(url: str, timeout: float) -> Any:
    """urlopen in a thread: its own timeout does not cover name resolution, which can hang for minutes without a network."""
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
    return f"FID and KID need Inception's weights, {WEIGHTS_NAME}, and there are none: {why}; {_remedy()}"


def _remedy() -> str:
    return (
        f"fetch {WEIGHTS_URL} on a machine with a network, then give it with --inception-weights FILE or "
        f"{WEIGHTS_VARIABLE}=FILE, or put it at {_shown(hub_cache())}"
    )


def _shown(path: Path) -> str:
    """With ~ for the home folder: these messages end up in results that people publish."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
