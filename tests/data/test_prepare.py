"""``pbbench data prepare``: the same pixels, order and fingerprint as the source; interrupted anywhere, refused clearly."""

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from pbbench.cli.options import run_app
from pbbench.data import prepare as preparing
from pbbench.data.images import ImageSet, open_images
from pbbench.data.loader import training_loader
from pbbench.data.prepare import prepare
from pbbench.data.synthetic import scene
from pbbench.errors import InputError
from pbbench.experiment.experiment import parse_experiment

SIZE = (8, 12)
COUNT = 23
BROKEN = ["bad/empty.jpg", "bad/text.png"]


def encoded(number: int) -> bytes:
    """JPEGs larger than SIZE, of several shapes, of which a resize and a crop on either side are taken."""
    file = io.BytesIO()
    Image.fromarray(scene(0, number, (15 + number % 4, 19 + number % 3))).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The same images three ways; two files of the folder and of the zip are broken from the header on."""
    top = tmp_path_factory.mktemp("sources")
    folder = top / "folder"
    (folder / "bad").mkdir(parents=True)
    for number in range(COUNT):
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    for name, content in zip(BROKEN, (b"", b"no image"), strict=True):
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(top / "packed.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    with lmdb.open(str(top / "lmdb"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for number in range(COUNT):
            transaction.put(f"{number:040x}".encode(), encoded(number))
    return {"folder": folder, "zip": top / "packed.zip", "lmdb": top / "lmdb", "synthetic": Path("synthetic")}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    """Seven images a shard: two full ones and one that is not, as any real set has."""
    monkeypatch.setattr(preparing, "SHARD_BYTES", 7 * 3 * SIZE[0] * SIZE[1] + 1)


def opened(path: Path, **options) -> ImageSet:
    return open_images(str(path), SIZE, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "as used"])
@pytest.mark.parametrize("kind", ["folder", "zip", "lmdb", "synthetic"])
def test_a_prepared_set_is_its_source_to_the_bit(sources, kind, limit, tmp_path):
    count = COUNT if kind == "synthetic" else None
    prepare(str(sources[kind]), tmp_path / "out", SIZE, count)
    raw, packed = (opened(path, num_images=count, memory_limit_bytes=limit) for path in (sources[kind], tmp_path / "out"))
    assert len(raw) == len(packed) == COUNT
    assert torch.equal(packed.batch(range(COUNT)), raw.batch(range(COUNT)))
    assert torch.equal(packed.batch([5, 5, 22, 0]), raw.batch([5, 5, 22, 0]))
    assert packed.skipped == raw.skipped
    assert packed.in_memory is raw.in_memory
    assert packed.fingerprint() == raw.fingerprint()
    for start, stop in ((0, 20), (20, 23), (6, 15)):
        assert packed.subset(start, stop).fingerprint() == raw.subset(start, stop).fingerprint()
    copy = pickle.loads(pickle.dumps(packed))
    assert len(pickle.dumps(packed)) < 3000  # not its pixels
    assert torch.equal(copy.batch([3, 1]), raw.batch([3, 1]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_training_takes_the_same_course_whatever_the_workers(sources, tmp_path):
    """Order and flips included: decoded as used, mapped, by no, one or three worker processes, and by a thread."""
    prepare(str(sources["zip"]), tmp_path / "out", SIZE)
    model = {"dim": 8, "dim_mults": [1, 2], "image_size": list(SIZE), "patch_divider": 2}
    streams = []
    for path, workers, limit in [(sources["zip"], 0, 0), (tmp_path / "out", 0, 2**30)] + [
        (tmp_path / "out", workers, 0) for workers in (0, 1, 3)
    ]:
        settings = {"model": model, "training": {"batch_size": 4}, "data": {"num_workers": workers}}
        loader = training_loader(opened(path, memory_limit_bytes=limit), parse_experiment(settings, "test"), 1)
        streams.append(torch.stack(list(islice(loader, 12))))
        loader.close()
    assert all(torch.equal(stream, streams[0]) for stream in streams)


def test_the_index_says_what_was_done(sources, tmp_path):
    told: list[str] = []
    prepared = prepare(str(sources["folder"]), tmp_path, SIZE, tell=told.append)
    index = json.loads((tmp_path / "index.json").read_text())
    assert [name for name, _ in index["broken"]] == [name for name, _ in prepared.broken] == BROKEN
    assert (index["num_images"], index["num_broken"]) == (COUNT, 2)
    assert [shard["count"] for shard in index["shards"]] == [7, 7, 7, 2]
    for number, shard in enumerate(index["shards"]):
        path = tmp_path / f"shard-{number:05d}.npy"
        assert path.stat().st_size == shard["bytes"]
        pixels = np.load(path, allow_pickle=False)
        assert (pixels.shape, pixels.dtype) == ((shard["count"], 3, *SIZE), np.uint8)
    assert index["settings"]["source"] == "folder"
    assert not (tmp_path / "unfinished.json").exists()
    assert opened(tmp_path).description == f"{tmp_path.name} (prepared from folder): 23 images, 2 skipped"
    assert len(told) == 5


@pytest.mark.parametrize("kind", ["folder", "zip", "lmdb"])
def test_the_files_are_the_same_for_any_number_of_threads(sources, kind, tmp_path):
    for threads in (1, 5):
        prepare(str(sources[kind]), tmp_path / str(threads), SIZE, threads=threads)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "5")


@pytest.mark.parametrize("wanted", [1, 7, 8, 100])
def test_the_first_n_readable_images(sources, wanted, tmp_path):
    prepare(str(sources["folder"]), tmp_path / "out", SIZE, wanted)
    raw, packed = opened(sources["folder"], num_images=wanted), opened(tmp_path / "out")
    assert torch.equal(packed.batch(range(len(packed))), raw.batch(range(len(raw))))
    few = opened(tmp_path / "out", num_images=1)
    assert torch.equal(few[0], raw[0])


def test_stopped_at_any_write_it_goes_on_to_the_same_files(sources, tmp_path, monkeypatch):
    """Every rename and every flush is once the last thing that the process does; what is left then never passes for whole."""
    prepare(str(sources["folder"]), tmp_path / "whole", SIZE)
    expected = files_of(tmp_path / "whole")
    for call, act in (("replace", os.replace), ("fsync", os.fsync)):
        for stop_at in range(1, 11):
            out, calls = tmp_path / f"{call}-{stop_at}", 0

            def stopping(*words, act=act, last=stop_at):
                nonlocal calls
                calls += 1
                if calls == last:
                    raise KeyboardInterrupt
                return act(*words)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, stopping)
                with pytest.raises(KeyboardInterrupt):
                    prepare(str(sources["folder"]), out, SIZE)
            assert all(expected[name] == content for name, content in files_of(out).items() if name != "unfinished.json")
            if stop_at > 1:
                with pytest.raises(InputError, match="is not finished: run pbbench data prepare again"):
                    opened(out)
            told: list[str] = []
            prepare(str(sources["folder"]), out, SIZE, tell=told.append)
            assert sum("sound" in line for line in told) == max(0, stop_at - 2) // 2
            assert files_of(out) == expected


def test_killed_without_a_word_it_goes_on(sources, tmp_path):
    """kill -9 in the middle of a shard, in a process of its own."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pbbench.data import decode, prepare\n"
        "prepare.SHARD_BYTES = 2017; inner = decode.decode\n"
        "prepare.decode.decode = lambda *words: (time.sleep(0.03), inner(*words))[1]\n"
        "prepare.prepare(sys.argv[1], Path(sys.argv[2]), (8, 12))"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, sources["folder"], out])
    deadline = time.monotonic() + 60
    while not ((out / "shard-00000.json").exists() and (out / ".shard-00001.npy.unfinished").exists()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    with pytest.raises(InputError, match="is being prepared by another process"):
        prepare(str(sources["folder"]), out, SIZE)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "begun").mkdir()  # killed at its very first file
    (tmp_path / "begun" / ".unfinished.json.unfinished").write_text("{")
    assert not (out / "index.json").exists()
    prepare(str(sources["folder"]), out, SIZE)
    prepare(str(sources["folder"]), tmp_path / "begun", SIZE)
    assert files_of(out) == files_of(tmp_path / "begun")


def test_a_full_disk_is_one_line_and_nothing_is_lost(sources, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    real, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:  # settings, two shards with their records, and now the third
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    from pbbench import cli

    words = ["data", "prepare", str(sources["folder"]), str(out), "--size", "8x12"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run_app(cli.app, words) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"pbbench: {out}: the disk is full; 2 finished shards are kept, run the same command again to go on"
    assert not list(out.glob(".*"))  # its space is given back
    assert run_app(cli.app, words) == 0
    done = capsys.readouterr()
    assert done.out == f"{out}\n"
    assert "shard 1: sound" in done.err
    assert "shard 2: being made" in done.err
    assert "skipped bad/empty.jpg: empty file" in done.err
    assert len(opened(out)) == COUNT


@pytest.mark.parametrize("name", ["shard-00001.npy", "shard-00001.json", "index.json"])
def test_a_damaged_set_is_noticed_and_mended(sources, name, tmp_path):
    prepare(str(sources["folder"]), tmp_path, SIZE)
    expected, path = files_of(tmp_path), tmp_path / name
    path.write_bytes(expected[name][:-10])
    if name == "shard-00001.json":
        with pytest.raises(InputError, match=r"shard-00001.json.*run pbbench data prepare again"):
            opened(tmp_path).fingerprint()
    else:
        with pytest.raises(InputError, match=rf"{name}.*run pbbench data prepare again"):
            opened(tmp_path)
    told: list[str] = []
    prepare(str(sources["folder"]), tmp_path, SIZE, tell=told.append)
    assert sum("sound" in line for line in told) == (4 if name == "index.json" else 3)
    assert files_of(tmp_path) == expected
    flipped = bytearray(expected["shard-00001.npy"])
    flipped[-1] ^= 1
    (tmp_path / "shard-00001.npy").write_bytes(flipped)
    told.clear()
    prepare(str(sources["folder"]), tmp_path, SIZE, tell=told.append)
    assert [line for line in told if "made" in line] == ["shard 1: being made"]
    assert files_of(tmp_path) == expected


def test_other_settings_or_another_source_are_refused(sources, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    shutil.copytree(sources["folder"], photos)
    out = tmp_path / "out"
    prepare(str(photos), out, SIZE)
    before = files_of(out)
    for words, told in [
        ((str(photos), out, (8, 8)), r"begun with size \[8, 12\], this is \[8, 8\]"),
        ((str(photos), out, SIZE, 5), "begun with num_images_wanted 25, this is 5"),
        ((str(sources["zip"]), out, SIZE), "begun with source 'photos', this is 'packed.zip'"),
        (("synthetic", out, SIZE), "begun with source 'photos'"),
        ((str(out), tmp_path / "twice", SIZE), "is prepared already; give what it was made from: photos"),
        ((str(photos), photos, SIZE), "not empty and not a prepared set"),
        ((str(photos), photos / "3.jpg", SIZE), "is a file"),
    ]:
        with pytest.raises(InputError, match=told) as caught:
            prepare(*words)
        assert "\n" not in str(caught.value)
    (photos / "3.jpg").write_bytes(encoded(4) + b"more")
    with pytest.raises(InputError, match="begun with source_fingerprint"):
        prepare(str(photos), out, SIZE)
    assert files_of(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_a_set_of_another_size_or_version_is_refused(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(str(sources["folder"]), out, SIZE)
    with pytest.raises(InputError, match=r"prepared at 8×12, asked for is 8×8; prepare another folder with --size 8, or"):
        open_images(str(out), (8, 8))
    with monkeypatch.context() as patch:
        patch.setattr("pbbench.data.decode.VERSION", 99)
        with pytest.raises(InputError, match="was prepared by other rules"):
            opened(out)
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps(index | {"format_version": 2}))
    with pytest.raises(InputError, match="format version 2, this pbbench reads 1"):
        opened(out)


def test_another_data_sets_index_is_no_matter_of_ours(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(0))
    (tmp_path / "index.json").write_text('{"images": []}')
    assert len(opened(tmp_path)) == 1


def test_a_source_without_a_readable_image_leaves_nothing_behind(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(9):
        (source / f"{number}.jpg").write_text("damaged")
    with pytest.raises(InputError, match=r"photos holds no readable image; 9 could not be read; .*\.jpg: not a JPEG"):
        prepare(str(source), tmp_path / "out", SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_source_without_an_image_is_refused_before_anything_is_said(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(InputError, match=r"empty\.zip holds no image"):
        prepare(str(tmp_path / "empty.zip"), tmp_path / "out", SIZE, tell=lambda line: pytest.fail(line))
    assert not (tmp_path / "out").exists()


def test_a_source_that_went_away_does_not_make_a_set_of_broken_images(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "MOST_BROKEN_IN_A_ROW", 5)
    photos, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(sources["folder"], photos)

    def unmount(line: str) -> None:
        if line == "shard 1: being made":
            photos.rename(tmp_path / "elsewhere")

    with pytest.raises(InputError, match=r"5 images in a row cannot be read \(.*: No such file or directory\)"):
        prepare(str(photos), out, SIZE, tell=unmount)
    (tmp_path / "elsewhere").rename(photos)
    prepare(str(photos), out, SIZE)
    prepare(str(photos), tmp_path / "whole", SIZE)
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--size", "0"], "--size: '0'"),
        (["--size", "8x"], "--size: ''"),
        (["--size", "8x8x3"], "neither a number nor height x width"),
        (["--size", "8", "--num-workers", "0"], "--num-workers: '0'"),
        (["--size", "8", "--num-images", "-1"], "--num-images"),
        ([], "--size"),
    ],
)
def test_bad_options_are_one_line(words, told, tmp_path, capsys):
    from pbbench import cli

    assert run_app(cli.app, ["data", "prepare", "synthetic", str(tmp_path / "out"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not (tmp_path / "out").exists()


def test_a_sweep_learns_of_the_wrong_size_before_it_starts(sources, tmp_path):
    from pbbench.sweep.grid import plan

    prepare(str(sources["folder"]), tmp_path, SIZE)
    settings = {"model": {"dim": 8, "dim_mults": [1, 2], "image_size": 16}, "data": {"source": str(tmp_path)}}
    with pytest.raises(InputError, match="prepared at 8×12, asked for is 16×16"):
        plan(parse_experiment(settings, "test"))


def test_a_run_begun_on_the_source_goes_on_with_the_prepared_set_to_the_bit(sources, tmp_path):
    from pbbench.training.train import train

    prepare(str(sources["folder"]), tmp_path / "packed", SIZE)

    def settings(source: Path, steps: int):
        model = {"dim": 8, "dim_mults": [1, 2], "image_size": list(SIZE), "patch_divider": 2}
        training = {"batch_size": 2, "num_steps": steps, "sample_every": 0}
        return parse_experiment({"model": model, "training": training, "data": {"source": str(source)}}, "test")

    train(settings(sources["folder"], 3), tmp_path / "half")
    changed = train(settings(tmp_path / "packed", 5), tmp_path / "half", resume=True)
    whole = train(settings(sources["folder"], 5), tmp_path / "whole")
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (changed.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()
    with pytest.raises(InputError, match="the images have changed"):
        train(settings(Path("synthetic"), 6), tmp_path / "half", resume=True)
