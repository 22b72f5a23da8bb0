"""Image file ↔ x_start: the first of the six stops that one image makes through the program; and sets of such images.

``open_images`` makes an ``ImageSet`` of a folder, a zip, an LMDB, a prepared set or the built-in scenes: a torch Dataset of
uint8 (3, H, W), unflipped, in an order that the names alone decide and that has nothing to do with what the images show. A
set that fits ``memory_limit_bytes`` once decoded is decoded on opening: every unreadable file is then known and named before
anything starts, and reading costs nothing afterwards. A larger one is decoded as it is used: its files' headers are checked
on opening, and a file that proves damaged later is recorded and replaced by the next readable one, so that a long training
run neither ends nor changes its course because of it.

How a file becomes pixels is in ``decode.py``, where files lie in ``sources.py``, what holds them in ``stores.py``, the
order in which training sees them in ``loader.py``, and how a set is packed for quicker loading in ``prepare.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from pbbench.data import decode as decoding
from pbbench.data import synthetic
from pbbench.data.entries import Unreadable, notice, printable
from pbbench.data.prepared_set import Prepared
from pbbench.data.sources import open_source
from pbbench.data.stores import LazyStore, MemoryStore, PreparedStore, SceneStore, Store
from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment

MEMORY_LIMIT_BYTES = 2**30


def load_image(path: str | os.PathLike[str], size: tuple[int, int]) -> torch.Tensor:
    """An image file as x_start: float32 (3, H, W) in [−1, 1] at ``size`` (H, W). Raises InputError where it cannot be read."""
    try:
        with decoding.quiet():
            pixels = decoding.decode(Path(path).read_bytes(), size)  # 3 H W
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"cannot read the image {path}: {decoding.reason(error)}") from None
    return to_x_start(torch.from_numpy(pixels))


def to_x_start(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0 … 255 to float32 in [−1, 1], any shape; in the released order of operations (÷ 255, · 2, − 1)."""
    return images.to(torch.float32).div_(255).mul_(2).sub_(1)


class ImageSet(Dataset[torch.Tensor]):
    """Images as uint8 (3, H, W) in a fixed order. Made by ``open_images``; ``subset`` gives a part that shares its pixels.

    ``size``: (H, W). ``in_memory``: whether reading is free. ``skipped``: unreadable files as (name, reason), complete on
    opening where the set is held in memory, otherwise growing with use.
    """

    def __init__(self, store: Store, first: int = 0, count: int | None = None) -> None:
        self._store, self._first, self._count = store, first, len(store) if count is None else count
        self.size: tuple[int, int] = store.size
        self.in_memory: bool = store.in_memory
        self.skipped: list[Unreadable] = store.skipped

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.batch([index % len(self)])[0]

    def notice(self) -> str:
        """The description and, by name, the first five files that could not be read: for a person, in a few lines."""
        return notice(self.description, self.skipped)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """Several images as one new uint8 (N, 3, H, W). Raises InputError where no image of the set can be read any more."""
        numbers = np.asarray(indices, np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"images {numbers.min()} to {numbers.max()} of {len(self)}")
        return self._store.read(numbers, self._first, self._count)

    def names(self) -> list[str]:
        """The files' names in the set's order, relative to the source; empty for the scenes."""
        facts = self._store.identity(self._first, self._count)
        return [str(fact[0]) for fact in facts if isinstance(fact, list)]

    def subset(self, start: int, stop: int) -> ImageSet:
        """Images ``start`` … ``stop`` − 1, to keep held-out images apart. Raises InputError where there are not so many."""
        if not 0 <= start < stop <= len(self):
            raise InputError(f"images {start} to {stop} are not in {self.description}; ask for a range within 0 to {len(self)}")
        return ImageSet(self._store, self._first + start, stop - start)

    def record(self, unreadable: Sequence[Unreadable]) -> None:
        """Add to ``skipped`` what a worker process found: its copy of the set is not this one."""
        self._store.record(unreadable)

    @property
    def description(self) -> str:
        """What the images are, for a report; never a path."""
        what = self._store.describe(self._count)
        whole = self._count == len(self._store)
        return what if whole else f"{what} (numbers {self._first:,} to {self._first + self._count - 1:,})"

    def fingerprint(self) -> str:
        """SHA-256 over what decides the pixels: preprocessing, size, and each image's name, file size and CRC-32.

        A zip's CRC-32s stand in its directory and those of a folder's files are taken while they are decoded, so a zip and the
        folder it unpacks to agree, and modification times do not matter. Of a folder too large to be decoded on opening, only
        the first 4 KiB of each file are summed, of such an LMDB nothing. The scenes are known by seed, numbers and version.

        A prepared set has the fingerprint of the set it was made from, so a run begun on one goes on with the other. They
        differ where a set decoded as it is used holds an image that is damaged behind its header: preparing leaves it out."""
        digest = hashlib.sha256(json.dumps([decoding.VERSION, list(self.size)])[:-1].encode())
        for fact in self._store.identity(self._first, self._count):  # one by one: of LSUN there are three million
            digest.update(f", {json.dumps(fact)}".encode())
        digest.update(b"]")
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        """As ``fingerprint``, but over whole files always, for what must not outlive any change of them: a folder too large to
        be decoded on opening is read once more."""
        sums = self._store.checksums(self._first, self._count)
        return hashlib.sha256(json.dumps([self.fingerprint(), sums]).encode()).hexdigest() if sums else self.fingerprint()


def open_images(
    source: str,
    size: tuple[int, int],
    num_images: int | None = None,
    seed: int = 0,
    *,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> ImageSet:
    """The images of a folder, a zip, an LMDB, a prepared set, or "synthetic" at ``size`` (H, W).

    ``num_images`` of the readable ones, a choice that the names alone decide; all of them where there are fewer or None is
    given (of the scenes of ``seed``, 10,000). Raises InputError where the source is absent, not permitted, broken, encrypted,
    without one readable image, or prepared at another size."""
    if num_images is not None and num_images < 1:
        raise InputError(f"num_images is {num_images}; it must be a positive number")
    bytes_per_image = 3 * size[0] * size[1]
    if source == "synthetic":
        count = num_images or synthetic.DEFAULT_COUNT
        return ImageSet(SceneStore(size, count, seed, keep=count * bytes_per_image <= memory_limit_bytes))
    files = open_source(source)
    if isinstance(files, Prepared):
        files.check_size(size)
        wanted = min(files.num_images, num_images or files.num_images)
        return ImageSet(PreparedStore(files, wanted, lazily=wanted * bytes_per_image > memory_limit_bytes))
    wanted = min(len(files.entries), num_images or len(files.entries))
    store = (MemoryStore if wanted * bytes_per_image <= memory_limit_bytes else LazyStore)(files, size, wanted)
    if not len(store):
        raise InputError(f"{printable(source)} holds no readable image (jpg, jpeg, png, webp){_examples(store.skipped)}")
    return ImageSet(store)


def training_and_held_out(experiment: Experiment) -> tuple[ImageSet, ImageSet | None]:
    """(training images, held-out images) of ``experiment.data``, decided once for training, scoring and the held-out loss; None
    where none are held out.

    The last ``data.num_held_out`` images are kept back, at most a tenth of the set. A set's order has nothing to do with what
    its images show (see ``open_images``), so both parts are random choices.
    """
    data = experiment.data
    images = open_images(data.source, experiment.model.size, data.num_images, experiment.data_seed)
    held_out = min(data.num_held_out, len(images) // 10)
    if not held_out:
        return images, None
    return images.subset(0, len(images) - held_out), images.subset(len(images) - held_out, len(images))


def _examples(skipped: list[Unreadable]) -> str:
    if not skipped:
        return ""
    shown = ", ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    return f"; {len(skipped):,} could not be read ({shown}{', …' if len(skipped) > 3 else ''})"
