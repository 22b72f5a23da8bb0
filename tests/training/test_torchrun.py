"""Training in several processes: the model that one process trains with all their images, and resumed to the bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import WELL_CONDITIONED, files_of, flat, state_of, tiny

from pbbench.errors import InputError
from pbbench.training.checkpoint import checkpoints_of, load_model
from pbbench.training.setup import build_network
from pbbench.training.train import train


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    """torchrun on a CPU: gradients are exchanged once per step, whatever the chunks and micro-batches."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\nfrom pbbench.experiment.presets import load_experiment\nfrom pbbench.training.train import train\n"
        "if __name__ == '__main__':\n    print(train(load_experiment(sys.argv[1]), sys.argv[2]))\n"
    )
    settings = {"gradient_accumulation_steps": 2, "sample_every": 6, "num_grid_samples": 3}
    shared = tiny(model=WELL_CONDITIONED, training={**settings, "batch_size": 2})
    (tmp_path / "two.toml").write_text(shared.to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "two.toml"), str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("images_seen=48") == 2  # both took part
    train(tiny(model=WELL_CONDITIONED, training={**settings, "batch_size": 4}), tmp_path / "one")
    for which in ("model", "ema"):
        two, one = (flat(load_model(tmp_path / run, which=which)[0]) for run in ("two", "one"))  # type: ignore[arg-type]
        assert (two - one).norm() < 0.02 * (one - flat(build_network(shared))).norm()
    # Adam's steps do not tell a gradient from a multiple of it; what it has gathered does.
    two, one = (load_file(checkpoints_of(tmp_path / run)[-1] / "optimizer.safetensors") for run in ("two", "one"))
    for kind in ("exp_avg.", "exp_avg_sq."):
        ours, theirs = (torch.cat([x.flatten() for key, x in state.items() if key.startswith(kind)]) for state in (two, one))
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert (tmp_path / "two/samples/step-00000006.png").is_file()
    with pytest.raises(InputError, match="trained by 2 processes, this is 1"):
        train(shared, tmp_path / "two", resume=True)


PARTS = """
import os, signal, sys
from pathlib import Path
from pbbench.experiment.presets import load_experiment
from pbbench.training import progress
from pbbench.training.train import train

class StoppedError(Exception):
    pass

def stop(*_):
    raise StoppedError

def interrupt(state):  # the process that reports is told to stop, the others are not
    if state["step"] == 3:
        os.kill(os.getpid(), signal.SIGTERM)

progress.INTERVAL = 0.0
signal.signal(signal.SIGTERM, stop)
experiment, out, ports = load_experiment(sys.argv[1]), Path(sys.argv[2]), iter(sys.argv[3:])
os.environ["MASTER_PORT"] = next(ports)
train(experiment, out / "straight")
os.environ["MASTER_PORT"] = next(ports)
try:
    print(train(experiment, out / "parts", progress=interrupt).steps)
except StoppedError:
    print("stopped")
os.environ["MASTER_PORT"] = next(ports)
train(experiment, out / "parts", resume=True)
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_resumed_they_equal_the_uninterrupted_run(tmp_path: Path) -> None:
    """Three: the sum of two gradients is the same in any order, that of three is not."""
    count = 3
    (tmp_path / "parts.py").write_text(PARTS)
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "mixed_precision": "fp16", "save_every": 6}
    (tmp_path / "parts.toml").write_text(tiny(training=settings).to_toml())
    sockets = [socket.socket() for _ in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    words = [sys.executable, tmp_path / "parts.py", tmp_path / "parts.toml", tmp_path, *ports]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            words, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(count)
    ]
    try:
        told = [process.communicate(timeout=180)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, told
    assert sorted(text.splitlines()[-1] for text in told) == ["4"] * (count - 1) + ["stopped"], told
    assert (tmp_path / "parts/checkpoints/step-00000004").is_dir()
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "straight")
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "straight")
