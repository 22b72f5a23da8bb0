"""The commands as a user runs them, end to end; bad input is one line on stderr, exit code 2, and nothing written over."""

import json
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
from command_line import pbbench
from PIL import Image

from pbbench.cli import app
from pbbench.cli.options import run_app
from pbbench.data.synthetic import scenes


def one_line(done, *told):
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    for text in told:
        assert text in done.stderr


def in_this_process(capfd, *words):
    """What ``pbbench(*words)`` gives, without a process of its own."""
    code = run_app(app, list(map(str, words)))
    told = capfd.readouterr()
    return subprocess.CompletedProcess(words, code, told.out, told.err)


@pytest.fixture(scope="module")
def trained(tiny_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    done = pbbench("train", "--experiment", tiny_file, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos")
    for index, pixels in enumerate(scenes(1, range(12), (16, 16))):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path / f"{index}.png")
    return path


def test_train_then_sample_the_same_images_whatever_the_batch(trained, tmp_path):
    for name, batch in (("a", 4), ("b", 1)):
        done = pbbench(
            "sample", "--checkpoint", trained, "--num-images", 4, "--out", tmp_path / name, "--seed", 3,
            "--set", f"sampling.batch_size={batch}", "--device", "cpu",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"{index:06}.png" for index in range(4)]
    for name in names:
        a, b = (np.asarray(Image.open(tmp_path / run / name)).astype(int) for run in "ab")
        assert a.shape == (16, 16, 3)
        assert abs(a - b).max() <= 1


def test_train_resumes_and_will_not_write_over(trained, tiny_file):
    one_line(pbbench("train", "--experiment", tiny_file, "--out", trained), "--resume")
    done = pbbench("train", "--experiment", tiny_file, "--out", trained, "--resume", "--set", "training.num_steps=5")
    assert done.returncode == 0, done.stderr
    assert "step-00000005" in done.stdout
    assert "100% those of step 1" in done.stderr  # an average that is updated every ten steps, in five


@pytest.mark.slow
def test_fid_through_the_real_inception_path_names_unpublished_weights(folder, inception_file):
    done = pbbench(
        "fid",
        "--samples",
        folder,
        "--reference",
        "synthetic",
        "--num-images",
        12,
        "--inception-weights",
        inception_file,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["unverified_inception_frechet_distance"] > 0
    assert not any(name.startswith(("frechet_inception", "kernel_inception")) for name in scores)
    assert (scores["num_images"], scores["num_reference_images"], scores["image_size"]) == (12, 12, "16×16")


def test_fid_of_a_checkpoint_against_a_zip(trained, folder, inception_file, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    done = pbbench(
        "fid", "--samples", trained, "--reference", tmp_path / "photos.zip", "--num-images", 8, "--metrics", "kid",
        "--inception-weights", inception_file, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert "8 samples" in scores["samples"]
    assert "unverified_inception_kernel_distance_mean" in scores
    assert "precision" not in scores


def test_fid_without_weights_and_network_says_what_is_missing(folder, tmp_path):
    import os

    nowhere = {
        **os.environ, "TORCH_HOME": str(tmp_path), "PBBENCH_INCEPTION_WEIGHTS": "", "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }  # fmt: skip
    one_line(
        pbbench("fid", "--samples", folder, "--reference", "synthetic", env=nowhere),
        "PBBENCH_INCEPTION_WEIGHTS", "--inception-weights",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("fid", "--samples", "absent", "--reference", "synthetic"), "absent does not exist"),
        (("fid", "--samples", "{folder}", "--reference", "synthetic", "--metrics", "is"), "'is'"),
        (("fid", "--samples", "{folder}", "--reference", "synthetic", "--inception-weights", "{text}"), "weights"),
        (("fid", "--samples", "{folder}", "--reference", "synthetic", "--inception-weights", "absent"), "absent"),
        (("fid", "--samples", "{folder}"), "--reference"),
        (("sample", "--checkpoint", "absent", "--num-images", "1", "--out", "{tmp}/o"), "absent"),
        (("sample", "--checkpoint", "{folder}", "--num-images", "1", "--out", "{tmp}/o"), "no checkpoint"),
        (("sample", "--checkpoint", "{trained}", "--num-images", "0", "--out", "{tmp}/o"), "--num-images"),
        (("sample", "--checkpoint", "{trained}", "--num-images", "1", "--out", "{folder}"), "not an empty folder"),
        (("sample", "--checkpoint", "{trained}", "--num-images", "1", "--out", "{tmp}/o", "--sampler", "euler"), "'ddpm'"),
        (("sample", "--checkpoint", "{trained}", "--num-images", "1", "--out", "{tmp}/o", "--seed", "-1"), "sampling.seed"),
        (("sample", "--checkpoint", "{trained}", "--num-images", "1", "--out", "{tmp}/o", "--set", "model.dim=16"), "model"),
        (("train", "--experiment", "{tiny}", "--out", "{tmp}/t", "--divider", "3"), "would fit"),
        (("train", "--experiment", "{tiny}", "--out", "{tmp}/t", "--set", "data.source=absent"), "absent"),
        (("train", "--experiment", "{tiny}", "--out", "{tmp}/t", "--set", "data.source={text}"), "text.txt"),
        (("train", "--experiment", "{text}", "--out", "{tmp}/t"), "text.txt"),
        (("train", "--experiment", "{tiny}", "--out", "{text}"), "text.txt"),
        (("train", "--experiment", "{tiny}", "--out", "{tmp}/t", "--device", "cuda"), "not there"),
        (("convert", "--config", "absent.json", "--checkpoint", "absent.pt", "--out", "{tmp}/c"), "absent.json"),
        (("convert", "--config", "{text}", "--checkpoint", "{text}", "--out", "{tmp}/c"), "text.txt"),
        (("report", "absent"), "absent"),
        (("report", "{folder}"), "holds no cells"),
        (("predict", "--dividers", "3"), "would fit"),
        (("predict", "--patch-batch-size", "none"), "'none'"),
        (("sweep", "--dividers", "1", "x"), "'x'"),
        (("sweep", "--set", "data.source=absent", "--out", "{tmp}/s"), "absent"),
        (("sweep", "--dividers", "2", "--set", 'sweep.checkpoints={2="absent"}', "--out", "{tmp}/s"), "absent"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(words, told, folder, trained, tiny_file, tmp_path, capfd):
    """In this process, which has imported torch already; others of its kind run as a user runs them."""
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    text = tmp_path / "text.txt"
    text.write_text("neither an image nor a network")
    out = tmp_path / "out"
    out.mkdir()
    places = {"folder": folder, "trained": trained, "tiny": tiny_file, "text": text, "tmp": out}
    given = [word if "=" in word and "{2" in word else word.format(**places) for word in words]
    before = sorted(path.name for path in folder.iterdir())
    one_line(in_this_process(capfd, *given), told)
    assert list(out.iterdir()) == []
    assert text.read_text() == "neither an image nor a network"
    assert sorted(path.name for path in folder.iterdir()) == before


def test_convert_the_released_checkpoint(shared, tmp_path):
    """The reference's own checkpoint, through the command line, gives the averaged model's output it had."""
    import torch
    from safetensors.torch import load_file

    from pbbench.training.checkpoint import load_model

    source = shared / "reference" / "checkpoint"
    out = tmp_path / "converted"
    words = (
        "convert",
        "--config",
        source / "config_patch_divider=2.json",
        "--checkpoint",
        source / "model-last.pt",
        "--out",
        out,
    )
    done = pbbench(*words)
    assert done.returncode == 0, done.stderr
    model, _ = load_model(out)
    expected = load_file(source / "expected.safetensors")
    x_t, t, wanted = expected["x_t"], expected["timestep"], expected["ema_model_output"]
    torch.testing.assert_close(model(x_t, t), wanted, rtol=1e-4, atol=1e-5)
    one_line(pbbench(*words), "not an empty folder")


def test_unreadable_images_are_named_and_counted(tiny_file, folder, tmp_path):
    """A sweep does so, too (tests/sweep/test_finished_sweep.py)."""
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    done = pbbench("train", "--experiment", tiny_file, "--set", f"data.source={photos}", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "broken.jpg" in done.stderr
    assert "1 skipped" in done.stderr
