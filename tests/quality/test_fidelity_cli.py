"""``pbbench fid`` against torch-fidelity's own command line: the same folders, the same file of weights, the same digits."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pbbench.data.synthetic import scenes
from pbbench.quality.score_sets import SEED, lines, score_sets


def folder_of(path: Path, first: int, count: int) -> Path:
    """Scenes under names whose order is not that of their hashes, as JPEG and PNG."""
    path.mkdir()
    for index, pixels in enumerate(scenes(3, range(first, first + count), (32, 32))):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path / f"{index:03}.{'png' if index % 2 else 'jpg'}")
    return path


def ours(samples: Path, reference: Path, weights: Path, metrics: tuple[str, ...] = ("fid", "kid", "prc")) -> dict[str, Any]:
    names = {"samples": str(samples), "reference": str(reference), "weights": str(weights)}
    return score_sets(**names, metrics=metrics, num_images=None, image_size=None, device="cpu")


def test_seed_is_theirs() -> None:
    from torch_fidelity.defaults import DEFAULTS

    assert DEFAULTS["rng_seed"] == SEED


@pytest.mark.slow
def test_equal_to_the_command_line(inception_file: Path, tmp_path: Path) -> None:
    """The second set is the larger, so that KID's subsets are a choice, which the order of the files decides."""
    one, two = folder_of(tmp_path / "one", 0, 10), folder_of(tmp_path / "two", 10, 14)
    command = [Path(sys.executable).with_name("fidelity"), "--input1", one, "--input2", two, "--fid", "--kid", "--prc"]
    command += ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", inception_file]
    command += ["--kid-subset-size", "10", "--cpu", "--json", "--no-cache"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout[done.stdout.index("{") :])
    found = ours(one, two, inception_file)
    assert found["unverified_inception_frechet_distance"] == theirs["frechet_inception_distance"]
    assert found["unverified_inception_kernel_distance_mean"] == theirs["kernel_inception_distance_mean"]
    assert found["unverified_inception_kernel_distance_std"] == theirs["kernel_inception_distance_std"]
    both = found["unverified_inception_precision"], found["unverified_inception_recall"]
    assert both == (theirs["precision"], theirs["recall"])


def test_a_zip_counts_as_the_folder_it_unpacks_to(inception_file: Path, tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "one", 0, 5), folder_of(tmp_path / "two", 5, 6)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for path in sorted(two.iterdir(), reverse=True):
            archive.write(path, path.name)
    found = [ours(one, reference, inception_file, ("kid",)) for reference in (two, tmp_path / "two.zip")]
    name = "unverified_inception_kernel_distance_mean"
    assert found[0][name] == found[1][name]


def test_what_a_person_reads() -> None:
    """Names with the number of images, intervals beside the figures, reasons for what is not there."""
    told = "\n".join(
        lines(
            {
                "frechet_inception_distance": 12.345678,
                "frechet_inception_distance_interval": [12.0, 12.75],
                "kernel_inception_distance_mean": 0.01,
                "kernel_inception_distance_mean_interval": None,
                "precision": None,
                "num_images": 10_000,
                "seed": 2020,
                "reasons": {"precision": "takes more than 3 images in each set"},
                "notes": ["something to know"],
            }
        )
    )
    assert "FID-10k     12.3457  (95% interval 12 to 12.75)" in told
    assert "KID-10k     0.01\n" in told
    assert "precision   –  (takes more than 3 images in each set)" in told
    assert "num images  10000" in told
    assert told.endswith("note: something to know")
