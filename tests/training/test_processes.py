"""Sampling in several processes: the same images for a seed whatever their number, each drawn and written once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pbbench.errors import StorageError
from pbbench.experiment.experiment import parse_experiment
from pbbench.experiment.settings import ModelConfig
from pbbench.model.diffusion import Diffusion
from pbbench.model.unet import PatchUNet
from pbbench.processes import Processes
from pbbench.training import generate
from pbbench.training.checkpoint import write_checkpoint
from pbbench.training.generate import draw, sample_to_folder

SETTINGS = {
    "name": "tiny",
    "model": {"dim": 8, "dim_mults": [1, 2], "image_size": 8, "patch_divider": 2},
    "sampling": {"sampler": "ddim", "num_inference_steps": 2, "batch_size": 3},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    experiment = parse_experiment(SETTINGS, "the test")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = PatchUNet(experiment.model)
    folder = tmp_path_factory.mktemp("network") / "kept"
    return write_checkpoint(folder, model=model, ema_model=model, experiment=experiment, step=1, images_seen=1)


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    """Two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_shares_are_the_batches_of_one_process(count: int, tiny_config: ModelConfig) -> None:
    experiment = parse_experiment(SETTINGS, "the test")
    model, device = PatchUNet(tiny_config).eval(), torch.device("cpu")
    arguments = (model, Diffusion(experiment.diffusion), experiment.sampling, 11, device)
    alone = generate.generate(*arguments)
    shares = [list(draw(*arguments, wanted=Processes(rank, count).share(11, 3))) for rank in range(count)]
    assert sorted(index for share in shares for index, _ in share) == list(range(11))
    for index, image in (pair for share in shares for pair in share):
        assert torch.equal(image, alone[index])
    assert max(map(len, shares)) <= -(-4 // count) * 3  # four batches of at most three
    across = list(draw(*arguments, wanted=range(4, 8)))
    assert [index for index, _ in across] == [4, 5, 6, 7]
    assert all(torch.equal(image, alone[index]) for index, image in across)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Processes(3, 4).device("cuda") == torch.device("cuda", 1)
    assert Processes(3, 4).device("cpu") == torch.device("cpu")
    assert Processes().device("cuda") == torch.device("cuda")


@pytest.mark.slow
def test_two_processes_write_the_files_that_one_writes(checkpoint: Path, tmp_path: Path) -> None:
    sample_to_folder(checkpoint, 11, tmp_path / "one", [], "cpu")
    log = tmp_path / "written.txt"
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom pbbench.training import generate\n"
        "write = generate.save_png\n"
        "def noting(image, path):\n    write(image, path)\n"
        "    with open(sys.argv[3], 'a') as file:\n        file.write(f\"{os.environ['RANK']} {path.name}\\n\")\n"
        "generate.save_png = noting\n"
        "generate.sample_to_folder(Path(sys.argv[1]), 11, Path(sys.argv[2]), [], 'cpu')\n"
    )
    done = torchrun(script, checkpoint, tmp_path / "two", log)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    written = [line.split() for line in log.read_text().splitlines()]
    assert sorted(name for _, name in written) == sorted(files(tmp_path / "one"))  # each once
    assert {rank: sum(r == rank for r, _ in written) for rank in "01"} == {"0": 6, "1": 5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("train", "--preset", "cpu", "--divider", "x", "--out", "{kept}"), "'x' is not a whole number"),
        (("train", "--preset", "cpu", "--device", "cpu", "--out", "{kept}"), "is not empty"),
        (("sample", "--checkpoint", "{kept}", "--num-images", "4", "--out", "{kept}"), "is not an empty folder"),
    ],
)
def test_bad_input_is_told_by_one_process(words: tuple[str, ...], what: str, checkpoint: Path) -> None:
    """Before the processes have met, in accelerate's group, and in ours."""
    done = torchrun("-m", "pbbench.cli", *(word.format(kept=checkpoint) for word in words))
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "pbbench: " in line]
    assert what in line
    assert "pbbench/cli" not in done.stderr  # nobody's traceback
    assert "exitcode  : 2" in done.stderr  # torchrun's own exit code is 1 whenever a process fails


def test_a_full_disk_leaves_whole_images_only(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, calls = os.replace, iter(range(100))

    def full(source: Path, target: Path) -> None:
        if next(calls) == 4:
            raise OSError(28, "No space left on device")
        replace(source, target)

    whole = files(sample_to_folder(checkpoint, 6, tmp_path / "whole", [], "cpu"))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"000004.png \(\[Errno 28\] No space left on device\); make room"):
        sample_to_folder(checkpoint, 6, tmp_path / "out", [], "cpu")
    found = files(tmp_path / "out")
    assert len(found) == 4
    assert found.items() <= whole.items()
