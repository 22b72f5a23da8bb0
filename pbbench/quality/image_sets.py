"""What ``pbbench fid`` scores: a folder, a zip, the built-in scenes, or a checkpoint's samples; in shares where there are
several processes.

Files are read in the order of their paths. A process reads or draws the images of its own share only, and what it has of them
is what one process would have: the sets, the order and the batches do not depend on how many share the work.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pbbench.errors import InputError
from pbbench.experiment.experiment import parse_experiment
from pbbench.processes import Processes

_GROUP = 16  # images per task of a decoding thread


class InPathOrder:
    """An image set by its files' paths; the scenes, which have none, as they come."""

    def __init__(self, images: Any) -> None:
        self.images = images
        names = images.names()
        self.order = sorted(range(len(images)), key=names.__getitem__) if names else range(len(images))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[self.order[index]]


class Share:
    """A set of ``total`` images of which only those numbered ``held`` are here."""

    def __init__(self, images: Sequence[Any], held: range, total: int, image_shape: tuple[int, int, int]) -> None:
        self._images, self._held, self._total, self.image_shape = images, held, total, image_shape

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> Any:
        return self._images[self._held.index(index)]


def is_checkpoint(name: str) -> bool:
    folder = Path(name)
    return (folder / "config.json").exists() or (folder / "checkpoints").is_dir()


def native_size(name: str) -> tuple[int, int] | None:
    """(height, width) of a checkpoint's images or of a set's first readable image; None for the built-in scenes."""
    from PIL import Image

    from pbbench.data.sources import Prepared, open_source
    from pbbench.training.checkpoint import read_config

    if name == "synthetic":
        return None
    if is_checkpoint(name):
        return parse_experiment(read_config(name)["experiment"], name).model.size
    source = open_source(name)
    if isinstance(source, Prepared):
        return source.size
    for entry in source.entries:
        with contextlib.suppress(OSError, ValueError), source.open(entry) as file, Image.open(file) as image:
            return image.height, image.width
    raise InputError(f"{name} holds no readable image (JPEG, PNG or WebP)")


def open_set(
    name: str, size: tuple[int, int], num_images: int | None, device: str, processes: Processes, batch_size: int
) -> tuple[Any, str]:
    """(a set of uint8 images in which this process's share can be had, what it is); ``batch_size`` is the extractor's, by
    which the images are shared out."""
    if is_checkpoint(name):
        return _drawn(Path(name), num_images, device, processes, batch_size)
    from pbbench.data.images import MEMORY_LIMIT_BYTES, open_images

    if processes.count > 1:
        # Headers are looked at by every process, pixels are decoded by one. A file that proves damaged behind its header would
        # be left out by a single process, and all later images would move up: then every process reads the whole set.
        images = open_images(name, size, num_images, memory_limit_bytes=0)
        if len(images) * 3 * size[0] * size[1] <= MEMORY_LIMIT_BYTES:
            held, known = processes.share(len(images), batch_size), len(images.skipped)
            decoded = _decoded(InPathOrder(images), held)
            if not processes.any_of_all(len(images.skipped) > known):
                return Share(decoded, held, len(images), (3, *size)), images.description
    images = open_images(name, size, num_images)
    return InPathOrder(images), images.description


def _decoded(ordered: InPathOrder, numbers: range) -> list[Any]:
    """Those images as uint8 tensors; the cores are shared with the other processes of this machine."""
    from pbbench.data import stores
    from pbbench.data.decode import quiet

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = [[ordered.order[n] for n in numbers[k : k + _GROUP]] for k in range(0, len(numbers), _GROUP)]
    log = logging.getLogger(stores.__name__)
    log.disabled = True  # it would tell of a stand-in for a damaged file, and none is scored
    try:
        with quiet(), ThreadPoolExecutor(max(1, min(16, cores // here))) as pool:
            return [image for batch in pool.map(ordered.images.batch, groups) for image in batch]
    finally:
        log.disabled = False


def _drawn(
    checkpoint: Path, num_images: int | None, device_name: str, processes: Processes, batch_size: int
) -> tuple[Share, str]:
    """A checkpoint's samples. Shares go by the extractor's batches: where those are no multiple of the sampler's, the batch on
    the border of two shares is drawn in both processes."""
    from pbbench.model.diffusion import Diffusion
    from pbbench.training.checkpoint import load_model
    from pbbench.training.generate import draw

    device = processes.device(device_name)
    model, experiment = load_model(checkpoint, device)
    count = num_images or experiment.quality.num_images
    held, diffusion = processes.share(count, batch_size), Diffusion(experiment.diffusion, device)
    images = [image for _, image in draw(model, diffusion, experiment.sampling, count, device, wanted=held)]
    shape = (experiment.model.channels, *experiment.model.size)
    return Share(images, held, count, shape), f"{count:,} samples of {checkpoint.name}, seed {experiment.sampling.seed}"
