"""Where image files lie: a folder (nested or not), a zip or an LMDB, as a list of entries that any process can open; or a
folder that ``pbbench data prepare`` made of one of them.

Names are relative and use "/"; their order is that of ``entries.py``. Hidden files and folders, ``__MACOSX`` and files that are
not images are passed over; an image file that cannot be read is left to the caller to name.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from pbbench.data.entries import Entry, in_order, name_hash, printable
from pbbench.data.prepared_set import Prepared, is_prepared
from pbbench.errors import InputError, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DATA_FILE = "data.mdb"
"""What makes a folder an LMDB."""


def is_image_name(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(SUFFIXES)


class Folder:
    """A folder of image files. Links are followed, each folder once; a subfolder that cannot be listed is on ``refused``."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, printable(path.resolve().name) or "folder"
        self.refused: list[tuple[str, str]] = []
        self.entries = in_order(self._walk())

    def _walk(self) -> Iterator[Entry]:
        try:
            os.scandir(self.path).close()
        except OSError as error:
            raise InputError(f"cannot read the image folder {printable(str(self.path))}: {error.strerror}") from None
        seen: set[tuple[int, int]] = set()
        for folder, subfolders, files in os.walk(self.path, followlinks=True, onerror=self._refuse):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back would be walked for ever
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
            for file in files:
                if is_image_name(file):
                    path = Path(folder, file)
                    yield Entry(path.relative_to(self.path).as_posix(), _size(path))

    def _refuse(self, error: OSError) -> None:
        name = Path(os.fsdecode(error.filename)).relative_to(self.path).as_posix() + "/"
        self.refused.append((printable(name), error.strerror or one_line(error)))

    @contextmanager
    def open(self, entry: Entry) -> Iterator[IO[bytes]]:
        path = self.path / entry.name
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            yield file


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a broken link: opening it will say so
        return 0


class Zip:
    """A zip of image files. Each process opens its own handle, so that forked and spawned workers do not share a file position;
    threads of one process take turns."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, printable(path.name)
        self.refused: list[tuple[str, str]] = []
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        self._lock = threading.Lock()
        shown = printable(str(path))
        try:
            infos = {
                info.filename: info for info in self._zip().infolist() if not info.is_dir() and is_image_name(info.filename)
            }
        except zipfile.BadZipFile as error:
            what = f"is a broken zip ({one_line(error)})" if self._starts_like_a_zip() else "is not a zip"
            raise InputError(f"{shown} {what}; give a folder of images or a zip of them") from None
        except Exception as error:  # a damaged directory can raise anything in zipfile
            raise InputError(f"cannot read the zip {shown}: {getattr(error, 'strerror', None) or one_line(error)}") from None
        if not infos and any(PurePosixPath(name).name == DATA_FILE for name in self._zip().namelist()):
            raise InputError(f"the zip {shown} holds an LMDB, which cannot be read in place; unpack it and give its folder")
        if any(info.flag_bits & 1 for info in infos.values()):
            raise InputError(f"the zip {shown} is encrypted; unpack it and give the folder")
        self.entries = in_order(Entry(name, info.file_size, info.CRC) for name, info in infos.items())

    def _starts_like_a_zip(self) -> bool:
        with open(self.path, "rb") as file:
            return file.read(2) == b"PK"

    def _zip(self) -> zipfile.ZipFile:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), zipfile.ZipFile(self.path))
        return self._handle[1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_handle", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _handle=None, _lock=threading.Lock())

    @contextmanager
    def open(self, entry: Entry) -> Iterator[IO[bytes]]:
        with self._lock, self._zip().open(entry.name) as file:
            yield file


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
    """LSUN as its site gives it: a folder with ``data.mdb`` and ``lock.mdb`` whose values are encoded images.

    LSUN's bedrooms are three million: their keys are listed once, as bytes beside each other and not as objects (about 65 bytes
    an image), without touching the images themselves. Nothing is written, not even a lock: the folder may lie on a read-only
    disk, and must not be written to by others meanwhile. Each process has its own environment: one does not survive a fork.
    Keys are the names.
    """

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


def open_source(source: str) -> Folder | Zip | Lmdb | Prepared:
    """What lies at ``source``. Raises InputError where it is absent, none of these, broken, encrypted or not permitted."""
    path = Path(os.path.expanduser(source))
    try:
        mode = os.stat(os.path.expanduser(source)).st_mode  # of the text: Path("") would be the current folder
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"cannot read the images at {source!r}: {reason}; give a folder, a zip, or 'synthetic'") from None
    if stat.S_ISDIR(mode):  # of a folder that is shut both say False, and listing it says why
        return Prepared(path) if is_prepared(path) else Lmdb(path) if os.path.isfile(path / DATA_FILE) else Folder(path)
    if not stat.S_ISREG(mode):
        raise InputError(f"{source!r} is neither a folder nor a zip of images")
    return Lmdb(path.parent) if path.name == DATA_FILE else Zip(path)
