"""Predicted peaks: the same steps on fake tensors, equal to the byte to the steps run for real."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pbbench.cli import app
from pbbench.cli.options import run_app
from pbbench.experiment.experiment import parse_experiment
from pbbench.experiment.presets import load_experiment
from pbbench.model import unet
from pbbench.records.rows import CATEGORIES
from pbbench.sweep.grid import plan
from pbbench.sweep.planning.forecast import forecast, repeated_chunks_skipped
from pbbench.sweep.workload import sampling_workload, training_workload
from pbbench.training import train

SMALL = {
    "model": {"dim": 16, "dim_mults": [1, 2], "image_size": 16},
    "training": {"batch_size": 3},
    "sweep": {"dividers": [1, 2, 4], "patch_batch_sizes": ["index", "all", 5], "quality": False},
}


@pytest.mark.parametrize("cell", plan(parse_experiment(SMALL, "test")), ids=lambda cell: cell.id)
def test_the_forecast_equals_the_step_run_for_real_to_the_byte(cell):
    experiment = parse_experiment({"device": "cpu", **SMALL}, "test").with_divider(cell.patch_divider)
    predicted = forecast(experiment, cell)
    sampling = sampling_workload(experiment, cell, torch.device("cpu"))
    assert sampling.trace().by_category == predicted.sample_step.live.by_category
    training = training_workload(experiment, cell, torch.device("cpu"))
    training.run()
    assert training.trace().by_category == predicted.train_step.live.by_category


def test_a_prediction_for_a_gpu_is_of_the_path_that_a_gpu_takes():
    """Fused operators; to sample in 16 bits weights of 16 bits."""
    for device, fused in (("cpu", False), ("auto", True), ("cuda", True)):
        experiment = parse_experiment({"device": device, **SMALL, "sampling": {"mixed_precision": "bf16"}}, "test")
        cell = replace(plan(experiment)[0], mixed_precision="bf16")
        found = forecast(experiment, cell)
        assert ("native_group_norm" in found.train_step.operators) is not fused
        weights = found.train_step.live.by_category["parameter"]
        assert (found.sample_step.live.by_category["parameter"] < 0.6 * weights) is fused


@pytest.mark.parametrize(("d", "chunk", "batch"), [(1, 2, 5), (2, 3, 2), (2, 2, 5), (4, 3, 1), (4, 7, 3)])
def test_chunks_that_repeat_others_can_be_skipped(d, chunk, batch):
    """Chunks of one index, chunks that straddle two or more, and a last one that is smaller: the same peaks and split."""
    sweep = {"dividers": [d], "patch_batch_sizes": [chunk], "batch_sizes": [batch], "quality": False}
    experiment = parse_experiment({"model": {"dim": 16, "dim_mults": [1], "image_size": 16}, "sweep": sweep}, "test")
    (cell,) = plan(experiment)
    quick, whole = forecast(experiment, cell), forecast(experiment, cell, every_chunk=True)
    for name in ("sample_step", "train_step"):
        few, all_of_them = getattr(quick, name).live, getattr(whole, name).live
        assert few.peak_bytes == all_of_them.peak_bytes
        assert few.by_category == all_of_them.by_category
        assert {phase: peak.peak_bytes for phase, peak in few.phases.items()} == {
            phase: peak.peak_bytes for phase, peak in all_of_them.phases.items()
        }


def test_the_chunk_loop_is_put_back():
    with repeated_chunks_skipped(1):
        assert (len(unet.row_chunks(64, 1)), len(train.row_chunks(64, 1))) == (1, 2)
    assert len(unet.row_chunks(64, 1)) == len(train.row_chunks(64, 1)) == 64


def test_the_papers_network_at_batch_1():
    """Against the released code's figures for the same shapes (dim 128, 128 × 128, d = 4; live tensor bytes, sampling without
    the sampler's own step; training without an average of the weights): never above them."""
    experiment = load_experiment(
        preset="memory-grid", overrides=[{"sweep": {"dividers": [4], "batch_sizes": [1], "patch_batch_sizes": ["index"]}}]
    )
    (cell,) = plan(experiment)
    found = forecast(experiment, cell)
    assert found.sample_step.live.by_category["parameter"] == pytest.approx(126_850_000 * 4, rel=1e-3)
    assert found.sample_step.live.peak_bytes < 514_031_104
    assert found.train_step.live.peak_bytes - found.train_step.live.by_category["ema"] < 2_106_436_096


def test_predict_prints_json_and_nothing_else():
    words = ["predict", "--dividers", "2", "--patch-batch-size", "index", "--batch-size", "2", "--preset", "cpu", "--json"]
    done = subprocess.run([sys.executable, "-m", "pbbench.cli", *words], capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)
    assert row["patch_divider"] == 2
    assert "live" in row["meter"]
    for step in ("sample_step", "train_step"):
        assert sum(row[step][f"{name}_bytes"] for name in CATEGORIES) == row[step]["peak_live_bytes"]


def test_a_dry_run_lists_the_cells_and_writes_nothing(tiny_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "--experiment", str(tiny_file), "--device", "cpu", "--dividers", "1", "2", "--dry-run"]
    assert run_app(app, words) == 0
    told = capsys.readouterr().out
    assert "d2-quality" in told
    assert "MiB" in told
    assert list(tmp_path.iterdir()) == []
