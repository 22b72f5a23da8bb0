"""Checkpoints that a sweep loads instead of training: folders that are named, and the trained dividers that come with pbbench.

``sweep.checkpoints.4 = "shipped"`` stands for the one in ``pbbench/trained``, where what is asked for is what it was trained
as: the network, the objective, the data and the seed, and no setting of the preset's training is changed. Anything else is
trained.
"""

from __future__ import annotations

from pathlib import Path

from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.experiment.presets import load_experiment, read_json
from pbbench.experiment.sweep_settings import SHIPPED

FOLDER = Path(__file__).parents[1] / "trained"


def checkpoint_of(experiment: Experiment, divider: int, variant: str = "") -> Path | None:
    """The folder to load; None: the divider is to be trained. The experiment's own ``patch_divider`` does not matter."""
    given = None if variant else experiment.sweep.checkpoints.get(str(divider))
    if given is None:
        return None
    return Path(given) if given != SHIPPED else _shipped(experiment, divider)


def _shipped(experiment: Experiment, divider: int) -> Path | None:
    folder, sweep = FOLDER / f"d{divider}", experiment.sweep
    if sweep.seeds or sweep.equal != "images" or not (folder / "config.json").is_file():
        return None
    made = parse_experiment(read_json(folder / "config.json")["experiment"], str(folder))
    preset = load_experiment(preset="cpu")
    asked = (experiment.model.model_copy(update={"patch_divider": divider}), experiment.diffusion, experiment.seed)
    workers = {"num_workers": made.data.num_workers}  # how many decode changes no image
    same = asked == (made.model, made.diffusion, made.seed) and experiment.data.model_copy(update=workers) == made.data
    return folder if same and experiment.training == preset.training else None
