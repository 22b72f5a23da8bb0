"""Where image files lie: a folder (nested or not) or a zip, as a list of entries that any process can open.

Names are relative and use "/". The list is sorted by a hash of the name: sorted by the name itself, nested sets have one class
after another; by its hash, the first n images, the last n or any n in a row are a fair choice, and the same one everywhere.
Hidden files and folders, ``__MACOSX`` and files that are not images are passed over; an image file that cannot be read is
left to the caller to name.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pbbench.errors import InputError, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_FILE_BYTES = 2**29
"""A file (in a zip: its declared size) above this is not an image of a data set; it is named as unreadable, never loaded."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file: its name in the set, its size in bytes, and its CRC-32 where a zip's directory states it."""

    name: str
    size: int
    crc: int | None = None


def _place(entry: Entry) -> tuple[bytes, str]:
    return hashlib.blake2b(entry.name.encode(errors="surrogateescape"), digest_size=8).digest(), entry.name


def printable(name: str) -> str:
    """A name for a message: on one line, and safe to encode whatever bytes the file system gave."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def is_image_name(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(SUFFIXES)


class Folder:
    """A folder of image files. Links are followed, each folder once; a subfolder that cannot be listed is on ``refused``."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, printable(path.resolve().name) or "folder"
        self.refused: list[tuple[str, str]] = []
        self.entries = sorted(self._walk(), key=_place)

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
        if any(info.flag_bits & 1 for info in infos.values()):
            raise InputError(f"the zip {shown} is encrypted; unpack it and give the folder")
        self.entries = sorted((Entry(name, info.file_size, info.CRC) for name, info in infos.items()), key=_place)

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


def open_source(source: str) -> Folder | Zip:
    """The folder or zip at ``source``. Raises InputError where it is absent, neither, broken, encrypted or not permitted."""
    path = Path(os.path.expanduser(source))
    try:
        mode = os.stat(os.path.expanduser(source)).st_mode  # of the text: Path("") would be the current folder
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"cannot read the images at {source!r}: {reason}; give a folder, a zip, or 'synthetic'") from None
    if stat.S_ISDIR(mode):
        return Folder(path)
    if not stat.S_ISREG(mode):
        raise InputError(f"{source!r} is neither a folder nor a zip of images")
    return Zip(path)


def read_bytes(source: Folder | Zip, entry: Entry) -> bytes:
    """The whole file. Raises OSError, ValueError or what ``zipfile`` raises on a damaged member."""
    if entry.size > MAX_FILE_BYTES:
        raise ValueError(f"{entry.size:,} bytes exceed the limit of {MAX_FILE_BYTES:,} for one image file")
    with source.open(entry) as file:
        return file.read()
