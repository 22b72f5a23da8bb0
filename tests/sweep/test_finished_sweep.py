"""One whole sweep, as a user runs it: what it leaves in cells, rows, reasons and samples, and what may be done with it then."""

import json
import os
import shutil

import numpy as np
import pytest
from command_line import pbbench, tiny
from PIL import Image

from pbbench.cli import app
from pbbench.cli.options import run_app
from pbbench.data.synthetic import scenes
from pbbench.experiment.presets import load_experiment
from pbbench.records.cells import read_cells
from pbbench.records.rows import CATEGORIES
from pbbench.sweep.grid import plan

pytestmark = pytest.mark.slow  # the sweep; each test is quick


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of as many images as the experiment takes, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("photographs")
    for index, pixels in enumerate(scenes(1, range(60), (16, 16))):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    return folder


@pytest.fixture(scope="module")
def words(tiny_file, photographs):
    return ("sweep", "--experiment", tiny_file, "--set", f"data.source={photographs}")


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """A whole sweep, as a user runs it."""
    out = tmp_path_factory.mktemp("run") / "out"
    environment = {**os.environ, "TORCH_HOME": str(out.parent / "no-weights-here"), "PBBENCH_INCEPTION_WEIGHTS": ""}
    done = pbbench(*words, "--dividers", "1", "2", "--out", out, env=environment)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_sweep_leaves_results_for_every_divider_and_a_report(finished, photographs):
    out, done = finished
    cells = read_cells(out)
    assert {cell.id: cell.status for cell in cells} == {cell.id: "ok" for cell in plan(tiny())}
    for name in ("experiment.toml", "environment.json", "results.csv", "results.json", "report.md", "report.html", "table.tex"):
        assert (out / name).stat().st_size > 0
    assert load_experiment(out / "experiment.toml") == tiny(data={"source": str(photographs)})
    assert "1" in done.stdout
    assert "report" in done.stderr
    assert done.stderr.count("100% those of step 1") == 1  # two trainings whose averages keep their start, one line


def test_unreadable_images_are_named_and_counted(finished):
    out, done = finished
    assert "broken.jpg" in done.stderr
    assert "1 skipped" in (out / "report.md").read_text()


def test_the_parts_of_every_peak_sum_to_it(finished):
    rows = [row for cell in read_cells(finished[0]) for row in cell.rows if row.peak_live_bytes is not None]
    assert {row.phase for row in rows} == {"sample_step", "train_step", "forward", "backward", "optimizer"}
    for row in rows:
        assert sum(getattr(row, f"{name}_bytes") for name in CATEGORIES) == row.peak_live_bytes
        assert row.optimizer_bytes == 0 if row.phase == "sample_step" else row.optimizer_bytes >= 2 * row.parameter_bytes


def test_one_patch_index_at_a_time_holds_less_than_all_patches(finished):
    activations = {
        row.patch_batch_size: row.activation_bytes
        for cell in read_cells(finished[0])
        for row in cell.rows
        if row.patch_divider == 2 and row.phase == "sample_step" and row.temperature == "warm"
    }
    assert activations[2] < 0.5 * activations[8]


def test_offline_the_stand_in_has_its_own_name_and_fid_is_null_with_the_reason(finished):
    row = next(row for cell in read_cells(finished[0]) for row in cell.rows if row.phase == "quality")
    assert row.frechet_inception_distance is None
    assert "Inception weights" in row.reasons["frechet_inception_distance"]
    assert row.random_features_frechet_distance > 0
    assert row.random_features_patch_frechet_distance > 0
    assert row.patch_frechet_inception_distance is None
    assert (row.num_images, row.images_seen, row.sampler, row.num_inference_steps) == (16, 8, "ddpm", 2)
    assert row.seam_score is None
    assert row.held_out_loss > 0


def test_the_scored_samples_are_kept_where_that_is_asked_for(finished):
    """Scoring itself takes them from memory: without ``quality.save_samples`` only the grid is written."""
    out, _ = finished
    cell = next(cell for cell in read_cells(out) if cell.kind == "quality")
    files = sorted((out / "samples" / cell.id).iterdir())
    assert [file.name for file in files] == [f"{index:06}.png" for index in range(16)]
    grid, first = (np.asarray(Image.open(path)) for path in (out / cell.details["grid"], files[0]))
    assert any((grid[y : y + 16, x : x + 16] == first).all() for y in range(6) for x in range(6))


def test_what_is_unknown_on_a_cpu_is_null_with_a_reason(finished):
    for cell in read_cells(finished[0]):
        for row in cell.rows:
            if row.phase in ("sample_step", "train_step"):
                assert row.peak_allocated_bytes is None
                assert "CUDA" in row.reasons["peak_allocated_bytes"]
                assert row.peak_rss_bytes > 0


def test_resuming_a_finished_sweep_runs_nothing(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    done = pbbench("sweep", "--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "is not empty"),
        (("--resume", "--set", "training.num_steps=5"), "training.num_steps: 4 → 5"),
    ],
)
def test_a_finished_folder_is_not_written_over(finished, words, more, told):
    done = pbbench(*words, "--out", finished[0], *more)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_environment_is_refused_unless_asked(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    monkeypatch.setattr("pbbench.report.write_report", lambda out: None)  # drawn again elsewhere
    environment = json.loads((out / "environment.json").read_text())
    (out / "environment.json").write_text(json.dumps({**environment, "torch": "1.0"}))
    assert run_app(app, ["sweep", "--resume", "--out", str(out)]) == 2
    assert "torch: 1.0 →" in capsys.readouterr().err
    assert run_app(app, ["sweep", "--resume", "--out", str(out), "--any-environment"]) == 0
    assert json.loads((out / "environment.json").read_text())["continued_in"][0]["torch"] != "1.0"
