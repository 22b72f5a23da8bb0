"""Equal memory: what each divider trains with is found before anything runs, fits when it is measured, and trains the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pbbench.cli import app
from pbbench.cli.options import run_app
from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.experiment.presets import load_experiment
from pbbench.records import folder
from pbbench.records.cells import read_cells
from pbbench.report.tables.held_equal import held_equal
from pbbench.report.tables.tradeoff import tradeoff_table
from pbbench.sweep.grid import Cell, images_a_step, plan, resolve
from pbbench.sweep.planning import fit
from pbbench.sweep.planning.calibration import UNCALIBRATED
from pbbench.sweep.planning.fit import fit_to_memory
from pbbench.sweep.planning.forecast import forecast_step
from pbbench.sweep.planning.search import Search
from pbbench.training.setup import build_network
from pbbench.training.train import train

pytestmark = pytest.mark.usefixtures("kept_predictions")
KIB = 2**10
TINY = """
name = "tiny"
device = "cpu"
[model]
dim = 8
dim_mults = [1]
image_size = 16
resnet_block_groups = 2
[diffusion]
loss_type = "l2"
[training]
batch_size = 2
gradient_accumulation_steps = 2
num_steps = 2
ema_start_step = 1
sample_every = 0
[sampling]
sampler = "ddpm"
num_inference_steps = 1
[data]
num_images = 40
num_workers = 0
[quality]
num_images = 8
metrics = ["fid"]
reference_grid = false
[sweep]
dividers = [1, 2]
warmup_steps = 1
measured_steps = 1
equal = "memory"
equal_memory = "1500KiB"
"""
BUDGETS = (500, 1000, 1500, 2093, 3000, 7000, 16_000)


def tiny(**sections: Any) -> Experiment:
    values = tomllib.loads(TINY)
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse_experiment(values, "test")


@pytest.fixture(scope="module")
def seeking() -> Callable[[int, int], Search]:
    """(divider, KiB) → a search; those of one divider share their predictions."""
    made: dict[int, Search] = {}

    def at(divider: int, given: int) -> Search:
        search = made.setdefault(divider, Search(tiny().at(divider), "train_step", 0, UNCALIBRATED, live=True))
        search.limit = given * KIB
        return search

    return at


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ({"equal": "images"}, "equal_memory go together"),
        ({"equal_memory": None}, "equal_memory go together"),
        ({"equal_memory": "8XB"}, "sweep.equal_memory: '8XB' is not an amount of memory, such as 8GiB"),
        ({"equal_memory": "-8GiB"}, "sweep.equal_memory"),
        ({"equal_memory": ""}, "sweep.equal_memory"),
        ({"equal_memory": 0}, "sweep.equal_memory: 0 is not"),
        ({"equal_memory": 8.5}, "sweep.equal_memory: 8.5 is not"),
        ({"equal_memory": True}, "sweep.equal_memory: True is not"),
        ({"batch_sizes": [4]}, "give no batch_sizes"),
        ({"mixed_precisions": ["bf16"]}, "give no mixed_precisions"),
        ({"equal_seconds": 3}, "equal_seconds go together"),
        ({"checkpoints": {"1": "x"}}, "trained already"),
        ({"fitted": {"/1": {"batch_size": 1}}}, "sweep.fitted./1.gradient_accumulation_steps"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(sweep: dict[str, Any], told: str) -> None:
    values = tomllib.loads(TINY)["sweep"] | sweep
    with pytest.raises(InputError) as refused:
        tiny(sweep=values)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("given", "count"), [("8GiB", 8 * 2**30), (" 1.5 GB ", 1_500_000_000), ("4096", 4096), (4096, 4096)])
def test_memory_is_text_or_bytes(given: str | int, count: int) -> None:
    assert tiny(sweep={"equal_memory": given}).sweep.equal_memory == count


@pytest.mark.parametrize("divider", [1, 2])
def test_the_choice_is_the_quickest_of_all_that_fit(divider: int, seeking: Callable[[int, int], Search]) -> None:
    """Against every micro-batch and number of patches there is; more memory never makes it slower."""
    search = seeking(divider, 0)
    every = [
        search._fit(divider, batch, patches, "no", "none", 4 // batch)
        for batch in (1, 2, 4)
        for patches in (p for p in range(1, batch * divider**2 + 1) if batch * divider**2 % p == 0)
    ]
    costs = []
    for given in BUDGETS:
        found = seeking(divider, given).quickest_step(divider)
        assert found.batch_size * found.gradient_accumulation_steps == 4
        assert found.batch_size * divider**2 % found.patch_batch_size == 0
        fitting = [one for one in every if one.needed_bytes <= given * KIB]
        if not fitting:
            assert found.margin_bytes < 0
            assert found.needed_bytes == min(one.needed_bytes for one in every)
            continue
        assert found.needed_bytes == found.predicted_live_bytes <= given * KIB
        least = min(one.relative_cost for one in fitting)
        assert found.relative_cost == least
        assert found.batch_size == max(one.batch_size for one in fitting if one.relative_cost == least)
        costs.append(found.relative_cost)
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 1


@pytest.mark.parametrize(("divider", "batch", "patches", "micro"), [(1, 1, 1, 4), (1, 2, 1, 3), (2, 2, 3, 3), (4, 2, 16, 3)])
def test_micro_batches_that_repeat_others_can_be_skipped(divider: int, batch: int, patches: int, micro: int) -> None:
    experiment = tiny(training={"gradient_accumulation_steps": micro}, sweep={"equal": "images", "equal_memory": None})
    cell = Cell("cell", "measure", divider, patches, batch, "no")
    few, all_of_them = (forecast_step(experiment, cell, "train_step", every_chunk=every) for every in (False, True))
    assert few.live.peak_bytes == all_of_them.live.peak_bytes
    assert few.live.by_category == all_of_them.live.by_category
    assert few.steady.warm == all_of_them.steady.warm


def test_on_a_gpu_reserved_bytes_must_fit() -> None:
    experiment = tiny(sweep={"equal_memory": "6MiB", "dividers": [2]})
    (one,) = fit_to_memory(experiment, "cuda").sweep.fitted.values()
    cell = Cell("cell", "measure", 2, one.patch_batch_size, one.batch_size, "no")
    alone = tiny(
        training={"gradient_accumulation_steps": one.gradient_accumulation_steps},
        sweep={"equal": "images", "equal_memory": None},
    )
    assert one.predicted_bytes == forecast_step(alone, cell, "train_step").steady.warm.reserved_bytes <= 6 * 2**20


@pytest.fixture(scope="module")
def fitted() -> Experiment:
    variants = {"one batch": {"dividers": [2], "training": {"batch_size": 4, "gradient_accumulation_steps": 1}}}
    return fit_to_memory(tiny(sweep={"variants": variants}), "cpu")


def test_each_divider_is_measured_as_it_is_trained(fitted: Experiment) -> None:
    assert set(fitted.sweep.fitted) == {"/1", "/2", "one batch/2"}
    cells = plan(fitted)
    assert [(c.variant, c.patch_divider, c.kind) for c in cells] == [
        (variant, divider, kind) for kind in ("measure", "quality") for variant, divider in (("", 1), ("", 2), ("one batch", 2))
    ]
    for cell in cells:
        own, found = resolve(fitted, cell), fitted.sweep.fitted[f"{cell.variant}/{cell.patch_divider}"]
        assert (cell.batch_size, cell.patch_batch_size) == (found.batch_size, found.patch_batch_size)
        assert own.training.model_dump(include=set(found.training())) == found.training()
        assert images_a_step(own.training) == 4
        again = parse_experiment(own.model_dump(mode="json"), "a job")  # as a worker gets it
        assert resolve(again, cell) == own
    assert fitted.training == tiny().training  # what was asked for stays as it was


def test_what_was_found_survives_the_file_and_is_found_again(fitted: Experiment, tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text(fitted.to_toml())
    assert load_experiment(tmp_path / "experiment.toml") == fitted
    assert fit_to_memory(fitted, "cpu") == fitted  # what another run found is not believed, and comes out the same


def test_a_plan_without_what_fits_is_refused(fitted: Experiment) -> None:
    with pytest.raises(InputError, match=r'sweep\.fitted\."/1"'):
        plan(tiny())
    other = fitted.model_copy(update={"training": fitted.training.model_copy(update={"batch_size": 4})})
    with pytest.raises(InputError, match=r'sweep\.fitted\."/1"'):
        plan(other)


def test_mistakes_are_told_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "Search", None)
    fewer = {"fewer": {"training.batch_size": 3}}
    with pytest.raises(InputError, match=r'"fewer" would train on 12 images'):
        fit_to_memory(tiny(sweep={"variants": fewer}), "cpu")
    with pytest.raises(InputError, match="would fit"):
        fit_to_memory(tiny(sweep={"dividers": [1, 3]}), "cpu")


def test_what_was_found_trains_to_the_same_weights(tmp_path: Path) -> None:
    experiment = fit_to_memory(tiny(sweep={"dividers": [2], "equal_memory": "2093KiB"}), "cpu")
    chosen = experiment.at(2)
    own = tiny(sweep={"equal": "images", "equal_memory": None}).at(2)
    assert chosen.training.batch_size != own.training.batch_size
    fewer = own.model_copy(update={"training": own.training.model_copy(update={"gradient_accumulation_steps": 1})})
    weights = []
    for number, one in enumerate((own, chosen, fewer)):
        result = train(one, tmp_path / str(number))
        assert result.checkpoint is not None
        weights.append(_weights(load_file(result.checkpoint / "model.safetensors")))
    moved = (weights[0] - _weights(build_network(own).state_dict())).norm()
    assert (weights[1] - weights[0]).norm() < 1e-4 * moved
    assert (weights[2] - weights[0]).norm() > 1e-2 * moved  # what other optimizer batches come to


def _weights(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


def pbbench(*words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PBBENCH_INCEPTION_WEIGHTS": "", **environment}
    command = [sys.executable, "-m", "pbbench.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=given)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """A whole sweep, as a user runs it: its file, its folder, and how it ended."""
    home = tmp_path_factory.mktemp("equal")
    (home / "tiny.toml").write_text(TINY)
    done = pbbench("sweep", "--experiment", home / "tiny.toml", "--out", home / "out", TORCH_HOME=str(home / "none"))
    return home / "tiny.toml", home / "out", done


def test_what_was_chosen_fits_when_it_is_measured(run: tuple[Path, Path, Any]) -> None:
    _, out, done = run
    assert done.returncode == 1, done.stderr  # one divider does not fit
    found = load_experiment(out / "experiment.toml").sweep.fitted["/2"]
    cells = {cell.id: cell for cell in read_cells(out)}
    measured = cells[f"d2-p{found.patch_batch_size}-b{found.batch_size}-no"]
    (row,) = (row for row in measured.rows if (row.phase, row.temperature) == ("train_step", "warm"))
    assert row.peak_live_bytes == found.predicted_bytes <= 1500 * KIB
    assert (row.patch_batch_size, row.batch_size) == (found.patch_batch_size, found.batch_size)
    assert row.gradient_accumulation_steps == 4 // found.batch_size
    trained = cells["d2-quality"]
    assert (trained.status, trained.rows[0].images_seen) == ("ok", 8)
    assert trained.details["equal"] == "memory"


def test_what_does_not_fit_is_a_failure_that_was_not_run(run: tuple[Path, Path, Any]) -> None:
    _, out, _ = run
    least = load_experiment(out / "experiment.toml").sweep.fitted["/1"].predicted_bytes
    assert least > 1500 * KIB
    failed = [cell for cell in read_cells(out) if cell.axes["patch_divider"] == 1]
    assert {cell.kind for cell in failed} == {"measure", "quality"}
    for cell in failed:
        assert cell.status == cell.rows[0].status == "out_of_memory"
        assert len(cell.rows) == 1
        for told in (cell.error["message"], cell.rows[0].reasons["peak_live_bytes"]):
            assert "predicted, not run" in told
            assert f"{least:,} live bytes" in told
            assert f"{1500 * KIB:,}" in told
    assert not (out / "checkpoints" / "d1").exists()


def test_the_report_says_what_was_held_equal(run: tuple[Path, Path, Any]) -> None:
    _, out, done = run
    cells = read_cells(out)
    told = held_equal(cells)
    assert told is not None
    assert "the memory (1.5 MiB given to a training step; measured peaks 1.3 MiB) and" in told
    assert "the images (8 seen each, in the same optimizer batches); they took" in told
    assert "held equal between trainings: the memory" in " ".join(done.stdout.lower().split())
    sheet = tradeoff_table(cells)
    titles = [column.title for column in sheet.columns]
    found = load_experiment(out / "experiment.toml").sweep.fitted["/2"]
    assert sheet.columns[titles.index("batch × accum.")].cells[1] == f"{found.batch_size} × {4 // found.batch_size}"
    assert not [title for title in titles if "vs d=1" in title]


@pytest.mark.parametrize("flags", [True, False])
def test_resuming_searches_no_more(run: tuple[Path, Path, Any], flags: bool) -> None:
    file, out, _ = run
    (out / "cells" / "d1-quality.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*")}
    done = pbbench("sweep", "--resume", "--out", out, *(("--experiment", file) if flags else ()))
    assert done.returncode == 1, done.stderr
    assert "looking for" not in done.stderr
    assert (out / "cells" / "d1-quality.json").exists()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_resuming_with_other_memory_is_refused_by_what_was_changed(run: tuple[Path, Path, Any]) -> None:
    """Not by what follows from it."""
    _, out, _ = run
    before = load_experiment(out / "experiment.toml")
    other = before.sweep.model_copy(update={"equal_memory": 1600 * KIB, "fitted": {}})
    with pytest.raises(InputError, match=rf"other settings: sweep\.equal_memory: {1500 * KIB} → {1600 * KIB}$"):
        folder.check_settings(before.model_copy(update={"sweep": other}), out, resume=True)


def test_a_dry_run_and_a_prediction_say_what_would_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    assert run_app(app, ["sweep", "--experiment", str(tmp_path / "tiny.toml"), "--dry-run", "--memory-only"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "is given 1.5 MiB. d=1: nothing fits, at least 2.0 MiB are needed. d=2: batch" in told
    assert told.count("d1-p1-b1-no – – – – – –") == 1
    words = ["predict", "--experiment", str(tmp_path / "tiny.toml"), "--set", "device=auto", "sweep.equal_memory=6MiB"]
    assert run_app(app, [*words, "--dividers", "2"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "is given 6.0 MiB. d=2: batch" in told
    assert "unknown without a sweep on such a GPU" in told
