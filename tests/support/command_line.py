"""pbbench as a user runs it, in a process of its own, and the smallest experiment that has every part. Its sampler is the one
that does not import diffusers, which takes as long as torch itself."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from typing import Any

TINY = """
name = "tiny"
device = "cpu"
[model]
dim = 8
dim_mults = [1, 2]
image_size = 16
[training]
batch_size = 2
num_steps = 4
ema_start_step = 1
sample_every = 0
[sampling]
sampler = "ddpm"
num_inference_steps = 2
[data]
num_images = 60
[quality]
num_images = 16
save_samples = true
[sweep]
dividers = [1, 2]
measured_steps = 2
"""


def tiny(**sections: dict[str, Any]) -> Any:
    """That experiment, with other settings in some sections."""
    from pbbench.experiment.experiment import merge, parse_experiment

    return parse_experiment(merge(tomllib.loads(TINY), sections), "test")


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pbbench.cli", *map(str, words)]


def pbbench(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, check=False, **more)
