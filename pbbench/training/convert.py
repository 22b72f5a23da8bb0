"""A checkpoint of the reference code becomes one of ours: same weights, same averaged weights, same outputs."""

from __future__ import annotations

import json
from pathlib import Path

from pbbench.errors import InputError, one_line
from pbbench.experiment.experiment import Experiment
from pbbench.model.reference import load_reference, parse_reference_config, read_reference_checkpoint
from pbbench.training.checkpoint import write_checkpoint


def convert_reference(config_file: Path, checkpoint_file: Path, out: Path) -> Path:
    """Write ``out`` (empty or new) from the reference's JSON configuration and its model-last.pt. Returns ``out``.

    Raises InputError where a file is absent, foreign or does not fit the configuration; nothing is written then.
    """
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read the reference's configuration {config_file}: {one_line(error)}") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not an empty folder; choose another, nothing is written over")
    model_config, diffusion_config = parse_reference_config(config)
    state = read_reference_checkpoint(checkpoint_file)
    section = config["model"] if isinstance(config.get("model"), dict) else {}
    model, ema = load_reference(state["model"], section), load_reference(state["ema"], section)
    step = state["step"]
    trainer = config.get("trainer") if isinstance(config.get("trainer"), dict) else {}
    batch = trainer.get("train_batch_size")
    seen = step * batch if step is not None and isinstance(batch, int) else None
    experiment = Experiment(name="converted-reference", model=model_config, diffusion=diffusion_config)
    write_checkpoint(out, model=model, ema_model=ema, experiment=experiment, step=step or 0, images_seen=seen)
    return out
