"""Any image file to pixels: the released preprocessing against torchvision's own, every kind of picture and of damage."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pbbench.data.decode import check_header, decode, reason
from pbbench.data.synthetic import scene

SIZE = (16, 16)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(height: int = 16, width: int = 16) -> Image.Image:
    return Image.fromarray(scene(0, 3, (height, width)))


def _png(width: int, height: int, depth: int, colour_type: int, lines: bytes) -> bytes:
    """A PNG put together by hand, for what Pillow does not write."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    body = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("shape", [(16, 16), (37, 64), (64, 37), (15, 90), (33, 34), (8, 9), (200, 17), (1, 1), (1, 3)])
@pytest.mark.parametrize("side", [16, 21])
def test_preprocessing_is_the_released_one(shape, side):
    """Resize of the shorter side, centre crop, ToTensor, 2x − 1: the transforms that the reference uses."""
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is torch-fidelity's dependency")
    from pbbench.data.images import to_x_start

    released = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()])
    image = picture(*shape)
    expected = released(image) * 2 - 1
    torch.testing.assert_close(to_x_start(torch.from_numpy(decode(encoded(image), (side, side)))), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (8, 40)])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (20, 90)])
def test_a_size_that_is_not_square_is_covered_and_its_centre_kept(size, shape):
    height, width = shape
    # Rows hold their own height, columns theirs, so the pixels tell which part of the image was kept and how it was scaled.
    rows, columns = np.mgrid[0:height, 0:width]
    image = Image.fromarray(np.stack([rows * 2, columns * 2, rows * 0], axis=2).astype(np.uint8))
    pixels = decode(encoded(image), size).astype(float)
    assert pixels.shape == (3, *size)
    scale = max(size[0] / height, size[1] / width)
    middle_row = 2 * ((np.arange(size[0]) + 0.5 - size[0] / 2) / scale + height / 2 - 0.5)
    middle_column = 2 * ((np.arange(size[1]) + 0.5 - size[1] / 2) / scale + width / 2 - 0.5)
    inner = slice(2, -2)  # the outermost pixels see the image's edge
    np.testing.assert_allclose(pixels[0].mean(axis=1)[inner], middle_row[inner], atol=2.5)
    np.testing.assert_allclose(pixels[1].mean(axis=0)[inner], middle_column[inner], atol=2.5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_used_as_a_viewer_shows_it(kind, orientation):
    """The tag says how the stored picture is turned; the pixels are the upright picture's."""
    upright = np.asarray(Image.fromarray(scene(0, 3, (4, 6))).resize((24, 16), Image.Resampling.NEAREST))
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1), 7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} | ({"subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {})
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    pixels = decode(data, (16, 24)).astype(int)
    assert np.abs(pixels - upright.transpose(2, 0, 1)).max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("exif", [b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03\0\0\0\xff" * 3, b"no TIFF header"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_beside_sound_pixels_does_no_harm(kind, exif):
    assert decode(encoded(picture(), kind, exif=b"Exif\0\0" + exif), SIZE).shape == (3, 16, 16)


def test_grey_palette_alpha_and_deep_images_become_rgb():
    rgb = np.asarray(picture())
    grey = np.asarray(picture().convert("L"))
    three = np.broadcast_to(grey, (3, 16, 16))

    def pixels(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's word on palettes with transparency
            return decode(encoded(image, kind, **options), SIZE)

    np.testing.assert_array_equal(pixels(Image.fromarray(grey)), three)
    deep = (grey.astype(np.uint16) << 8) + 200  # 16-bit grey: the high byte, not white
    np.testing.assert_array_equal(pixels(Image.fromarray(deep)), three)
    np.testing.assert_array_equal(pixels(Image.fromarray(grey).convert("1")) % 255, 0)
    transparent = np.dstack([rgb, np.full((16, 16), 0, np.uint8)])
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        np.testing.assert_array_equal(pixels(Image.fromarray(transparent), kind, **options), rgb.transpose(2, 0, 1))
    np.testing.assert_array_equal(pixels(Image.merge("LA", [Image.fromarray(grey), Image.new("L", SIZE, 9)])), three)
    palette = picture().quantize(32, dither=Image.Dither.NONE)
    plain = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(palette), plain)
    np.testing.assert_array_equal(pixels(palette, transparency=bytes(range(32))), plain)  # alpha per entry
    np.testing.assert_array_equal(pixels(palette, transparency=3), plain)  # one transparent entry
    cmyk = pixels(picture().convert("CMYK"), "JPEG", quality=100, subsampling=0).astype(int)
    assert np.abs(cmyk - rgb.transpose(2, 0, 1)).mean() < 3


def test_sixteen_bit_colour_and_grey_with_alpha_become_rgb():
    """Pillow writes neither, so the PNG is put together here: 8 bits per channel are the high bytes."""
    rgb = np.asarray(picture())
    for channels, colour_type in ((3, 2), (4, 6), (1, 0), (2, 4)):
        shown = rgb if channels >= 3 else rgb[..., :1]
        deep = np.zeros((16, 16, channels), ">u2")  # the alpha channel, where there is one, stays 0
        deep[..., : shown.shape[2]] = (shown.astype(np.uint16) << 8) + 77
        data = _png(16, 16, 16, colour_type, b"".join(b"\0" + row.tobytes() for row in deep))
        expected = np.broadcast_to(shown, (16, 16, 3)).transpose(2, 0, 1)
        np.testing.assert_array_equal(decode(data, SIZE), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_counts(kind):
    frames = [Image.fromarray(scene(0, k, SIZE)) for k in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode(data, SIZE), scene(0, 0, SIZE).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused_wherever_they_end(kind):
    data = encoded(picture(48, 48), kind)
    for length in [0, 1, 10, 40, len(data) // 4, len(data) // 2, 3 * len(data) // 4, len(data) - 30]:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - what Pillow raises is not ours to say
            decode(data[:length], SIZE)
        text = reason(caught.value)
        assert text
        assert "\n" not in text
        assert "0x" not in text  # an object's address would differ from run to run


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_not_opened_whatever_their_name_says(kind):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        decode(encoded(picture(), kind), SIZE)
    assert reason(caught.value) == "not a JPEG, PNG or WebP image"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "side", [10_000, 60_000]
)  # above Pillow's limit, and above twice the limit, where Pillow itself refuses
def test_decompression_bombs_are_refused_by_their_header(side):
    data = _png(side, side, 8, 2, b"\0" * 1000)  # claims a size and has no pixels to show for it
    for attempt in (lambda: decode(data, SIZE), lambda: check_header(io.BytesIO(data))):
        with pytest.raises(Exception, match="decompression bomb"):
            attempt()


def test_a_strip_that_would_grow_beyond_measure_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(ValueError, match="128 × 384000 pixels exceed"):
        decode(encoded(Image.new("RGB", (1, 3000))), (128, 128))
    assert decode(encoded(Image.new("RGB", (10, 30))), (128, 128)).shape == (3, 128, 128)
