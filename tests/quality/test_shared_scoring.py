"""``pbbench fid`` in several processes: the digits of one, printed once; a failure is told once and leaves nobody waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pbbench.data.synthetic import scenes
from pbbench.experiment.experiment import parse_experiment
from pbbench.model.unet import PatchUNet
from pbbench.processes import Processes
from pbbench.quality.extractors import build_extractor
from pbbench.quality.features import WHOLE, extract, patch_cut
from pbbench.training.checkpoint import write_checkpoint

SIZE = (16, 16)
BATCH = 4
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SMALL_BATCHES = f"""
import sys
from pbbench.experiment.experiment import QualityConfig
from pbbench.quality import score_sets
score_sets.QualityConfig = lambda: QualityConfig(batch_size={BATCH})
"""
"""So that a few images are several batches."""


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    where = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(list(map(str, words)), env=where, capture_output=True, text=True, timeout=100, check=False)


def script(folder: Path, text: str) -> Path:
    path = folder / "job.py"
    path.write_text(SMALL_BATCHES + text)
    return path


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What pbbench said on stderr, among what torchrun says of processes that failed."""
    return [line for line in done.stderr.splitlines() if "pbbench: " in line]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index, pixels in enumerate(scenes(3, range(11), SIZE)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings: dict[str, Any] = {
        "model": {"dim": 8, "dim_mults": [1, 2], "image_size": SIZE[0], "patch_divider": 2},
        "sampling": {"sampler": "ddpm", "num_inference_steps": 2, "batch_size": 3},  # no divider of the extractor's batches
    }
    experiment = parse_experiment(settings, "the test")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = PatchUNet(experiment.model)
    folder = tmp_path_factory.mktemp("network") / "kept"
    return write_checkpoint(folder, model=model, ema_model=model, experiment=experiment, step=1, images_seen=1)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("num_images", [0, 1, 7, 8, 9])
def test_shares_are_runs_of_whole_batches(count: int, num_images: int) -> None:
    shares = [Processes(rank, count).share(num_images, 2) for rank in range(count)]
    assert [index for share in shares for index in share] == list(range(num_images))
    assert all(share.start % 2 == 0 for share in shares)
    batches = [-(-len(share) // 2) for share in shares]
    assert max(batches) - min(batches) <= 1


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_parts_of_several_processes_are_the_features_of_one(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = list(torch.from_numpy(scenes(3, range(11), SIZE)))
    extractor, cuts = build_extractor("random", None, "cpu"), [WHOLE, patch_cut(*SIZE)]
    alone = extract(extractor, images, "samples", cuts, BATCH, None, Processes())
    monkeypatch.setattr(Processes, "gather", lambda self, rows: rows)
    parts = [extract(extractor, images, "samples", cuts, BATCH, None, Processes(rank, count)) for rank in range(count)]
    for cut in cuts:
        assert torch.equal(torch.cat([part[cut.name] for part in parts]), alone[cut.name])
        assert sum(len(part[cut.name]) > 0 for part in parts) == min(count, 3)  # there are three batches


@pytest.mark.slow
def test_two_processes_give_the_digits_of_one(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Folders, a checkpoint, scenes, patches, a set with a file that is damaged behind its header, and the features' cache."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in photos.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    whole = (damaged / "005.png").read_bytes()
    (damaged / "005.png").write_bytes(whole[: len(whole) // 2])
    job = script(
        tmp_path,
        """
import json
from pathlib import Path
import torch
from pbbench.processes import is_main_process, joined_processes
from pbbench.quality import extractors, fid
from pbbench.data.synthetic import scenes

fid.resolve_inception_weights = lambda *_: None
fid.build_extractor = lambda name, weights, device: extractors.build_extractor("random", None, device)
photos, damaged, checkpoint, out = map(Path, sys.argv[1:])
found = []
for samples, reference, num_images in ((photos, damaged, None), (checkpoint, photos, 10), (checkpoint, "synthetic", 9)):
    found.append(score_sets.score_sets(
        str(samples), str(reference), metrics=("fid", "kid", "prc", "patch"), weights=None, num_images=num_images,
        image_size=None, device="cpu",
    ))

class Known(list):
    def content_fingerprint(self):
        return "known"

one, two = (list(torch.from_numpy(scenes(seed, range(9), (16, 16)))) for seed in (1, 2))
with joined_processes() as processes:
    for _ in range(2):
        found.append(fid.score(
            one, Known(two), extractor="random", batch_size=4, cache=out.with_suffix(".cache"), processes=processes))
if is_main_process():
    out.write_text(json.dumps(found))
else:
    assert found == [{}] * 5
""",
    )
    for launch, name in (([sys.executable], "one"), (TORCHRUN, "two")):
        done = run(*launch, job, photos, damaged, checkpoint, tmp_path / f"{name}.json")
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(list((tmp_path / f"{name}.cache").iterdir())) == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two == one
    assert [scores["num_reference_images"] for scores in one] == [10, 10, 9, 9, 9]
    assert one[3] == one[4]


@pytest.mark.slow
def test_the_command_prints_once_and_the_same(photos: Path, checkpoint: Path, inception_file: Path, tmp_path: Path) -> None:
    job = script(tmp_path, "from pbbench.cli import main\nmain()\n")
    words = [job, "fid", "--samples", checkpoint, "--reference", photos, "--num-images", 5, "--metrics", "kid", "--json"]
    one, two = (run(*launch, *words, PBBENCH_INCEPTION_WEIGHTS=str(inception_file)) for launch in ([sys.executable], TORCHRUN))
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout == one.stdout
    assert json.loads(one.stdout)["unverified_inception_kernel_distance_mean"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("error", ["InputError", "ZeroDivisionError"])
def test_one_process_that_fails_ends_all_and_says_why(error: str, photos: Path, inception_file: Path, tmp_path: Path) -> None:
    job = script(
        tmp_path,
        f"""
import os
from pbbench.cli import main
from pbbench.errors import InputError
from pbbench.quality import score_sets

def failing(*_):
    raise {error}("met by one process only")

if os.environ["RANK"] == "1":
    score_sets._decoded = failing
main()
""",
    )
    words = [job, "fid", "--samples", photos, "--reference", photos, "--inception-weights", inception_file]
    done = run(*TORCHRUN, *words)  # ends by itself, within the time limit of ``run``
    assert done.returncode != 0
    assert done.stdout == ""
    line = f"{'pbbench' if error == 'InputError' else error}: met by one process only"
    assert sum(said.endswith(line) for said in done.stderr.splitlines()) == 1
    assert len(told(done)) == (error == "InputError")
    assert "torch.distributed.all_reduce" not in done.stderr  # what the other process saw of it
