"""Folders and zips of image files: what is found, in which order, and one clear line for everything that is none."""

import os
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from pbbench.data.entries import read_bytes
from pbbench.data.images import open_images
from pbbench.data.sources import open_source
from pbbench.data.synthetic import scene
from pbbench.errors import InputError

SIZE = (8, 8)


def fill(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(0, number, SIZE)).save(path)
    return folder


def pack(folder: Path, path: Path, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def refusal(source: object) -> str:
    """The one line that a bad source is answered with."""
    with pytest.raises(InputError) as caught:
        open_images(str(source), SIZE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAMES = ["a.jpg", "b.JPEG", "c.PNG", "deep/er/d.webp", "deep/e.Jpg", "deep.f/with space é.png"]
IGNORED = [".hidden.png", ".cache/x.png", "deep/.thumbs/y.jpg", "__MACOSX/a.jpg", "deep/__MACOSX/._z.png"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_folder_and_its_zip_hold_the_same_images_and_nothing_hidden(tmp_path, compression):
    folder = fill(tmp_path / "images", NAMES + IGNORED)
    for name in ("notes.txt", "deep/list.csv", "picture.gif", "jpg", "noextension"):
        (folder / name).write_text("not an image")
    (folder / "directory.png").mkdir()
    plain, packed = open_source(str(folder)), open_source(str(pack(folder, tmp_path / "images.zip", compression)))
    assert sorted(entry.name for entry in plain.entries) == sorted(NAMES)
    assert [entry.name for entry in packed.entries] == [entry.name for entry in plain.entries]
    for mine, other in zip(plain.entries, packed.entries, strict=True):
        assert mine.size == other.size
        assert read_bytes(plain, mine) == read_bytes(packed, other) == (folder / mine.name).read_bytes()


def test_the_order_is_settled_by_the_names_and_any_part_is_a_fair_choice(tmp_path):
    """Sorted by name, the first half of a set with one folder per class would be half of the classes."""
    names = [f"class{label}/{number:03d}.png" for label in range(4) for number in range(100)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    order = [entry.name for entry in open_source(str(tmp_path)).entries]
    assert sorted(order) == names
    for part in (order[:200], order[200:], order[100:300]):
        counts = [sum(name.startswith(f"class{label}") for name in part) for label in range(4)]
        assert all(30 < count < 70 for count in counts), counts
    for name in names[::3]:  # the rest keep their order
        (tmp_path / name).unlink()
    assert [entry.name for entry in open_source(str(tmp_path)).entries] == [
        name for name in order if (tmp_path / name).exists()
    ]


def test_links_are_followed_and_a_link_that_leads_back_ends(tmp_path):
    fill(tmp_path / "elsewhere", ["linked.png"])
    folder = fill(tmp_path / "images", ["own.png", "sub/inner.png"])
    (folder / "there").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images = open_images(str(folder), SIZE)
    assert len(images) == 3
    assert images.skipped == [("gone.png", "No such file or directory")]


def test_a_named_pipe_does_not_hang_the_run(tmp_path):
    fill(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "pipe.png")
    assert open_images(str(tmp_path), SIZE).skipped == [("pipe.png", "not a regular file")]


def test_names_that_cannot_be_printed_are_read_and_reported(tmp_path):
    fill(tmp_path, ["a.png"])
    strange = os.fsencode(tmp_path) + b"/\xff\nb.png"
    with open(strange, "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    with open(os.fsencode(tmp_path) + b"/\xfe.png", "wb") as file:
        file.write(b"damaged")
    images = open_images(str(tmp_path), SIZE)
    assert len(images) == 2
    assert images.skipped == [("\N{REPLACEMENT CHARACTER}.png", "not a JPEG, PNG or WebP image")]
    images.skipped[0].name.encode()
    assert len(images.fingerprint()) == 64


def test_an_absent_path(tmp_path):
    assert "No such file or directory" in refusal(tmp_path / "nowhere")
    assert "No such file or directory" in refusal("")
    assert "null" in refusal("a\0b")
    assert "Not a directory" in refusal(fill(tmp_path, ["a.png"]) / "a.png" / "b")


def test_an_empty_set(tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    assert "holds no readable image" in refusal(tmp_path)
    assert "holds no readable image" in refusal(pack(tmp_path, tmp_path / "empty.zip"))
    with zipfile.ZipFile(tmp_path / "nothing.zip", "w"):
        pass
    assert "holds no readable image" in refusal(tmp_path / "nothing.zip")


def test_a_set_of_which_nothing_is_readable_names_examples(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_text("damaged")
    message = refusal(tmp_path)
    assert "5 could not be read (0.png: not a JPEG, PNG or WebP image, 1.png" in message
    assert "…" in message


def test_a_file_that_is_no_zip(tmp_path):
    image = fill(tmp_path, ["a.png"]) / "a.png"
    assert "is not a zip; give a folder of images or a zip of them" in refusal(image)
    (tmp_path / "empty.zip").touch()
    assert "is not a zip" in refusal(tmp_path / "empty.zip")
    os.mkfifo(tmp_path / "pipe.zip")
    assert "neither a folder nor a zip" in refusal(tmp_path / "pipe.zip")


def test_a_broken_zip(tmp_path):
    whole = pack(fill(tmp_path / "images", NAMES), tmp_path / "whole.zip").read_bytes()
    for length in (4, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.zip").write_bytes(whole[:length])
        assert "is a broken zip" in refusal(tmp_path / "cut.zip")


def test_a_zip_damaged_anywhere_is_refused_or_read_in_part(tmp_path):
    """Any byte of it may be wrong: either one line, or the readable images and the names of the rest; never another error."""
    whole = pack(fill(tmp_path / "images", NAMES), tmp_path / "whole.zip").read_bytes()
    pick = random.Random(0)
    refused = partly = 0
    for attempt in range(150):
        damaged = bytearray(whole)
        for _ in range(pick.randint(1, 8)):
            place = pick.randrange(len(whole)) if attempt % 2 else pick.randrange(len(whole) - 600, len(whole))  # the directory
            damaged[place] = pick.randrange(256)
        (tmp_path / "damaged.zip").write_bytes(damaged)
        try:
            images = open_images(str(tmp_path / "damaged.zip"), SIZE)
        except InputError:
            refused += 1
            refusal(tmp_path / "damaged.zip")
        else:
            partly += bool(images.skipped)
            assert 0 < len(images) <= len(NAMES)
    assert refused > 10
    assert partly > 10


def test_an_encrypted_zip(tmp_path):
    path = pack(fill(tmp_path / "images", ["a.png"]), tmp_path / "secret.zip")
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of the member and of its directory entry
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    assert "is encrypted; unpack it and give the folder" in refusal(path)


def test_zip_members_beyond_reason_are_named_not_loaded(tmp_path, monkeypatch):
    """A zip bomb: the directory declares a size that no image file has; nothing of it is unpacked."""
    fill(tmp_path / "images", ["good.png"])
    (tmp_path / "images" / "bomb.png").write_bytes(b"\0" * 5_000_000)
    path = pack(tmp_path / "images", tmp_path / "images.zip")
    monkeypatch.setattr("pbbench.data.entries.MAX_FILE_BYTES", 1_000_000)
    images = open_images(str(path), SIZE)
    assert images.skipped == [("bomb.png", "5,000,000 bytes exceed the limit of 1,000,000 for one image file")]
    assert len(images) == 1


def test_of_two_members_of_one_name_the_later_counts_as_when_unpacking(tmp_path):
    fill(tmp_path, ["first.png", "second.png"])
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.write(tmp_path / "first.png", "a.png")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(tmp_path / "second.png", "a.png")
    images = open_images(str(tmp_path / "twice.zip"), SIZE)
    assert len(images) == 1
    assert (images[0].numpy().transpose(1, 2, 0) == scene(0, 1, SIZE)).all()


AS_NOBODY = """
import os, sys
from PIL import Image
from pbbench.errors import InputError
from pbbench.data.images import open_images
Image.init()  # its decoders, while they can be imported
if os.getuid() == 0:  # root may read everything
    os.setgid(65534)
    os.setuid(65534)
for source in sys.argv[1:]:
    try:
        images = open_images(source, (8, 8))
        print(len(images), [tuple(skipped) for skipped in images.skipped])
    except InputError as error:
        print(error)
"""


def test_paths_without_permission():
    with tempfile.TemporaryDirectory() as top:  # pytest's own folders are closed to other users all the way down
        os.chmod(top, 0o755)
        folder = fill(Path(top, "images"), ["open.png", "closed.png", "inner/a.png"])
        packed = pack(fill(Path(top, "others"), ["a.png"]), Path(top, "others.zip"))
        shut = fill(Path(top, "shut"), ["a.png"])
        for path in (folder / "closed.png", folder / "inner", packed, shut):
            path.chmod(0)
        command = [sys.executable, "-c", AS_NOBODY, *map(str, (folder, packed, shut, shut / "deeper"))]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        for path in (folder / "inner", shut):
            path.chmod(0o755)
    assert run.returncode == 0, run.stderr
    mixed, zipped, listed, within = run.stdout.splitlines()
    assert mixed == "1 [('closed.png', 'Permission denied'), ('inner/', 'Permission denied')]"
    assert zipped == f"cannot read the zip {packed}: Permission denied"
    assert listed == f"cannot read the image folder {shut}: Permission denied"
    assert "Permission denied" in within
