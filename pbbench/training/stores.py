"""Where an ``ImageSet`` has its pixels: decoded files in memory, files decoded as they are asked for, or built-in scenes.

Each store answers the same questions: ``len``; ``read``, the images of some numbers, counted from ``first`` in a part of
``count``; ``describe``; ``identity``, the facts a fingerprint is made of; ``in_memory``, is reading free; ``skipped``.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pbbench.errors import InputError
from pbbench.training import synthetic
from pbbench.training.decode import check_header, decode, quiet, reason
from pbbench.training.sources import Entry, Folder, Zip, printable, read_bytes

logger = logging.getLogger(__name__)

Indices = NDArray[np.int64]
Result = TypeVar("Result")

_CHUNK = 512  # files in the air at a time
_GROUP = 16  # files per task of a decoding thread
_SMALL_FILE_BYTES = 8192
"""Decoding smaller files is mostly Python's own work, at which threads hinder each other (CIFAR-10: two 1.4 s, one 0.9 s)."""


class Unreadable(NamedTuple):
    """A file that was skipped: its name in the set, and why."""

    name: str
    reason: str


class Store(Protocol):
    size: tuple[int, int]
    in_memory: bool
    skipped: list[Unreadable]

    def __len__(self) -> int: ...
    def record(self, found: Iterable[Unreadable]) -> None: ...
    def read(self, indices: Indices, first: int, count: int) -> torch.Tensor: ...
    def describe(self, count: int) -> str: ...
    def identity(self, first: int, count: int) -> list[object]: ...


class _FileStore:
    """What the two stores of files share: the readable entries, and the unreadable ones by name."""

    def __init__(self, source: Folder | Zip, size: tuple[int, int]) -> None:
        self.size, self.name = size, source.name
        self.skipped: list[Unreadable] = [Unreadable(*refused) for refused in source.refused]
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, found: Iterable[Unreadable]) -> None:
        """Put files that proved unreadable on ``skipped``, each once, with a word in the log."""
        for unreadable in found:
            if unreadable not in self.skipped:
                self.skipped.append(unreadable)
                logger.warning("%s: %s cannot be read (%s); the next image stands in for it", self.name, *unreadable)

    def describe(self, count: int) -> str:
        return f"{self.name}: {count:,} images, {len(self.skipped):,} skipped"

    def identity(self, first: int, count: int) -> list[object]:
        return [[entry.name, entry.size, entry.crc] for entry in self._entries[first : first + count]]

    def _first_readable(self, entries: list[Entry], wanted: int, load: Callable[[Entry], Result]) -> Iterator[Result]:
        """``load`` of the first ``wanted`` entries that it manages, in order, by threads; those it does not are skipped."""

        def load_group(group: list[Entry]) -> list[Result | Unreadable]:
            return [_attempt(load, entry) for entry in group]

        small = sum(entry.size for entry in entries) < _SMALL_FILE_BYTES * len(entries)
        found, waiting = 0, iter(entries)
        with quiet(), ThreadPoolExecutor(1 if small else _num_cores()) as pool:
            while found < wanted and (chunk := list(islice(waiting, min(_CHUNK, wanted - found)))):
                for group in pool.map(load_group, (chunk[k : k + _GROUP] for k in range(0, len(chunk), _GROUP))):
                    for outcome in group:
                        if isinstance(outcome, Unreadable):
                            self.skipped.append(outcome)
                        else:
                            found += 1
                            yield outcome
        self.skipped.sort()


def _attempt(load: Callable[[Entry], Result], entry: Entry) -> Result | Unreadable:
    try:
        return load(entry)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything in a decoder
        return Unreadable(printable(entry.name), reason(error))


class MemoryStore(_FileStore):
    """Every readable file decoded on opening into one uint8 tensor; a whole-file CRC-32 is taken on the way."""

    in_memory = True

    def __init__(self, source: Folder | Zip, size: tuple[int, int], wanted: int) -> None:
        super().__init__(source, size)
        self._memory = torch.empty((wanted, 3, *size), dtype=torch.uint8)

        def load(entry: Entry) -> tuple[Entry, NDArray[np.uint8]]:
            data = read_bytes(source, entry)
            return replace(entry, crc=zlib.crc32(data)), decode(data, size)

        for entry, pixels in self._first_readable(source.entries, wanted, load):
            self._memory[len(self._entries)] = torch.from_numpy(pixels)
            self._entries.append(entry)

    def read(self, indices: Indices, first: int, count: int) -> torch.Tensor:
        return torch.from_numpy(self._memory.numpy()[indices + first])


class LazyStore(_FileStore):
    """A set too large for memory: headers checked on opening, files decoded when asked for."""

    in_memory = False

    def __init__(self, source: Folder | Zip, size: tuple[int, int], wanted: int) -> None:
        super().__init__(source, size)
        self._source = source

        def check(entry: Entry) -> Entry:
            with source.open(entry) as file:
                if entry.crc is None:
                    entry = replace(entry, crc=zlib.crc32(file.read(4096)))
                    file.seek(0)
                check_header(file)
            return entry

        self._entries = list(self._first_readable(source.entries, wanted, check))

    def checksums(self, first: int, count: int) -> list[int]:
        """Of a folder's files, whose starts alone stand in ``identity``; all of them are read. −1: cannot be read any more."""
        source = self._source
        if isinstance(source, Zip):
            return []
        found = (_attempt(lambda e: zlib.crc32(read_bytes(source, e)), e) for e in self._entries[first : first + count])
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
            outcome = _attempt(self._decode, self._entries[first + (index + step) % count])
            if not isinstance(outcome, Unreadable):
                return outcome
            self.record([outcome])
        raise InputError(f"no image of {self.name} can be read any more")


class SceneStore:
    """The built-in scenes: drawn when first asked for and, where the whole set fits the memory limit, kept."""

    def __init__(self, size: tuple[int, int], count: int, seed: int, keep: bool) -> None:
        self.size, self.seed, self.in_memory, self._count = size, seed, keep, count
        self.skipped: list[Unreadable] = []
        self._kept = torch.empty((count if keep else 0, 3, *size), dtype=torch.uint8)
        self._drawn = np.zeros(count if keep else 0, bool)

    def __len__(self) -> int:
        return self._count

    def record(self, found: Iterable[Unreadable]) -> None:
        self.skipped.extend(found)  # nothing: a scene is always readable

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
        return f"synthetic scenes, seed {self.seed}: {count:,} images"

    def identity(self, first: int, count: int) -> list[object]:
        return ["synthetic", synthetic.VERSION, self.seed, first, count]


def _num_cores() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
