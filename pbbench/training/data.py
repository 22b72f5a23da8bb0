"""Image file ↔ x_start: the first of the six stops that one image makes through the program.

Preprocessing is the released one: the shorter side resized (bilinear, antialiased), a random horizontal flip in training, the
centre cropped, pixels scaled to [−1, 1]. Two decisions of our own: a photograph's EXIF orientation is applied, so that an image is
used as a viewer shows it (the released code ignores the tag; the research sets carry none), and 16-bit greys are
scaled to 8 bits instead of being clipped. Transparency is dropped, as ``convert("RGB")`` does, not laid over a colour.

``open_images`` makes an ``ImageSet`` of a folder, a zip or the built-in scenes: a torch Dataset of uint8 (3, H, W), unflipped, in
the order of the sorted names. A set that fits ``memory_limit_bytes`` once decoded is decoded on opening, so every unreadable file
is known and named before anything starts, and reading costs nothing afterwards. A larger one is decoded as it is used: its files'
headers are checked on opening, and one that proves damaged later is replaced by the next readable image, and recorded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from pbbench.errors import InputError, one_line
from pbbench.training import synthetic
from pbbench.training.loader import training_loader as training_loader
from pbbench.training.sources import MAX_FILE_BYTES, Entry, Folder, Zip, open_source

FORMATS = ("JPEG", "PNG", "WEBP")
DEFAULT_SYNTHETIC_IMAGES = 10_000
MEMORY_LIMIT_BYTES = 2**30
_PREPROCESSING = "exif orientation, RGB, shorter side bilinear antialiased, centre crop, 1"
_CHUNK = 512  # files handed to the decoding threads at a time

Unreadable = tuple[str, str]
"""(name in the set, reason)"""


def load_image(path: str | os.PathLike[str], size: tuple[int, int]) -> torch.Tensor:
    """An image file as x_start: float32 (3, H, W) in [−1, 1] at ``size`` (H, W). Raises InputError where it cannot be read."""
    path = Path(path)
    try:
        with _quiet():
            return to_x_start(torch.from_numpy(decode(path.read_bytes(), size)))
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"cannot read the image {path}: {_reason(error)}") from None


def to_x_start(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0 … 255 to float32 in [−1, 1], any shape; in the released order of operations (÷ 255, · 2, − 1)."""
    return images.to(torch.float32).div_(255).mul_(2).sub_(1)


def decode(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The bytes of a JPEG, PNG or WebP file to uint8 (3, H, W): upright, RGB, shorter side resized to cover ``size``, centre cropped.
    Raises whatever Pillow raises on a damaged file, and ValueError on one that would be unreasonably large."""
    if not data:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        _check_pixels(opened.width * opened.height)
        image = _rgb(ImageOps.exif_transpose(opened))
    height, width = size
    # The tight side takes the target's length, the other is cut to a whole pixel, as torchvision's Resize does.
    if image.width * height <= image.height * width:
        resized = (width, image.height * width // image.width)
    else:
        resized = (image.width * height // image.height, height)
    _check_pixels(resized[0] * resized[1])
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _check_pixels(pixels: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise ValueError(f"{pixels:,} pixels exceed Pillow's limit of {limit:,} (a decompression bomb?)")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(
        "I"
    ):  # 16-bit grey, which convert would clip at 255; the high byte is what Pillow keeps of 16-bit RGB
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: BaseException) -> str:
    """Why a file could not be read, in one line without a path or an address."""
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return getattr(error, "strerror", None) or one_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large images, odd palettes and damaged EXIF; what matters of that is recorded by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class ImageSet(Dataset[torch.Tensor]):
    """Images as uint8 (3, H, W), in a fixed order. Made by ``open_images``; ``subset`` gives a part that shares its memory.

    ``skipped``: unreadable files as (name, reason), complete on opening where the set is held in memory, otherwise grown in use.
    ``size``: (H, W). ``in_memory``: whether reading is free.
    """

    def __init__(self, pixels: _Decoded | _Files | _Scenes, first: int = 0, count: int | None = None) -> None:
        self._pixels, self._first = pixels, first
        self._count = len(pixels) if count is None else count
        self.size: tuple[int, int] = pixels.size
        self.in_memory: bool = pixels.in_memory
        self.skipped: list[Unreadable] = pixels.skipped

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.batch([index % len(self)])[0]

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """Several images as one uint8 (N, 3, H, W). Raises InputError where no image of the set is readable any more."""
        return self._pixels.read(np.asarray(indices, np.int64), self._first, self._count)

    def subset(self, start: int, stop: int) -> ImageSet:
        """Images ``start`` … ``stop`` − 1, to keep held-out images apart. Raises InputError where there are not so many."""
        if not 0 <= start < stop <= len(self):
            raise InputError(
                f"{self.description} do not hold images {start} to {stop}; ask for a range within 0 to {len(self)}"
            )
        return ImageSet(self._pixels, self._first + start, stop - start)

    @property
    def description(self) -> str:
        """What the images are, for a report: never a path."""
        what = self._pixels.describe(self._count)
        whole = self._first == 0 and self._count == len(self._pixels)
        return what if whole else f"{what} (numbers {self._first:,} to {self._first + self._count - 1:,})"

    def fingerprint(self) -> str:
        """SHA-256 over what decides the pixels: the preprocessing, the size, and each image's name, file size and CRC-32.

        The CRC-32 of a zip stands in its directory and that of a folder's files is taken while they are decoded, so a zip
        and the folder it unpacks to agree, and modification times do not matter. Of a folder too large to be decoded on opening only
        the first 4 KiB of each file are summed. Scenes: seed, numbers and version."""
        facts = [_PREPROCESSING, list(self.size), *self._pixels.identity(self._first, self._count)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class _Scenes:
    """The built-in scenes; drawn when first asked for, and kept where the set fits the memory limit."""

    def __init__(self, size: tuple[int, int], count: int, seed: int, keep: bool) -> None:
        self.size, self.seed, self.in_memory, self._length = size, seed, keep, count
        self.skipped: list[Unreadable] = []
        self._kept = torch.empty((count, 3, *size), dtype=torch.uint8) if keep else None
        self._drawn = np.zeros(count if keep else 0, bool)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: NDArray[np.int64], first: int, count: int) -> torch.Tensor:
        indices = indices + first
        if self._kept is None:
            return torch.from_numpy(synthetic.scenes(self.seed, indices, self.size))
        missing = np.unique(indices[~self._drawn[indices]])
        if missing.size:
            self._kept[torch.from_numpy(missing)] = torch.from_numpy(synthetic.scenes(self.seed, missing, self.size))
            self._drawn[missing] = True
        return self._kept[torch.from_numpy(indices)]

    def describe(self, count: int) -> str:
        return f"synthetic scenes, seed {self.seed}: {count:,} images"

    def identity(self, first: int, count: int) -> list[object]:
        return ["synthetic", synthetic.VERSION, self.seed, first, count]


class _Decoded:
    """Every readable file decoded on opening into one uint8 tensor."""

    in_memory = True

    def __init__(self, source: Folder | Zip, size: tuple[int, int], wanted: int) -> None:
        self.size, self.name = size, source.name
        self.skipped: list[Unreadable] = []
        self._entries: list[Entry] = []
        self._memory = torch.empty((wanted, 3, *size), dtype=torch.uint8)

        def load(entry: Entry) -> tuple[Entry, NDArray[np.uint8] | None, str]:
            try:
                data = read_bytes(source, entry)
                return replace(entry, crc=zlib.crc32(data)), decode(data, size), ""
            except MemoryError:
                raise
            except Exception as error:
                return entry, None, _reason(error)

        waiting = iter(source.entries)
        with _quiet(), ThreadPoolExecutor(_num_cores()) as pool:
            while len(self._entries) < wanted:
                chunk = [entry for _, entry in zip(range(min(_CHUNK, wanted - len(self._entries))), waiting, strict=False)]
                if not chunk:
                    break
                for entry, pixels, reason in pool.map(load, chunk):
                    if pixels is None:
                        self.skipped.append((entry.name, reason))
                    else:
                        self._memory[len(self._entries)] = torch.from_numpy(pixels)
                        self._entries.append(entry)
        self._memory = self._memory[: len(self._entries)]

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, indices: NDArray[np.int64], first: int, count: int) -> torch.Tensor:
        return self._memory[torch.from_numpy(indices + first)]

    def describe(self, count: int) -> str:
        return f"{self.name}: {count:,} images, {len(self.skipped):,} skipped"

    def identity(self, first: int, count: int) -> list[object]:
        return [[entry.name, entry.size, entry.crc] for entry in self._entries[first : first + count]]


class _Files:
    """A set too large for memory: headers checked on opening, files decoded when asked for."""

    in_memory = False

    def __init__(self, source: Folder | Zip, size: tuple[int, int], wanted: int) -> None:
        self.size, self.name, self._source = size, source.name, source
        self.skipped: list[Unreadable] = []
        self._entries: list[Entry] = []
        with _quiet(), ThreadPoolExecutor(_num_cores()) as pool:
            for entry, reason in pool.map(self._check, source.entries):
                if reason:
                    self.skipped.append((entry.name, reason))
                elif len(self._entries) < wanted:
                    self._entries.append(entry)

    def _check(self, entry: Entry) -> tuple[Entry, str]:
        try:
            with self._source.open(entry) as file:
                start = file.read(4096)
                file.seek(0)
                with Image.open(file, formats=FORMATS) as image:
                    _check_pixels(image.width * image.height)
            return replace(entry, crc=zlib.crc32(start) if entry.crc is None else entry.crc), ""
        except Exception as error:
            return entry, _reason(error)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, indices: NDArray[np.int64], first: int, count: int) -> torch.Tensor:
        images = np.empty((len(indices), 3, *self.size), np.uint8)
        with _quiet():
            for row, index in enumerate(indices):
                images[row] = self._readable(int(index), first, count)
        return torch.from_numpy(images)

    def _readable(self, index: int, first: int, count: int) -> NDArray[np.uint8]:
        """Image ``index`` or, where its file proves damaged, the next readable one: the same whichever process asks."""
        for step in range(count):
            entry = self._entries[first + (index + step) % count]
            try:
                return decode(read_bytes(self._source, entry), self.size)
            except MemoryError:
                raise
            except Exception as error:
                if entry.name not in (name for name, _ in self.skipped):
                    self.skipped.append((entry.name, _reason(error)))
        raise InputError(f"no image of {self.name} can be read any more")

    def describe(self, count: int) -> str:
        return f"{self.name}: {count:,} images, {len(self.skipped):,} skipped"

    def identity(self, first: int, count: int) -> list[object]:
        return [[entry.name, entry.size, entry.crc] for entry in self._entries[first : first + count]]


def read_bytes(source: Folder | Zip, entry: Entry) -> bytes:
    if entry.size > MAX_FILE_BYTES:
        raise ValueError(f"{entry.size:,} bytes exceed the limit of {MAX_FILE_BYTES:,} for one image file")
    with source.open(entry) as file:
        return file.read()


def _num_cores() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def open_images(
    source: str,
    size: tuple[int, int],
    num_images: int | None = None,
    seed: int = 0,
    *,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> ImageSet:
    """The images of a folder, a zip, or "synthetic" at ``size`` (H, W): the first ``num_images`` readable ones by name (all of
    them where there are fewer or None is given; of the scenes of ``seed``, 10,000). Raises InputError where the source is
    absent, not permitted, broken, encrypted or without a single readable image."""
    if num_images is not None and num_images < 1:
        raise InputError(f"num_images {num_images} is not a positive number")
    bytes_per_image = 3 * size[0] * size[1]
    if source == "synthetic":
        count = num_images or DEFAULT_SYNTHETIC_IMAGES
        return ImageSet(_Scenes(size, count, seed, keep=count * bytes_per_image <= memory_limit_bytes))
    files = open_source(source)
    wanted = min(len(files.entries), num_images or len(files.entries))
    pixels = (_Decoded if wanted * bytes_per_image <= memory_limit_bytes else _Files)(files, size, wanted)
    pixels.skipped[:0] = files.refused
    if not len(pixels):
        raise InputError(f"{source} holds no readable image (jpg, png, webp){_examples(pixels.skipped)}")
    return ImageSet(pixels)


def _examples(skipped: list[Unreadable]) -> str:
    if not skipped:
        return ""
    shown = ", ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    return f"; {len(skipped):,} could not be read ({shown}{', …' if len(skipped) > 3 else ''})"
