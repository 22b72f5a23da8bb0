"""``pbbench fid``: scores of two sets of images, each a folder, a zip, the built-in scenes or a checkpoint's samples.

Files are read in the order of their paths and KID's subsets are drawn from torch-fidelity's own seed, so that the figures are
those of its command line on the same folders to the last digit: the order decides which images a subset holds, and how the
sums are rounded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pbbench.config import QualityConfig, parse_experiment
from pbbench.errors import InputError
from pbbench.report.names import DISTANCE_WORDS, quality_label

METRICS = ("fid", "kid", "prc")
"""What is computed where nothing is asked for; "patch" takes four more passes of the extractor an image."""
KNOWN = (*METRICS, "patch")
SEED = 2020
"""The default of torch-fidelity's command line (tests compare them)."""


def score_sets(
    samples: str,
    reference: str,
    *,
    metrics: Sequence[str],
    weights: str | None,
    num_images: int | None,
    image_size: int | None,
    device: str,
) -> dict[str, Any]:
    """Scores by torch-fidelity under their honest names, with the number of images of each set.

    Raises InputError where a set is absent or empty, a metric is unknown, or the Inception weights cannot be had: that first,
    so that a missing download is told in seconds and not after the images are read.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("pbbench fid runs in one process: draw with pbbench sample under torchrun, then score that folder")
    unknown = [name for name in metrics if name not in KNOWN]
    if unknown:
        raise InputError(f"--metrics: {unknown[0]!r} is not known; choose from {', '.join(KNOWN)}")
    for name in (samples, reference):
        if name != "synthetic" and not Path(name).exists():
            raise InputError(f"{name} does not exist; give a folder of images, a zip, a checkpoint folder, or synthetic")
    from pbbench.quality.fid import resolve_inception_weights, score

    found = resolve_inception_weights(weights)
    size = (image_size, image_size) if image_size else None
    size = size or _native_size(samples) or _native_size(reference)
    if size is None:
        raise InputError("give --image-size: synthetic images have no size of their own")
    (first, first_name), (second, second_name) = (_open(name, size, num_images, device) for name in (samples, reference))
    settings = QualityConfig()
    scores = score(
        first,
        second,
        metrics=tuple(dict.fromkeys(metrics)),
        weights=found,
        kid_subset_size=settings.kid_subset_size,
        batch_size=settings.batch_size,
        device=device,
        seed=SEED,
    )
    return {**scores, "image_size": f"{size[0]}×{size[1]}", "samples": first_name, "reference": second_name}


def lines(scores: dict[str, Any]) -> list[str]:
    """The scores for a terminal: figures under the names they are cited by, with their intervals, then what they rest on."""
    shown: list[tuple[str, str]] = []
    for name, value in scores.items():
        if name.endswith("_interval") or name in ("reasons", "notes"):
            continue
        label = quality_label(name, [scores["num_images"]]) if name in DISTANCE_WORDS else name.replace("_", " ")
        text = f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value)
        reason = scores["reasons"].get(name)
        interval = scores.get(f"{name}_interval")
        told = f"({reason})" if reason else f"(95% interval {interval[0]:.6g} to {interval[1]:.6g})" if interval else ""
        shown.append((label, f"{text}  {told}".rstrip()))
    width = max(len(label) for label, _ in shown)
    return [f"{label:<{width}}  {text}" for label, text in shown] + [f"note: {note}" for note in scores["notes"]]


class _InPathOrder:
    """An image set by its files' paths; the scenes, which have none, as they come."""

    def __init__(self, images: Any) -> None:
        self._images = images
        names = images.names()
        self._order = sorted(range(len(images)), key=names.__getitem__) if names else range(len(images))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        return self._images[self._order[index]]


def _is_checkpoint(name: str) -> bool:
    folder = Path(name)
    return (folder / "config.json").exists() or (folder / "checkpoints").is_dir()


def _native_size(name: str) -> tuple[int, int] | None:
    """(height, width) of a checkpoint's images or of a set's first readable image; None for the built-in scenes."""
    from PIL import Image

    from pbbench.training.checkpoint import read_config
    from pbbench.training.sources import Prepared, open_source

    if name == "synthetic":
        return None
    if _is_checkpoint(name):
        return parse_experiment(read_config(name)["experiment"], name).model.size
    source = open_source(name)
    if isinstance(source, Prepared):
        return source.size
    for entry in source.entries:
        with contextlib.suppress(OSError, ValueError), source.open(entry) as file, Image.open(file) as image:
            return image.height, image.width
    raise InputError(f"{name} holds no readable image (JPEG, PNG or WebP)")


def _open(name: str, size: tuple[int, int], num_images: int | None, device_name: str) -> tuple[Any, str]:
    """(a Dataset of uint8 images, what it is)."""
    import torch

    from pbbench.model.diffusion import Diffusion
    from pbbench.training.checkpoint import load_model
    from pbbench.training.data import open_images
    from pbbench.training.generate import generate

    if not _is_checkpoint(name):
        images = open_images(name, size, num_images)
        return _InPathOrder(images), images.description
    device = torch.device(device_name)
    model, experiment = load_model(Path(name), device)
    count = num_images or experiment.quality.num_images
    samples = generate(model, Diffusion(experiment.diffusion, device), experiment.sampling, count, device)
    return samples, f"{count:,} samples of {Path(name).name}, seed {experiment.sampling.seed}"
