"""``pbbench fid``: scores of two sets of images, each a folder, a zip, the built-in scenes or a checkpoint's samples."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pbbench.config import QualityConfig, parse_experiment
from pbbench.errors import InputError

METRICS = ("fid", "kid", "prc")


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
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise InputError(f"--metrics: {unknown[0]!r} is not known; choose from {', '.join(METRICS)}")
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
    )
    return {**scores, "image_size": f"{size[0]}×{size[1]}", "samples": first_name, "reference": second_name}


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
        return images, images.description
    device = torch.device(device_name)
    model, experiment = load_model(Path(name), device)
    count = num_images or experiment.quality.num_images
    samples = generate(model, Diffusion(experiment.diffusion, device), experiment.sampling, count, device)
    return samples, f"{count:,} samples of {Path(name).name}, seed {experiment.sampling.seed}"
