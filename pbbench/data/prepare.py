"""``pbbench data prepare``: packs a source of images once, as ``prepared_set.py`` describes, so that training need not decode.

Shards are made in order, each from where the last one ended in the source's order; a shard is written aside, flushed and
renamed, then its record, and the index last of all. So whatever a killed process leaves under a proper name is whole, and
running again goes on behind it: every finished shard is checked by its SHA-256 and kept, a damaged one is made again. A set
is continued, or checked when it is complete, only with the settings and the source that it was begun with.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from numpy.typing import NDArray

from pbbench import __version__
from pbbench.data import decode, synthetic
from pbbench.data.entries import HEAD_BYTES, Entry, Unreadable, load_in_order, printable, read_bytes, useful_threads
from pbbench.data.prepared_set import (
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    UNFINISHED,
    Prepared,
    is_prepared,
    read_object,
    record_file,
    shard_file,
)
from pbbench.data.sources import Folder, Lmdb, Zip, open_source
from pbbench.errors import InputError, one_line

SHARD_BYTES = 2**30
"""A mapped shard holds a file descriptor: LSUN's three million bedrooms at 256 × 256 are 560, within the usual 1,024."""
MOST_BROKEN_IN_A_ROW = 1000
"""More is not damage but a disk that went away; recording the rest of the set as broken would finish it without them."""

Outcome = tuple[Any, NDArray[np.uint8]] | Unreadable
"""(what the record says of the image, its uint8 (3, H, W)), or why there is none."""


class _Files:
    """Image files of a folder, zip or LMDB."""

    def __init__(self, source: Folder | Zip | Lmdb, size: tuple[int, int], threads: int | None) -> None:
        self.source, self.size, self.length = source, size, len(source.entries)
        self.threads = threads or useful_threads(source.entries)

    def settings(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for entry in self.source.entries:
            listing.update(json.dumps([entry.name, entry.size, entry.crc]).encode())
        kind = type(self.source).__name__.lower()
        return {"source": self.source.name, "kind": kind, "seed": None, "source_fingerprint": listing.hexdigest()}

    def read(self, start: int, wanted: int) -> Iterator[Outcome]:
        entries = (self.source.entries[number] for number in range(start, self.length))
        return load_in_order(entries, wanted, self._load, self.threads)

    def _load(self, entry: Entry) -> tuple[Any, NDArray[np.uint8]]:
        data = read_bytes(self.source, entry)
        listed = entry.crc  # what is known of the file where the set is too large to be decoded on opening
        if isinstance(self.source, Folder):
            listed = zlib.crc32(data[:HEAD_BYTES])
        return [entry.name, entry.size, zlib.crc32(data), listed], decode.decode(data, self.size)


class _Scenes:
    """The built-in scenes of seed 0."""

    def __init__(self, size: tuple[int, int], length: int) -> None:
        self.size, self.length = size, length

    def settings(self) -> dict[str, Any]:
        return {"source": "synthetic", "kind": "synthetic", "seed": 0, "source_fingerprint": None}

    def read(self, start: int, wanted: int) -> Iterator[Outcome]:
        for first in range(start, start + wanted, 64):
            numbers = np.arange(first, min(first + 64, start + wanted))
            yield from ((None, pixels) for pixels in synthetic.scenes(0, numbers, self.size))


def prepare(
    source: str,
    out: Path,
    size: tuple[int, int],
    num_images: int | None = None,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """Pack ``source`` at ``size`` (H, W) into ``out``; ``num_images`` as for ``open_images``. ``tell`` hears of each shard.

    Raises InputError where the source has no readable image, ``out`` holds something else or was begun with other settings or
    by a process that is still at it, the disk is full, or the source seems to have gone away. What was finished then stays."""
    reader: _Files | _Scenes
    if source == "synthetic":
        reader = _Scenes(size, num_images or synthetic.DEFAULT_COUNT)
    else:
        opened = open_source(source)
        if isinstance(opened, Prepared):
            raise InputError(f"{printable(source)} is prepared already; give what it was made from: {opened.source_name}")
        if not opened.entries and not opened.refused:
            raise InputError(f"{printable(source)} holds no image (jpg, jpeg, png, webp); give a folder or a zip of images")
        reader = _Files(opened, size, threads)
    bytes_per_image = 3 * size[0] * size[1]
    wanted = min(reader.length, num_images or reader.length)
    settings = reader.settings() | {
        "size": list(size),
        "num_images_wanted": wanted,
        "images_per_shard": max(1, SHARD_BYTES // bytes_per_image),
        "resize": "upright, RGB, shorter side resized (bilinear, antialiased), centre cropped, not flipped",
        "preprocessing": [decode.VERSION, synthetic.VERSION if source == "synthetic" else None],
        "pillow": PIL.__version__,
    }
    made_by = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    done = 0
    try:
        with _claimed(out, settings):
            tell(f"{settings['source']}: up to {wanted:,} images, {wanted * bytes_per_image / 2**30:,.1f} GiB")
            records: list[dict[str, Any]] = []
            start = total = 0
            while total < wanted and start < reader.length:
                number = len(records)
                room = min(settings["images_per_shard"], wanted - total)
                record = _sound(out, number, start, made_by)
                tell(f"shard {number}: " + ("sound" if record else "being made"))
                record = record or _make_shard(out, number, reader, start, room, made_by)
                records.append(record)
                done, start, total = len(records), record["stop"], total + record["count"]
            return _finish(out, settings, records, getattr(reader, "source", None), total)
    except OSError as error:  # of the folder ``out``: what a source's files raise is recorded by name
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"cannot write: {error.strerror or one_line(error)}"
        raise InputError(
            f"{printable(str(out))}: {what}; {done} finished shards are kept, run the same command again to go on"
        ) from None


@contextmanager
def _claimed(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """The folder, locked against another process and known to be of these settings."""
    shown = printable(str(out))
    if out.exists() and not out.is_dir():
        raise InputError(f"{shown} is a file; name a new or empty folder")
    own = _aside(out / UNFINISHED).name  # all that there is where the process was killed at its very first file
    if out.exists() and not is_prepared(out) and any(path.name != own for path in out.iterdir()):
        raise InputError(f"{shown} is not empty and not a prepared set; name a new or empty folder, nothing is written over")
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{shown} is being prepared by another process; wait for it, or name another folder") from None
        except OSError:
            pass  # a file system without locks
        before = _settings_of(out)
        if before is None:
            _write_object(out / UNFINISHED, {"settings": settings})
        for key, value in settings.items():
            if before is not None and before.get(key) != value:
                raise InputError(f"{shown} was begun with {key} {before.get(key)!r}, this is {value!r}; name another folder")
        yield
    finally:
        os.close(handle)


def _settings_of(out: Path) -> dict[str, Any] | None:
    """What the set was begun with; None where that is not known, or not any more: its shards then tell by their records."""
    for name in (INDEX, UNFINISHED):
        with suppress(InputError):
            settings = read_object(out / name).get("settings")
            if isinstance(settings, dict):
                return settings
    return None


def _sound(out: Path, number: int, start: int, made_by: str) -> dict[str, Any] | None:
    """The record of a finished shard whose bytes are those that were written; None where there is none."""
    with suppress(InputError, OSError, KeyError, TypeError):  # absent or damaged: made again
        record = read_object(record_file(out, number))
        fits = record["start"] == start and record["stop"] > start and record["made_by"] == made_by
        if fits and record["sha256"] == _sha256(shard_file(out, number)):
            return record
    return None


def _make_shard(out: Path, number: int, reader: _Files | _Scenes, start: int, wanted: int, made_by: str) -> dict[str, Any]:
    """One shard and its record, of the next ``wanted`` readable images or as many as there are."""
    path = shard_file(out, number)
    images: list[Any] = []
    broken: list[Unreadable] = []
    count, stop, in_a_row = 0, start, 0
    with _whole_file(path) as file:
        _write_header(file, wanted, reader.size)
        for outcome in reader.read(start, wanted):
            stop += 1
            if isinstance(outcome, Unreadable):
                broken.append(outcome)
                in_a_row += 1
                if in_a_row >= MOST_BROKEN_IN_A_ROW:
                    raise InputError(
                        f"{in_a_row:,} images in a row cannot be read ({outcome.name}: {outcome.reason}); is the source still "
                        f"there? {number} finished shards are kept, run the same command again to go on"
                    )
                continue
            image, pixels = outcome
            if image is not None:
                images.append(image)
            file.write(np.ascontiguousarray(pixels).data)
            count, in_a_row = count + 1, 0
        file.seek(0)
        _write_header(file, count, reader.size)  # of the same length: NumPy leaves room for the first dimension to change
    record = {"made_by": made_by, "start": start, "stop": stop, "count": count}
    record |= {"bytes": path.stat().st_size, "sha256": _sha256(path), "broken": broken, "images": images}
    _write_object(record_file(out, number), record)
    return record


def _finish(
    out: Path, settings: dict[str, Any], records: list[dict[str, Any]], source: Folder | Zip | Lmdb | None, total: int
) -> Prepared:
    """The index; a last shard without images, which only says which files were broken, is left out of it."""
    refused = source.refused if source else []
    broken = sorted(tuple(pair) for pair in [*refused, *(pair for record in records for pair in record["broken"])])
    if not total:
        for path in (shard_file(out, 0), record_file(out, 0), out / UNFINISHED):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            out.rmdir()
        examples = "".join(f"; {name}: {reason}" for name, reason in broken[:3])
        raise InputError(f"{settings['source']} holds no readable image; {len(broken):,} could not be read{examples}")
    shards = [{key: record[key] for key in ("count", "bytes", "sha256")} for record in records if record["count"]]
    index = {"format": FORMAT, "format_version": FORMAT_VERSION, "pbbench": __version__, "settings": settings}
    index |= {"num_images": total, "num_broken": len(broken), "broken": broken, "shards": shards}
    _write_object(out / INDEX, index)
    (out / UNFINISHED).unlink(missing_ok=True)
    return Prepared(out)


def _write_header(file: IO[bytes], count: int, size: tuple[int, int]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, *size)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_object(path: Path, value: dict[str, Any]) -> None:
    with _whole_file(path) as file:
        file.write(json.dumps(value).encode())


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is complete; its bytes are on the disk before."""
    aside = _aside(path)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # on a full disk its space is wanted
        raise


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
