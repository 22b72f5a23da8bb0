"""Sets of images: decoded on opening or as they are used, the same either way; what is skipped, described and fingerprinted."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pbbench.data.images import ImageSet, load_image, open_images, to_x_start
from pbbench.data.synthetic import scene, scenes
from pbbench.errors import InputError

SIZE = (8, 12)
BAD = {"bad/empty.png": b"", "bad/text.jpg": b"no image", "bad/gone.webp": b"RIFF\x10\0\0\0WEBPVP8 "}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve readable images (one per scene), three that are unreadable from the header on, one that is cut short."""
    for number in range(12):
        path = tmp_path / "images" / f"set{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(0, number, SIZE)).save(path)
    (tmp_path / "images" / "bad").mkdir()
    for name, content in BAD.items():
        (tmp_path / "images" / name).write_bytes(content)
    cut = (tmp_path / "images" / "set0" / "00.png").read_bytes()
    (tmp_path / "images" / "bad" / "cut.png").write_bytes(cut[: len(cut) // 2])
    return tmp_path / "images"


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    return path


def numbers(images: ImageSet) -> list[int]:
    """Which scene each image of the set is."""
    known = {scene(0, number, SIZE).transpose(2, 0, 1).tobytes(): number for number in range(12)}
    return [known[image.numpy().tobytes()] for image in images]  # type: ignore[attr-defined]


def lazily(source: object, **options) -> ImageSet:
    return open_images(str(source), SIZE, memory_limit_bytes=0, **options)


def test_load_image_is_x_start(tmp_path):
    Image.fromarray(scene(0, 1, SIZE)).save(tmp_path / "image.png")
    x_start = load_image(tmp_path / "image.png", SIZE)  # 3 H W
    assert x_start.shape == (3, *SIZE)
    assert x_start.dtype == torch.float32
    torch.testing.assert_close(x_start, torch.from_numpy(scene(0, 1, SIZE)).permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)
    assert load_image(str(tmp_path / "image.png"), (4, 4)).shape == (3, 4, 4)


def test_to_x_start_reaches_both_ends_and_leaves_its_input_alone():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_x_start(pixels).tolist() == pytest.approx([-1, -0.6, 1])
    assert to_x_start(pixels)[[0, 2]].tolist() == [-1, 1]
    assert pixels.tolist() == [0, 51, 255]


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_load_image_refuses_in_one_line(tmp_path, content):
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_image(path, SIZE)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "as used"])
@pytest.mark.parametrize("pack", [False, True], ids=["folder", "zip"])
def test_the_readable_images_are_there_once_and_the_others_are_named(folder, pack, limit):
    source = zipped(folder) if pack else folder
    images = open_images(str(source), SIZE, memory_limit_bytes=limit)
    assert images.in_memory is (limit > 0)
    assert images.size == SIZE
    assert [name for name, _ in images.skipped if name != "bad/cut.png"] == sorted(BAD)
    assert dict(images.skipped)["bad/empty.png"] == "empty file"
    assert dict(images.skipped)["bad/text.jpg"] == "not a JPEG, PNG or WebP image"
    seen = [image for image in images]  # noqa: C416 - a Dataset ends by IndexError
    assert len(seen) == len(images) == (12 if limit else 13)
    assert all(image.shape == (3, *SIZE) and image.dtype == torch.uint8 for image in seen)
    assert sorted(set(numbers(images))) == list(range(12))
    assert len(images.skipped) == 4  # the one cut short is known by now, however the set is held
    assert f"{source.name}: {len(images)} images, 4 skipped" == images.description


def test_a_file_that_proves_damaged_in_use_is_replaced_by_the_next_readable_one(folder, caplog):
    images, sound = lazily(folder), open_images(str(folder), SIZE)
    names = [entry.name for entry in images._store._entries]  # type: ignore[attr-defined]
    place = names.index("bad/cut.png")
    assert images.skipped == [(name, reason) for name, reason in images.skipped if name in BAD]
    expected = (place + 1) % len(names)
    for _ in range(2):
        torch.testing.assert_close(images[place], images[expected])
    assert [name for name, _ in images.skipped].count("bad/cut.png") == 1
    assert "bad/cut.png cannot be read" in caplog.text
    rest = [index for index in range(len(names)) if index != place]
    torch.testing.assert_close(images.batch(rest), sound.batch(range(12)))
    # within a part, its stand-in comes from that part
    part = images.subset(place, place + 1)
    with pytest.raises(InputError, match="can be read any more"):
        part[0]


def test_a_set_whose_disk_went_away_ends_with_one_line(folder):
    images = lazily(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"^no image of images can be read any more$"):
        images[3]


def test_the_first_n_images_are_a_part_of_all(folder):
    whole = numbers(open_images(str(folder), SIZE))
    for count in (1, 5, 12):
        assert numbers(open_images(str(folder), SIZE, count)) == whole[:count]
        assert len(lazily(folder, num_images=count)) == count
    assert len(open_images(str(folder), SIZE, 1000)) == 12  # all there are
    assert len(open_images("synthetic", SIZE)) == 10_000
    with pytest.raises(InputError, match="num_images is 0"):
        open_images(str(folder), SIZE, 0)


def test_damaged_files_do_not_count_towards_the_first_n(tmp_path):
    for number in range(40):
        if number % 2:
            Image.fromarray(scene(0, number, SIZE)).save(tmp_path / f"{number}.png")
        else:
            (tmp_path / f"{number}.png").write_bytes(b"damaged")
    for limit in (2**30, 0):
        images = open_images(str(tmp_path), SIZE, 18, memory_limit_bytes=limit)
        assert len(images) == len({image.numpy().tobytes() for image in images}) == 18
        assert 10 <= len(images.skipped) <= 20


@pytest.mark.parametrize("source", ["folder", "synthetic"])
def test_a_subset_shows_the_same_images_and_keeps_within_itself(folder, source):
    images = open_images(str(folder), SIZE) if source == "folder" else open_images("synthetic", SIZE, 12)
    part = images.subset(4, 9)
    assert len(part) == 5
    torch.testing.assert_close(part.batch(range(5)), images.batch(range(4, 9)))
    torch.testing.assert_close(part[-1], images[8])
    inner = part.subset(1, 3)
    torch.testing.assert_close(inner.batch([1, 0]), images.batch([6, 5]))
    assert inner.description.endswith(
        "2 images, 4 skipped (numbers 5 to 6)" if source == "folder" else "2 images (numbers 5 to 6)"
    )
    for index in (5, -6):
        with pytest.raises(IndexError):
            part[index]
    for batch in ([0, 5], [-1]):
        with pytest.raises(IndexError):
            part.batch(batch)
    for start, stop in ((-1, 3), (3, 3), (0, 6)):
        with pytest.raises(InputError, match="ask for a range within 0 to 5"):
            part.subset(start, stop)


def test_a_batch_is_the_callers_own():
    images = open_images("synthetic", SIZE, 4)
    images.batch([0, 1]).zero_()
    images[2].zero_()
    np.testing.assert_array_equal(images.batch(range(4)).numpy(), scenes(0, range(4), SIZE))


@pytest.mark.parametrize("limit", [2**30, 0], ids=["kept", "drawn anew"])
def test_synthetic_images_are_the_scenes_of_the_seed(limit):
    images = open_images("synthetic", SIZE, 50, seed=4, memory_limit_bytes=limit)
    assert images.in_memory is (limit > 0)
    assert images.skipped == []
    assert images.description == "synthetic scenes, seed 4: 50 images"
    for batch in ([3, 3, 49], [49, 0], range(50)):
        np.testing.assert_array_equal(images.batch(batch).numpy(), scenes(4, list(batch), SIZE))


def test_a_fingerprint_stands_for_the_pixels(folder):
    def of(source: object, size: tuple[int, int] = SIZE, **options) -> str:
        return open_images(str(source), size, **options).fingerprint()

    plain = of(folder)
    assert len(plain) == 64
    assert of(zipped(folder)) == plain  # the same names and contents
    os.utime(folder / "set0" / "00.png", (0, 0))
    assert of(folder) == plain  # when they were written does not matter
    moved = folder.rename(folder.parent / "elsewhere")
    assert of(moved) == plain  # nor where they lie
    part = open_images(str(moved), SIZE)
    prints = [plain, of(moved, (12, 8)), of(moved, num_images=6), lazily(moved).fingerprint()]
    prints += [part.subset(0, 3).fingerprint(), part.subset(3, 6).fingerprint()]
    prints += [of("synthetic", num_images=6), of("synthetic", num_images=6, seed=1), of("synthetic", num_images=7)]
    for content in (b"one", b"two"):  # of the same size
        (moved / "set1" / "01.png").write_bytes((moved / "set1" / "04.png").read_bytes() + content)
        prints += [of(moved), lazily(moved).fingerprint()]
    (moved / "set1" / "01.png").rename(moved / "set1" / "99.png")
    prints += [of(moved)]
    assert len(set(prints)) == len(prints)
    whole, first, second = open_images("synthetic", SIZE, 9), *(open_images("synthetic", SIZE, count) for count in (3, 6))
    assert whole.subset(0, 3).fingerprint() == first.fingerprint()
    assert whole.subset(3, 6).fingerprint() == second.subset(3, 6).fingerprint()


def test_a_content_fingerprint_sees_the_last_byte_of_every_file(folder):
    """Of a set that is not held in memory ``fingerprint`` reads the files' starts: a torn copy of the same size would pass."""
    path = folder / "set1" / "01.png"
    path.write_bytes(path.read_bytes() + bytes(5000))
    before = lazily(folder)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    after = lazily(folder)
    assert after.fingerprint() == before.fingerprint()
    kept = lazily(folder).content_fingerprint()
    path.write_bytes(path.read_bytes()[:-1] + b"y")
    assert lazily(folder).content_fingerprint() != kept
    for whole in (open_images(str(folder), SIZE), lazily(zipped(folder)), open_images("synthetic", SIZE, 5)):
        assert whole.content_fingerprint() == whole.fingerprint()  # which hold whole files' sums anyway
    path.unlink()
    assert after.content_fingerprint() != kept


@pytest.mark.parametrize(("context", "limit"), [("fork", 2**30), ("fork", 0), ("spawn", 0)])
def test_worker_processes_read_the_same_images(folder, context, limit):
    """As torch-fidelity does, which makes a DataLoader of the set; the zip's handle is not shared between processes."""
    images = open_images(str(zipped(folder)), SIZE, memory_limit_bytes=limit)
    expected = images.batch(range(len(images)))
    workers = DataLoader(images, batch_size=4, num_workers=1 if context == "spawn" else 2, multiprocessing_context=context)
    torch.testing.assert_close(torch.cat(list(workers)), expected)


def test_a_set_survives_pickling(folder):
    for images in (lazily(zipped(folder)), lazily(folder), open_images(str(folder), SIZE), open_images("synthetic", SIZE, 5)):
        images[0]  # a handle is open now
        copy = pickle.loads(pickle.dumps(images))
        torch.testing.assert_close(copy.batch([2, 1]), images.batch([2, 1]))
        assert copy.fingerprint() == images.fingerprint()


def test_the_photographs(shared):
    images = open_images(str(shared / "data" / "cifar10-test.zip"), (32, 32))
    assert images.description == "cifar10-test.zip: 10,000 images, 0 skipped"
    with zipfile.ZipFile(shared / "data" / "cifar10-test.zip") as archive, archive.open("airplane/0000.jpg") as file:
        airplane = np.asarray(Image.open(file)).transpose(2, 0, 1)
    pixels = images.batch(range(10_000)).numpy()
    assert (pixels == airplane).all(axis=(1, 2, 3)).sum() == 1
    assert abs(pixels[:5000].mean() - pixels[5000:].mean()) < 2  # the halves are alike, though the zip is sorted by class


def test_names_follow_the_sets_order(folder):
    for images in (open_images(str(folder), SIZE), lazily(folder), lazily(zipped(folder))):
        names = images.names()
        assert len(names) == len(images)
        for index in (0, len(images) - 1):
            pixels = np.asarray(Image.open(folder / names[index]).convert("RGB").resize(SIZE[::-1])).transpose(2, 0, 1)
            assert (images[index].numpy() == pixels).all()
        assert images.subset(1, 3).names() == names[1:3]
    assert open_images("synthetic", SIZE, 5).names() == []
