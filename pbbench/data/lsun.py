"""LSUN as its site gives it: a folder with ``data.mdb`` and ``lock.mdb`` (LMDB) whose values are encoded images.

LSUN's bedrooms are three million: their keys are listed once, as bytes beside each other and not as objects (about 65 bytes an
image), without touching the images themselves. Nothing is written, not even a lock: the folder may lie on a read-only disk,
and must not be written to by others meanwhile.
"""

from __future__ import annotations

import io
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from pbbench.data.entries import Entry, name_hash, printable
from pbbench.errors import InputError, one_line

DATA_FILE = "data.mdb"


def is_lmdb(path: Path) -> bool:
    return os.path.isfile(path / DATA_FILE)  # of a folder that is shut: False, and listing it will say why


class Keys(Sequence[Entry]):
    """Keys and sizes of values as a sequence of entries, each made when it is asked for; a slice shares the keys."""

    def __init__(self, keys: bytes, ends: NDArray[np.int64], sizes: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        self._keys, self._ends, self._sizes, self._order = keys, ends, sizes, order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Keys: ...
    def __getitem__(self, index: int | slice) -> Entry | Keys:
        if isinstance(index, slice):
            return Keys(self._keys, self._ends, self._sizes, self._order[index])
        number = int(self._order[index])
        start = int(self._ends[number - 1]) if number else 0
        name = self._keys[start : int(self._ends[number])].decode(errors="surrogateescape")
        return Entry(name, int(self._sizes[number]))


class Lmdb:
    """An LMDB of encoded images, its keys as names. Each process has its own environment: one does not survive a fork."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, printable(path.resolve().name)
        self.refused: list[tuple[str, str]] = []
        shown = printable(str(path))
        lmdb = _library(shown)
        try:
            self.entries = self._list()
        except (lmdb.Error, OSError) as error:
            raise InputError(f"cannot read the LMDB {shown}: {one_line(error)}; copy or unpack it again") from None

    def _list(self) -> Keys:
        environment = _environment(self.path)
        # A map beyond the file's end would be answered with SIGBUS, which kills the process without a word.
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        size = os.stat(self.path / DATA_FILE).st_size
        if size < needed:
            raise InputError(
                f"the LMDB {printable(str(self.path))} is cut short ({size:,} of {needed:,} bytes); copy or unpack it again"
            )
        keys, ends, sizes, places = bytearray(), array("q"), array("q"), array("Q")
        with environment.begin(buffers=True) as transaction, transaction.cursor() as cursor:
            for key, value in cursor:  # as buffers: of the value only the length is looked at
                keys += key
                ends.append(len(keys))
                sizes.append(len(value))
                places.append(int.from_bytes(name_hash(key), "big"))
        # The cursor goes by key, and the sort is stable: equal hashes stay in the order of their names.
        order = np.argsort(np.frombuffer(places, np.uint64), kind="stable")
        return Keys(bytes(keys), np.frombuffer(ends, np.int64), np.frombuffer(sizes, np.int64), order)

    @contextmanager
    def open(self, entry: Entry) -> Iterator[IO[bytes]]:
        with _environment(self.path).begin() as transaction:
            value = transaction.get(entry.name.encode(errors="surrogateescape"))
        if value is None:
            raise ValueError("no such key in the LMDB")
        yield io.BytesIO(value)


_open: dict[str, tuple[int, Any]] = {}
"""This process's environments, by path: the library opens a path only once in a process."""


def _environment(path: Path) -> Any:
    place = os.path.realpath(path)
    pid, environment = _open.get(place, (0, None))
    if pid != os.getpid():
        if environment is not None:
            environment.close()  # the parent's: it must not be used after a fork, and stands in the way of a new one
        environment = _library(printable(str(path))).open(
            place, readonly=True, lock=False, readahead=False, create=False, max_spare_txns=0
        )
        _open[place] = (os.getpid(), environment)
    return environment


def _library(shown: str) -> Any:
    try:
        import lmdb
    except ImportError:
        raise InputError(f"{shown} is an LMDB, which takes the extra lsun: pip install 'pbbench[lsun]'") from None
    return lmdb
