"""What every source of image files hands out: entries by name, in one order, and how they are read; needs no torch.

The order is that of a hash of the name: sorted by the name itself, nested sets have one class after another; by its hash, the
first n images, the last n or any n in a row are a fair choice, and the same one everywhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import IO, NamedTuple, Protocol, TypeVar

from pbbench.data.decode import quiet, reason

MAX_FILE_BYTES = 2**29
"""A file (in a zip: its declared size) above this is not an image of a data set; it is named as unreadable, never loaded."""

HEAD_BYTES = 4096
"""How much of a file in a folder is summed where reading all of it would take too long."""

_CHUNK = 512  # files in the air at a time
_GROUP = 16  # files per task of a decoding thread
_SMALL_FILE_BYTES = 8192
"""Decoding smaller files is mostly Python's own work, at which threads hinder each other (CIFAR-10: two 1.4 s, one 0.9 s)."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file: its name in the set, its size in bytes, and its CRC-32 where a zip's directory states it."""

    name: str
    size: int
    crc: int | None = None


class Unreadable(NamedTuple):
    """A file that was skipped: its name in the set, and why."""

    name: str
    reason: str


class Source(Protocol):
    """A folder, a zip or an LMDB. ``refused``: parts of it that could not be listed, as (name, reason)."""

    name: str
    refused: list[tuple[str, str]]

    @property
    def entries(self) -> Sequence[Entry]: ...
    def open(self, entry: Entry) -> AbstractContextManager[IO[bytes]]: ...


def name_hash(name: bytes) -> bytes:
    """What the order goes by; equal ones (none are known) are ordered by the name."""
    return hashlib.blake2b(name, digest_size=8).digest()


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: (name_hash(entry.name.encode(errors="surrogateescape")), entry.name))


def printable(name: str) -> str:
    """A name for a message: on one line, and safe to encode whatever bytes the file system gave."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def notice(description: str, skipped: Sequence[Unreadable]) -> str:
    """What a set is and, by name, which of its files could not be read (the first five): for a person, in a few lines."""
    names = [f"  skipped {unreadable.name}: {unreadable.reason}" for unreadable in skipped[:5]]
    more = [f"  and {len(skipped) - 5:,} more"] if len(skipped) > 5 else []
    return "\n".join([description, *names, *more])


def read_bytes(source: Source, entry: Entry) -> bytes:
    """The whole file. Raises OSError, ValueError or what ``zipfile`` and ``lmdb`` raise on a damaged member."""
    if entry.size > MAX_FILE_BYTES:
        raise ValueError(f"{entry.size:,} bytes exceed the limit of {MAX_FILE_BYTES:,} for one image file")
    with source.open(entry) as file:
        return file.read()


def attempt(load: Callable[[Entry], Result], entry: Entry) -> Result | Unreadable:
    try:
        return load(entry)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything in a decoder
        return Unreadable(printable(entry.name), reason(error))


def load_in_order(
    entries: Iterable[Entry], wanted: int, load: Callable[[Entry], Result], threads: int
) -> Iterator[Result | Unreadable]:
    """``load`` of the first ``wanted`` entries that it manages and, in their places among them, those that it does not.
    Entries after the last wanted one are not looked at, so that the outcomes tell how far it came."""

    def load_group(group: list[Entry]) -> list[Result | Unreadable]:
        return [attempt(load, entry) for entry in group]

    found, waiting = 0, iter(entries)
    with quiet(), ThreadPoolExecutor(threads) as pool:
        while found < wanted and (chunk := list(islice(waiting, min(_CHUNK, wanted - found)))):
            for group in pool.map(load_group, (chunk[k : k + _GROUP] for k in range(0, len(chunk), _GROUP))):
                for outcome in group:
                    found += not isinstance(outcome, Unreadable)
                    yield outcome


def useful_threads(entries: Sequence[Entry]) -> int:
    """How many threads decode such files fastest; the first ones stand for all, their order being that of a hash."""
    sample = entries[:_CHUNK]
    if sum(entry.size for entry in sample) < _SMALL_FILE_BYTES * len(sample):
        return 1
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
