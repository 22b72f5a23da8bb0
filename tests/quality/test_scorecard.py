"""The scorecard: real images chosen apart from the reference, the floor beside a distance, seams at every divider's lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.model.diffusion import Diffusion
from pbbench.model.unet import PatchUNet
from pbbench.quality.scorecard import Scorecard, real_images, scorecard


def experiment(num_images: int = 40, held_out: int = 50, of: int = 600, reference: int = 200, d: int = 2) -> Experiment:
    return parse_experiment(
        {
            "model": {"dim": 8, "dim_mults": [1], "image_size": 16, "resnet_block_groups": 2, "patch_divider": d},
            "data": {"num_images": of, "num_held_out": held_out},
            "quality": {"num_images": num_images, "num_reference_images": reference, "metrics": ["fid", "prc"]},
        },
        "the test",
    )


def carded(settings: Experiment, samples: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Scorecard:
    monkeypatch.setenv("TORCH_HOME", str(cache / "no-weights-here"))
    model, diffusion = PatchUNet(settings.model), Diffusion(settings.diffusion)
    device = torch.device("cpu")
    real = real_images(settings)
    return scorecard(samples, real, model, diffusion, settings, dividers=(1, 2, 4), cache=cache, device=device)


@pytest.mark.parametrize(("held_out", "of", "first"), [(50, 600, "held out"), (10, 600, 200), (10, 230, None)])
def test_the_floor_is_of_real_images_outside_the_reference(held_out: int, of: int, first: Any) -> None:
    real = real_images(experiment(held_out=held_out, of=of))
    if first is None:
        assert real.floor is None
        return
    assert real.floor is not None
    assert len(real.floor) == 40
    expected = real.held_out if first == "held out" else real.training.subset(first, first + 40)
    assert torch.equal(real.floor[0], expected[0])
    among = {image.numpy().tobytes() for image in real.reference.batch(range(200))}
    assert not among & {image.numpy().tobytes() for image in real.floor.batch(range(40))}


def test_real_samples_lie_at_the_floor_and_blurred_ones_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = experiment()
    real = real_images(settings)
    fresh = list(real.training.batch(range(300, 340)))
    at_floor = carded(settings, fresh, tmp_path, monkeypatch)
    grey = [image.float().mean((1, 2), keepdim=True).expand_as(image).round().to(torch.uint8) for image in fresh]
    grey = [(image + 8 * torch.rand(image.shape)).to(torch.uint8) for image in grey]
    above = carded(settings, grey, tmp_path, monkeypatch)
    floor = at_floor.columns["distance_floor"]
    assert floor == above.columns["distance_floor"] == at_floor.details["metrics"]["floor"]["random_features_frechet_distance"]
    assert at_floor.columns["random_features_frechet_distance"] == pytest.approx(floor, rel=0.3)
    assert above.columns["random_features_frechet_distance"] > 3 * floor
    assert len(list(tmp_path.glob("features-*"))) == 2  # the reference's and the floor's, read once


def test_seams_are_said_at_the_lines_of_every_divider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = experiment(d=1)
    samples = list(real_images(settings).training.batch(range(300, 340)))
    card = carded(settings, samples, tmp_path, monkeypatch)
    assert set(card.details["seams"]) == {"2", "4"}
    assert all(0.5 < found["seam_score"] < 1.6 for found in card.details["seams"].values())
    assert card.columns.get("seam_score") is None
    assert "d = 1" in card.reasons["seam_score"]
    of_patches = carded(experiment(d=2), samples, tmp_path, monkeypatch)
    assert of_patches.columns["seam_score"] == card.details["seams"]["2"]["seam_score"]
    assert set(of_patches.details["metrics"]["left_out"]) == {
        "random_features_frechet_distance",
        "seam_score",
        "seam_excess_square",
        "held_out_loss",
    }


def test_what_there_is_too_little_of_is_null_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = experiment(held_out=0, of=220)
    flat = [torch.full((3, 16, 16), 7, dtype=torch.uint8)] * 40
    card = carded(settings, flat, tmp_path, monkeypatch)
    assert card.columns["distance_floor"] is None
    assert "not among the reference" in card.reasons["distance_floor"]
    assert "flat" in card.reasons["seam_score"]
    assert "held out" in card.reasons["held_out_loss"]
