"""``pbbench fid``: scores of two sets of images, each a folder, a zip, the built-in scenes or a checkpoint's samples.

Files are read in the order of their paths and KID's subsets are drawn from torch-fidelity's own seed, so that the figures are
those of its command line on the same folders to the last digit: the order decides which images a subset holds, and how the
sums are rounded. The processes of a torchrun share the images out by whole batches of the extractor (``quality.features``), so
the digits are those of one process, too: a process reads or draws the images of its own share only, and what it has of them is
what one process would have.
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
from pbbench.experiment.settings import QualityConfig
from pbbench.processes import Processes, joined_processes
from pbbench.records.quality_names import DISTANCE_WORDS, quality_label

KNOWN = QualityConfig().metrics
METRICS = tuple(metric for metric in KNOWN if metric != "patch")
"""What is computed where nothing is asked for; "patch" takes four more passes of the extractor an image."""
SEED = 2020
"""The default of torch-fidelity's command line (tests compare them)."""
_GROUP = 16  # images per task of a decoding thread


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
    so that a missing download is told in seconds and not after the images are read. To be called by every process of a
    torchrun; the first returns the scores, the others {}.
    """
    unknown = [name for name in metrics if name not in KNOWN]
    if unknown:
        raise InputError(f"--metrics: {unknown[0]!r} is not known; choose from {', '.join(KNOWN)}")
    for name in (samples, reference):
        if name != "synthetic" and not Path(name).exists():
            raise InputError(f"{name} does not exist; give a folder of images, a zip, a checkpoint folder, or synthetic")
    from pbbench.quality.fid import resolve_inception_weights, score

    settings = QualityConfig()
    with joined_processes() as processes:
        with processes.first_here_first():  # it may have to be downloaded
            found = resolve_inception_weights(weights)
        size = (image_size, image_size) if image_size else None
        size = size or native_size(samples) or native_size(reference)
        if size is None:
            raise InputError("give --image-size: synthetic images have no size of their own")
        (first, first_name), (second, second_name) = (
            open_set(name, size, num_images, device, processes, settings.batch_size) for name in (samples, reference)
        )
        scores = score(
            first,
            second,
            metrics=tuple(dict.fromkeys(metrics)),
            weights=found,
            kid_subset_size=settings.kid_subset_size,
            batch_size=settings.batch_size,
            device=processes.device(device),
            seed=SEED,
            processes=processes,
        )
    told = {"image_size": f"{size[0]}×{size[1]}", "samples": first_name, "reference": second_name}
    scores.pop("left_out", None)
    return {**scores, **told} if scores else {}


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
    from pbbench.model.placement import cast_weights
    from pbbench.training.checkpoint import load_model
    from pbbench.training.generate import draw

    device = processes.device(device_name)
    model, experiment = load_model(checkpoint, device)
    cast_weights(model, experiment.sampling.mixed_precision)
    count = num_images or experiment.quality.num_images
    held, diffusion = processes.share(count, batch_size), Diffusion(experiment.diffusion, device)
    images = [image for _, image in draw(model, diffusion, experiment.sampling, count, device, wanted=held)]
    shape = (experiment.model.channels, *experiment.model.size)
    return Share(images, held, count, shape), f"{count:,} samples of {checkpoint.name}, seed {experiment.sampling.seed}"
