"""The trained dividers that come with the package: whole, small, taken only where they are what is asked for, and in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pbbench.experiment.presets import load_experiment
from pbbench.model.diffusion import Diffusion
from pbbench.quality.fid import score
from pbbench.quality.scorecard import real_images
from pbbench.sweep.grid import plan, trainings
from pbbench.sweep.shipped import FOLDER, checkpoint_of
from pbbench.training.checkpoint import load_model, read_config
from pbbench.training.generate import generate

DIVIDERS = (1, 2, 4, 8)


def test_the_default_sweep_trains_nothing() -> None:
    experiment = load_experiment(preset="cpu")
    assert [checkpoint_of(experiment, d) for d in DIVIDERS] == [FOLDER / f"d{d}" for d in DIVIDERS]
    assert checkpoint_of(experiment, 4, variant="other") is None
    assert trainings(experiment, plan(experiment)) == []
    another_draw = load_experiment(preset="cpu", overrides=[{"sampling": {"seed": 5}, "sweep": {"dividers": [4]}}])
    assert trainings(another_draw, plan(another_draw)) == []


@pytest.mark.parametrize(
    "given",
    [
        {"model": {"dim": 24}},
        {"diffusion": {"prediction_type": "epsilon"}},
        {"data": {"num_images": 5000}},
        {"training": {"num_steps": 300}},
        {"seed": 1},
        {"sweep": {"seeds": [0, 1]}},
        {"sweep": {"equal": "seconds", "equal_seconds": 5}},
        {"sweep": {"checkpoints": {"4": "elsewhere"}}},
    ],
    ids=str,
)
def test_what_is_not_theirs_is_trained_or_loaded_as_said(given: dict[str, Any]) -> None:
    experiment = load_experiment(preset="cpu", overrides=[given])
    found = checkpoint_of(experiment, 4)
    assert str(found) == given.get("sweep", {}).get("checkpoints", {}).get("4", "None")


def test_they_are_whole_small_and_equally_trained() -> None:
    for d in DIVIDERS:
        model, experiment = load_model(FOLDER / f"d{d}")  # compares the checksum
        assert model.config.patch_divider == d
        config = read_config(FOLDER / f"d{d}")
        assert config["images_seen"] == 304_000
        assert experiment.training == load_experiment(preset="scenes").training
        assert f"--preset scenes --divider {d}" in config["made"]["command"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) < 6e6


@pytest.mark.slow
def test_few_samples_are_in_the_order_of_the_dividers() -> None:
    experiment = load_experiment(preset="cpu", overrides=[{"sampling": {"num_inference_steps": 8, "seed": 3}}])
    reference = real_images(experiment).reference.subset(0, 512)
    distances = []
    for d in (1, 4, 8):
        model, _ = load_model(FOLDER / f"d{d}")
        samples = generate(model, Diffusion(experiment.diffusion), experiment.sampling, 64, torch.device("cpu"))
        found = score(samples, reference, metrics=["fid"], extractor="random")
        distances.append(found["random_features_frechet_distance"])
    assert distances == sorted(distances)
