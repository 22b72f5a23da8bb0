"""Puts trained dividers into the package: the averaged weights of a training run's checkpoint in 16 bits, and what made them.

    OMP_NUM_THREADS=1 pbbench train --preset scenes --divider 4 --out runs/d4
    python experiments/ship.py --commit 0123abc --torch 2.14.1 --processor "AMD EPYC" runs/d4/checkpoints/step-00009500

writes pbbench/trained/d4: ema.safetensors and config.json, a checkpoint as others are, with ``dtype`` and ``made``. The commit,
torch and the processor are those of the training, which a checkpoint does not record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pbbench.sweep.shipped import FOLDER
from pbbench.training.checkpoint import read_config


def ship(checkpoint: Path, made: dict[str, str]) -> Path:
    config = read_config(checkpoint)
    experiment = config["experiment"]
    divider = experiment["model"]["patch_divider"]
    out = FOLDER / f"d{divider}"
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: x.to(torch.float16) for name, x in load_file(checkpoint / "ema.safetensors").items()}
    save_file(weights, out / "ema.safetensors")
    command = f"OMP_NUM_THREADS=1 pbbench train --preset {experiment['name']} --divider {divider} --out DIR"
    digest = hashlib.sha256((out / "ema.safetensors").read_bytes()).hexdigest()
    config |= {"dtype": "F16", "sha256": {"ema.safetensors": digest}, "made": {"command": command, **made}}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--commit", "--torch", "--processor"):
        parser.add_argument(name, required=True)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    given = vars(parser.parse_args())
    for path in given.pop("checkpoints"):
        print(ship(path, given))
