"""``pbbench score``: every kept checkpoint with what it saw, averaged and raw weights told apart, and bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import tiny

from pbbench.cli import app
from pbbench.cli.options import run_app
from pbbench.training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "d2"
    training = {
        "num_steps": 4,
        "save_every": 2,
        "keep_every": 2,
        "learning_rate": 0.05,
        "ema_decay": 0.5,
        "ema_update_every": 1,
    }
    experiment = tiny(training=training, data={"num_images": 300, "num_held_out": 30}, model={"patch_divider": 2})
    train(experiment, out)
    return out


def scored(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> list[dict]:
    monkeypatch.setenv("PBBENCH_INCEPTION_WEIGHTS", "")
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    settings = ["--set", 'quality.metrics=["fid"]', "--set", "quality.num_reference_images=100", "--json"]
    assert run_app(app, ["score", *map(str, words), *settings]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_kept_checkpoint_is_scored_with_what_it_saw(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scored(capsys, monkeypatch, run, "--every")
    assert [(one["step"], one["images_seen"], one["patch_divider"]) for one in found] == [(2, 4, 2), (4, 8, 2)]
    assert found[0]["distance_floor"] == found[1]["distance_floor"] > 0
    assert all(one["random_features_frechet_distance"] > one["distance_floor"] for one in found)
    assert found[0]["held_out_loss"] != found[1]["held_out_loss"]
    assert all(one["held_out_standard_error"] > 0 for one in found)
    (latest,) = scored(capsys, monkeypatch, run)
    assert latest == found[-1]
    (raw,) = scored(capsys, monkeypatch, run, "--raw")
    assert (raw["weights"], latest["weights"]) == ("model", "ema")
    assert raw["held_out_loss"] != latest["held_out_loss"]


def test_a_table_for_people(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    assert run_app(app, ["score", str(run), "--set", 'quality.metrics=["fid"]']) == 0
    head, line, told = capsys.readouterr().out.splitlines()
    assert head.split() == ["d", "step", "images", "distance", "floor", "seams", "excess", "loss"]
    assert line.split()[:3] == ["2", "4", "8"]
    assert "random features (not FID); averaged weights" in told


def test_what_is_no_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["score", str(tmp_path / "nothing")]) == 2
    assert "there is no checkpoint folder" in capsys.readouterr().err
