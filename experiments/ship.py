"""Puts trained dividers into the package: the averaged weights of a training run's checkpoint in 16 bits, and what made them.

    pbbench train --preset scenes --divider 4 --out runs/d4
    python experiments/ship.py COMMIT runs/d4/checkpoints/step-00009500

writes pbbench/trained/d4: ema.safetensors and config.json, a checkpoint as others are, with ``made``: the command, the commit
(of the code that trained), torch and the processor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pbbench.sweep.shipped import FOLDER
from pbbench.training.checkpoint import read_config


def ship(checkpoint: Path, commit: str, processor: str) -> Path:
    config = read_config(checkpoint)
    divider = config["experiment"]["model"]["patch_divider"]
    out = FOLDER / f"d{divider}"
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: x.to(torch.float16) for name, x in load_file(checkpoint / "ema.safetensors").items()}
    save_file(weights, out / "ema.safetensors")
    made = {
        "command": f"OMP_NUM_THREADS=1 pbbench train --preset {config['experiment']['name']} --divider {divider} --out DIR",
        "commit": commit,
        "torch": torch.__version__,
        "processor": processor,
    }
    digest = hashlib.sha256((out / "ema.safetensors").read_bytes()).hexdigest()
    config |= {"sha256": {"ema.safetensors": digest}, "made": made}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return out


if __name__ == "__main__":
    commit, *names = sys.argv[1:]
    for name in names:
        print(ship(Path(name), commit, "AMD EPYC (avx512_bf16), one thread"))
