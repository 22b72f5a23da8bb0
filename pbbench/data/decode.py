"""The bytes of one image file to pixels: the released preprocessing, less the flip and the scaling.

The shorter side is resized (bilinear, antialiased) and the centre cropped. Three decisions of our own, none of which touches a
research set such as CelebA, LSUN or CIFAR-10: a photograph's EXIF orientation is applied, so that an image is used as a viewer
shows it (the released code ignores the tag); 16-bit grey is brought to 8 bits by its high byte (``convert`` would clip it
to white); transparency is dropped as ``convert("RGB")`` drops it, leaving the colours stored beneath. Of an animation
the first frame counts.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pbbench.errors import one_line

FORMATS = ("JPEG", "PNG", "WEBP")
"""What Pillow may open: a file is judged by its content, whatever its name says, and no other decoder is reached."""
VERSION = 1
"""Part of a data set's fingerprint: raise it whenever the same file gives other pixels."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation → what puts the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A JPEG, PNG or WebP file to uint8 (3, H, W) at ``size`` (H, W): upright, RGB, resized to cover the size, centre cropped.
    Raises what Pillow raises on a damaged file, and ValueError on one that is empty or unreasonably large."""
    if not data:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        _check_pixels(opened.width, opened.height)
        opened.load()
        image = _rgb(_upright(opened))
    height, width = size
    # The tight side takes the target's length; the other is cut to a whole pixel, as torchvision's Resize does.
    if image.width * height <= image.height * width:
        resized = (width, image.height * width // image.width)
    else:
        resized = (image.width * height // image.height, height)
    _check_pixels(*resized)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)  # torchvision's CenterCrop
    image = image.crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def check_header(file: IO[bytes]) -> None:
    """Raises, like ``decode``, where the start of a file already tells that it cannot be decoded. Reads no pixels."""
    if not file.read(1):
        raise ValueError("empty file")
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        _check_pixels(image.width, image.height)


def _check_pixels(width: int, height: int) -> None:
    """Pillow itself refuses only above twice its limit, and it does not look at what an image is resized to: a strip one pixel
    wide would grow to the square of its length."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} × {height} pixels exceed Pillow's limit of {limit:,} (a decompression bomb?)")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF beside sound pixels
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; the high byte is also what Pillow keeps of 16-bit colour
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def reason(error: BaseException) -> str:
    """Why a file could not be read, in one line without a path or an address, so that it is the same everywhere."""
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return getattr(error, "strerror", None) or one_line(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow warns of large images, odd palettes and damaged EXIF; what matters of that is recorded by name instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
