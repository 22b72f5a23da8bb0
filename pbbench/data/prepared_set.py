"""A folder that ``pbbench data prepare`` made: images of one size as uint8 arrays that load by memory map.

``index.json``              what was packed from what, how, and the shards with their SHA-256; written last
``shard-00000.npy`` …       uint8 (n, 3, H, W), all but the last with ``images_per_shard`` images; the source's own order
``shard-00000.json`` …      the shard's images as [name, file size, CRC-32, CRC-32 as listed], so that fingerprints can be told
``unfinished.json``         only until the set is complete: the settings it was begun with

The pixels are those of ``decode.decode``, unflipped: flips are drawn per epoch when the images are loaded, packed or not, so
training takes the same course to the bit. (As before, the flip comes after the centre crop; the released code's comes before
it, which shifts a flipped image by one pixel where an odd number of columns is cut off.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pbbench.data import decode, synthetic
from pbbench.data.entries import Unreadable, printable
from pbbench.errors import InputError, one_line

FORMAT, FORMAT_VERSION = "pbbench-images", 1
INDEX, UNFINISHED = "index.json", "unfinished.json"
AGAIN = "run pbbench data prepare again, which keeps what is sound"


def is_prepared(path: Path) -> bool:
    """Whether the folder is ours, finished or not. Other data sets have an index.json, too: ours begins with its format."""
    try:
        with open(path / INDEX, "rb") as file:
            return f'"format": "{FORMAT}"'.encode() in file.read(64)
    except OSError:
        return os.path.isfile(path / UNFINISHED)


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


def record_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.json"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of ours. Raises InputError where the file is absent, broken or none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        what = "it is no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        what = getattr(error, "strerror", None) or one_line(error)[:100]
    raise InputError(f"cannot read {printable(str(path))}: {what}; {AGAIN}")


class Prepared:
    """A finished set. ``size``: (H, W). Raises InputError where it is unfinished, broken, or of another version."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, printable(path.resolve().name)
        self._maps: dict[int, NDArray[np.uint8]] = {}
        shown = printable(str(path))
        if not (path / INDEX).is_file():
            raise InputError(f"{shown} is not finished: {AGAIN}")
        index = read_object(path / INDEX)
        version = index.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"{shown} has format version {version!r}, this pbbench reads {FORMAT_VERSION}; prepare it anew")
        try:
            settings: dict[str, Any] = index["settings"]
            self.source_name, self.kind, self.seed = settings["source"], settings["kind"], settings["seed"]
            self.images_per_shard = int(settings["images_per_shard"])
            self.num_images = int(index["num_images"])
            self.counts = [int(shard["count"]) for shard in index["shards"]]
            self.broken = [Unreadable(*pair) for pair in index["broken"]]
            height, width = settings["size"]
            self.size: tuple[int, int] = (int(height), int(width))
            preprocessing = settings["preprocessing"]
            lengths = [int(shard["bytes"]) for shard in index["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{shown}/{INDEX} is broken ({one_line(error)}): {AGAIN}") from None
        current = [decode.VERSION, synthetic.VERSION if self.kind == "synthetic" else None]
        if preprocessing != current:
            raise InputError(f"{shown} was prepared by other rules (version {preprocessing}, now {current}); prepare it anew")
        for number, length in enumerate(lengths):
            file = shard_file(path, number)
            if not (os.path.isfile(file) and file.stat().st_size == length):
                raise InputError(f"{printable(str(file))} is absent or not of {length:,} bytes: {AGAIN}")

    def describe(self, count: int) -> str:
        return f"{self.name} (prepared from {self.source_name}): {count:,} images, {len(self.broken):,} skipped"

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises InputError where the images are of another (H, W)."""
        if size != self.size:
            have, want = (f"{height}×{width}" for height, width in (self.size, size))
            raise InputError(
                f"{printable(str(self.path))} was prepared at {have}, asked for is {want}; "
                f"prepare another folder with --size {size_text(size)}, or use images of {have}"
            )

    def shard(self, number: int) -> NDArray[np.uint8]:
        """The shard as (n, 3, H, W), mapped into memory and not read. Raises InputError where it is no such array any more."""
        if number not in self._maps:
            file = shard_file(self.path, number)
            try:
                pixels = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise InputError(f"cannot read {printable(str(file))} ({one_line(error)}): {AGAIN}") from None
            if pixels.dtype != np.uint8 or pixels.shape != (self.counts[number], 3, *self.size):
                raise InputError(f"{printable(str(file))} holds {pixels.dtype} {pixels.shape}: {AGAIN}")
            self._maps[number] = np.asarray(pixels)  # indexing a plain view is quicker than a memmap
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a map would be sent to a worker process as its pixels

    def images(self, first: int, count: int) -> Iterator[list[Any]]:
        """[name, file size, CRC-32, CRC-32 as listed] of some images; of built-in scenes there is nothing to say."""
        number, skip = divmod(first, self.images_per_shard)
        while count > 0:
            file = record_file(self.path, number)
            try:
                part = list(islice(read_object(file)["images"], skip, skip + count))
            except (KeyError, TypeError):
                part = []
            if not part:
                raise InputError(f"{printable(str(file))} is broken: {AGAIN}")
            yield from part
            number, skip, count = number + 1, 0, count - len(part)


def size_text(size: tuple[int, int]) -> str:
    """(H, W) as ``--size`` takes it."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"
