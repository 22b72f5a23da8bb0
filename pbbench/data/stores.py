"""Where an ``ImageSet`` has its pixels: decoded files in memory, files decoded as they are asked for, files that were decoded
once and lie on disk as arrays, or built-in scenes.
"""

from __future__ import annotations

import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pbbench.data import synthetic
from pbbench.data.decode import check_header, decode, quiet
from pbbench.data.entries import (
    HEAD_BYTES,
    Entry,
    Result,
    Source,
    Unreadable,
    attempt,
    load_in_order,
    read_bytes,
    useful_threads,
)
from pbbench.data.prepared_set import Prepared
from pbbench.data.sources import Lmdb, Zip
from pbbench.errors import InputError

logger = logging.getLogger(__name__)

Indices = NDArray[np.int64]


class Store(ABC):
    """What ``ImageSet`` asks of all of them. ``in_memory``: reading is free; ``skipped``: unreadable files, as far as known."""

    def __init__(
        self, name: str, size: tuple[int, int], count: int, *, in_memory: bool, skipped: Iterable[tuple[str, str]] = ()
    ) -> None:
        self.name, self.size, self.in_memory, self._count = name, size, in_memory, count
        self.skipped: list[Unreadable] = [Unreadable(*pair) for pair in skipped]

    def __len__(self) -> int:
        return self._count

    @abstractmethod
    def read(self, indices: Indices, first: int, count: int) -> torch.Tensor:
        """uint8 (N, 3, H, W): the images of these numbers, counted from ``first``, in a part of ``count``."""

    @abstractmethod
    def describe(self, count: int) -> str:
        """The set in words."""

    @abstractmethod
    def identity(self, first: int, count: int) -> Iterable[object]:
        """The facts that a fingerprint is made of."""

    def checksums(self, first: int, count: int) -> list[int]:
        """Of the files behind a set whose ``identity`` knows less than all of them; none where it does."""
        return []

    def record(self, found: Iterable[Unreadable]) -> None:
        """Put files that proved unreadable on ``skipped``, each once, with a word in the log."""
        for unreadable in found:
            if unreadable not in self.skipped:
                self.skipped.append(unreadable)
                logger.warning("%s: %s cannot be read (%s); the next image stands in for it", self.name, *unreadable)


class _FileStore(Store):
    """What the two stores of files share."""

    _entries: Sequence[Entry] = ()

    def _loaded(self, source: Source, load: Callable[[Entry], Result]) -> Iterator[Result]:
        """What ``load`` makes of the files that it can read, as many as are wanted; the others are put on ``skipped``."""
        for outcome in load_in_order(source.entries, self._count, load, useful_threads(source.entries)):
            if isinstance(outcome, Unreadable):
                self.skipped.append(outcome)
            else:
                yield outcome
        self.skipped.sort()

    def __len__(self) -> int:
        return len(self._entries)

    def describe(self, count: int) -> str:
        return f"{self.name}: {count:,} images, {len(self.skipped):,} skipped"

    def identity(self, first: int, count: int) -> Iterator[object]:
        return ([entry.name, entry.size, entry.crc] for entry in self._entries[first : first + count])


class MemoryStore(_FileStore):
    """Every readable file decoded on opening into one uint8 tensor; a whole-file CRC-32 is taken on the way."""

    def __init__(self, source: Source, size: tuple[int, int], wanted: int) -> None:
        super().__init__(source.name, size, wanted, in_memory=True, skipped=source.refused)
        self._memory = torch.empty((wanted, 3, *size), dtype=torch.uint8)

        def load(entry: Entry) -> tuple[Entry, NDArray[np.uint8]]:
            data = read_bytes(source, entry)
            return replace(entry, crc=zlib.crc32(data)), decode(data, size)

        entries: list[Entry] = []
        for entry, pixels in self._loaded(source, load):
            self._memory[len(entries)] = torch.from_numpy(pixels)
            entries.append(entry)
        self._entries = entries

    def read(self, indices: Indices, first: int, count: int) -> torch.Tensor:
        return torch.from_numpy(self._memory.numpy()[indices + first])


class LazyStore(_FileStore):
    """A set too large for memory: headers checked on opening, files decoded when asked for. Of an LMDB not even headers are
    read: its images are millions, and have come from where they were checked."""

    def __init__(self, source: Source, size: tuple[int, int], wanted: int) -> None:
        super().__init__(source.name, size, wanted, in_memory=False, skipped=source.refused)
        self._source = source

        def check(entry: Entry) -> Entry:
            with source.open(entry) as file:
                if entry.crc is None:
                    entry = replace(entry, crc=zlib.crc32(file.read(HEAD_BYTES)))
                    file.seek(0)
                check_header(file)
            return entry

        self._entries = source.entries[:wanted] if isinstance(source, Lmdb) else list(self._loaded(source, check))

    def checksums(self, first: int, count: int) -> list[int]:
        """Of a folder's files, whose starts alone stand in ``identity``; all of them are read. −1: cannot be read any more."""
        source = self._source
        if isinstance(source, Zip):
            return []
        found = (attempt(lambda e: zlib.crc32(read_bytes(source, e)), e) for e in self._entries[first : first + count])
        return [-1 if isinstance(crc, Unreadable) else crc for crc in found]

    def _decode(self, entry: Entry) -> NDArray[np.uint8]:
        return decode(read_bytes(self._source, entry), self.size)

    def read(self, indices: Indices, first: int, count: int) -> torch.Tensor:
        images = np.empty((len(indices), 3, *self.size), np.uint8)
        with quiet():
            for row, index in enumerate(indices):
                images[row] = self._readable(int(index), first, count)
        return torch.from_numpy(images)

    def _readable(self, index: int, first: int, count: int) -> NDArray[np.uint8]:
        """Image ``index`` or, where its file proves damaged, the next readable one: the same whichever process asks."""
        for step in range(count):
            outcome = attempt(self._decode, self._entries[first + (index + step) % count])
            if not isinstance(outcome, Unreadable):
                return outcome
            self.record([outcome])
        raise InputError(f"no image of {self.name} can be read any more")


class PreparedStore(Store):
    """A set that was decoded once: images are copied out of mapped files, so that the system's cache serves every process.

    ``lazily``: whether the set it was made from would be decoded as it is used, and known by less than its whole files."""

    def __init__(self, prepared: Prepared, wanted: int, lazily: bool) -> None:
        super().__init__(prepared.name, prepared.size, wanted, in_memory=not lazily, skipped=prepared.broken)
        self._prepared = prepared

    def read(self, indices: Indices, first: int, count: int) -> torch.Tensor:
        images = np.empty((len(indices), 3, *self.size), np.uint8)
        for row, number in enumerate((indices + first).tolist()):
            shard, place = divmod(number, self._prepared.images_per_shard)
            images[row] = self._prepared.shard(shard)[place]
        return torch.from_numpy(images)

    def describe(self, count: int) -> str:
        return self._prepared.describe(count)

    def identity(self, first: int, count: int) -> Iterator[object]:
        if self._prepared.kind == "synthetic":
            yield from scene_identity(self._prepared.seed, first, count)
            return
        for name, size, crc, listed in self._prepared.images(first, count):
            yield [name, size, crc if self.in_memory else listed]

    def checksums(self, first: int, count: int) -> list[int]:
        if self.in_memory or self._prepared.kind == "synthetic":
            return []
        return [crc for _, _, crc, _ in self._prepared.images(first, count)]


class SceneStore(Store):
    """The built-in scenes: drawn when first asked for and, where the whole set fits the memory limit, kept."""

    def __init__(self, size: tuple[int, int], count: int, seed: int, keep: bool) -> None:
        super().__init__("synthetic scenes", size, count, in_memory=keep)
        self.seed = seed
        self._kept = torch.empty((count if keep else 0, 3, *size), dtype=torch.uint8)
        self._drawn = np.zeros(count if keep else 0, bool)

    def read(self, indices: Indices, first: int, count: int) -> torch.Tensor:
        numbers = indices + first
        if not self.in_memory:
            return torch.from_numpy(synthetic.scenes(self.seed, numbers, self.size))
        kept = self._kept.numpy()
        missing = np.unique(numbers[~self._drawn[numbers]])
        if missing.size:
            kept[missing] = synthetic.scenes(self.seed, missing, self.size)
            self._drawn[missing] = True
        return torch.from_numpy(kept[numbers])

    def describe(self, count: int) -> str:
        return f"{self.name}, seed {self.seed}: {count:,} images"

    def identity(self, first: int, count: int) -> list[object]:
        return scene_identity(self.seed, first, count)


def scene_identity(seed: int, first: int, count: int) -> list[object]:
    return ["synthetic", synthetic.VERSION, seed, first, count]
