"""LSUN's LMDB and CelebA's folder and zip, in the layouts their sites give them; the same images however they are read."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pbbench.data.entries import in_order
from pbbench.data.images import open_images
from pbbench.data.loader import training_loader
from pbbench.data.sources import Lmdb, open_source
from pbbench.data.synthetic import scene
from pbbench.errors import InputError
from pbbench.experiment.experiment import parse_experiment

SIZE = (16, 16)


def encoded(number: int, kind: str = "WEBP", size: tuple[int, int] = (24, 20)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(scene(0, number, size)).save(file, kind)
    return file.getvalue()


def key(number: int) -> bytes:
    """LSUN's keys are forty hexadecimal digits."""
    return f"{number * 0x9E3779B97F4A7C15 % 2**160:040x}".encode()


def write_lmdb(folder: Path, values: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(folder), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for name, value in values.items():
            transaction.put(name, value)
    return folder


@pytest.fixture
def bedroom(tmp_path: Path) -> Path:
    """Twenty images as LSUN has them, one cut short behind its header and one that is none."""
    values = {key(number): encoded(number) for number in range(20)}
    values[key(20)] = encoded(20, "JPEG")[:-200]
    values[key(21)] = b"not an image"
    return write_lmdb(tmp_path / "bedroom_val_lmdb", values)


def test_the_readable_images_are_there_in_the_order_of_names_and_the_others_are_named(bedroom):
    entries = open_source(str(bedroom)).entries
    assert isinstance(open_source(str(bedroom)), Lmdb)
    assert list(entries) == in_order(list(entries)[::-1])
    assert sorted(entry.name for entry in entries) == sorted(key(number).decode() for number in range(22))
    assert {entry.name: entry.size for entry in entries}[key(21).decode()] == 12
    images = open_images(str(bedroom), SIZE)
    assert images.description == "bedroom_val_lmdb: 20 images, 2 skipped"
    assert sorted(name for name, _ in images.skipped) == sorted([key(20).decode(), key(21).decode()])
    assert dict(images.skipped)[key(21).decode()] == "not a JPEG, PNG or WebP image"


def test_its_images_are_those_of_a_folder_with_the_same_files(bedroom, tmp_path):
    """To the bit: the values are files like any other. Names have no suffix in an LMDB, so the orders differ."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.webp").write_bytes(encoded(number))
    ours, theirs = (open_images(str(source), SIZE).batch(range(20)).numpy() for source in (bedroom, folder))
    assert sorted(image.tobytes() for image in ours) == sorted(image.tobytes() for image in theirs)


def test_a_set_too_large_for_memory_opens_without_touching_an_image(bedroom, monkeypatch):
    monkeypatch.setattr(Lmdb, "open", lambda *_: pytest.fail("an image was read"))
    images = open_images(str(bedroom), SIZE, memory_limit_bytes=0)
    assert len(images) == 22
    assert len(open_images(str(bedroom), SIZE, 7, memory_limit_bytes=0)) == 7
    monkeypatch.undo()
    images.batch(range(22))
    assert len(images.skipped) == 2


def test_what_is_kept_of_a_key_is_its_bytes_and_three_numbers():
    """LSUN has three million: as Python objects they would take half a gigabyte in every process."""
    from pbbench.data.sources import Keys

    names = b"".join(key(number) for number in range(1000))
    ends = np.arange(40, 40_001, 40)
    keys = Keys(names, ends, ends, np.arange(1000)[::-1].copy())
    assert keys[0].name == key(999).decode()
    assert [entry.name for entry in keys[990:]] == [key(number).decode() for number in range(9, -1, -1)]
    assert len(pickle.dumps(keys)) < 65 * 1000
    with pytest.raises(IndexError):
        keys[1000]


def test_reading_leaves_the_folder_as_it_is(bedroom):
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in bedroom.iterdir()}
    assert set(before) == {"data.mdb", "lock.mdb"}
    (bedroom / "lock.mdb").unlink()
    open_images(str(bedroom), SIZE)
    assert [path.name for path in bedroom.iterdir()] == ["data.mdb"]
    assert (bedroom / "data.mdb").stat().st_mtime_ns == before["data.mdb"][0]
    assert len(open_images(str(bedroom / "data.mdb"), SIZE)) == 20  # the file instead of its folder


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_have_environments_of_their_own(bedroom, context):
    images = open_images(str(bedroom), SIZE, memory_limit_bytes=0)
    expected = images.batch(range(len(images)))  # the parent's environment is open now
    again = open_images(str(bedroom), SIZE, memory_limit_bytes=0)  # and serves two sets
    workers = DataLoader(again, batch_size=4, num_workers=1 if context == "spawn" else 2, multiprocessing_context=context)
    torch.testing.assert_close(torch.cat(list(workers)), expected)
    torch.testing.assert_close(again.batch(range(len(images))), expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_order_does_not_depend_on_the_number_of_workers(bedroom):
    images = open_images(str(bedroom), SIZE, memory_limit_bytes=0)
    streams = []
    for workers in (0, 1, 3):
        settings = {"model": {"dim": 8, "dim_mults": [1, 2], "image_size": 16}, "training": {"batch_size": 5}}
        experiment = parse_experiment(settings | {"data": {"num_workers": workers}}, "test")
        loader = training_loader(images, experiment)
        streams.append(torch.stack(list(islice(loader, 11))))
        loader.close()
    assert torch.equal(streams[0], streams[1])
    assert torch.equal(streams[0], streams[2])


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_images(str(path), SIZE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_copy_that_was_cut_short_is_refused_not_fatal(bedroom):
    """Reading beyond the end of a mapped file would kill the process with SIGBUS."""
    data = bedroom / "data.mdb"
    os.truncate(data, data.stat().st_size // 2)
    assert "is cut short" in refusal(bedroom)
    data.write_bytes(b"\0" * 20_000)
    elsewhere = bedroom.rename(bedroom.parent / "other_lmdb")  # the first is open in this process
    assert "cannot read the LMDB" in refusal(elsewhere)


def test_a_zip_of_it_is_to_be_unpacked(bedroom, tmp_path):
    with zipfile.ZipFile(tmp_path / "bedroom_val_lmdb.zip", "w") as archive:
        for file in bedroom.iterdir():
            archive.write(file, f"bedroom_val_lmdb/{file.name}")
    assert "unpack it and give its folder" in refusal(tmp_path / "bedroom_val_lmdb.zip")


def test_without_the_library_the_extra_is_named(bedroom):
    code = (
        "import sys; sys.modules['lmdb'] = None\n"
        "from pbbench.errors import InputError\n"
        "from pbbench.data.sources import open_source\n"
        "try: open_source(sys.argv[1])\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, bedroom], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("is an LMDB, which takes the extra lsun: pip install 'pbbench[lsun]'")


def test_celeba_as_its_site_gives_it(tmp_path):
    """``img_align_celeba`` of 178 × 218 JPEGs beside its lists; the zip nests the folder; archivers leave theirs."""
    folder = tmp_path / "CelebA" / "img_align_celeba"
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"{number + 1:06d}.jpg").write_bytes(encoded(number, "JPEG", (218, 178)))
    for name in ("list_attr_celeba.txt", "list_eval_partition.csv", ".DS_Store", "img_align_celeba/.DS_Store"):
        (tmp_path / "CelebA" / name).write_text("6")
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w") as archive:
        archive.mkdir("img_align_celeba")
        for file in sorted(folder.iterdir()):
            archive.write(file, f"img_align_celeba/{file.name}")
            archive.writestr(f"__MACOSX/img_align_celeba/._{file.name}", "resource fork")
    sets = [open_images(str(path), SIZE) for path in (tmp_path / "CelebA", tmp_path / "img_align_celeba.zip")]
    for images in sets:
        assert (len(images), images.skipped) == (6, [])
    assert sets[0].fingerprint() == sets[1].fingerprint()
    assert torch.equal(sets[0].batch(range(6)), sets[1].batch(range(6)))
    flat = open_images(str(folder), SIZE)
    assert (len(flat), flat.skipped) == (6, [])
