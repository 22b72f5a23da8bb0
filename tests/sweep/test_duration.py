"""How long a sweep is said to take: against times measured on a GPU and on a CPU, and what it is made of."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from pbbench.cli import app
from pbbench.cli.options import run_app
from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.experiment.presets import load_experiment
from pbbench.records.cells import read_cells
from pbbench.sweep.grid import plan, quality_experiment, resolve
from pbbench.sweep.planning.duration import MACHINES, STARTING, Durations, clock
from pbbench.sweep.planning.search import one_pass, relative_cost

TINY = {"model": {"dim": 8, "dim_mults": [1], "image_size": 16, "resnet_block_groups": 2}, "sweep": {"dividers": [1, 2]}}


counts: dict[Any, tuple[int, int, int]] = {}


def counted(experiment: Experiment, step: str, d: int) -> tuple[int, int, int]:
    key = (experiment.name, step, d)
    if key not in counts:
        counts[key] = one_pass(experiment, step, d, "none")
    return counts[key]


def step_seconds(experiment: Experiment, step: str, d: int, batch: int, passes: int) -> float:
    flops, kernels, weights = counted(experiment, step, d)
    kind = "cpu" if experiment.device == "cpu" else "cuda"
    return relative_cost(flops * batch, passes, kernels, weights, "no", step, MACHINES[kind])


def test_times_measured_on_a_gpu_are_within_a_factor_of_two(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network as it was measured there, in aten's operators."""
    from contextlib import nullcontext

    monkeypatch.setattr("pbbench.sweep.planning.search.path_of", lambda _: nullcontext())
    paper = parse_experiment({"model": {"dim": 128, "dim_mults": [1, 2, 4, 8], "image_size": 128}}, "the test")
    rows = json.loads((shared / "data" / "h200" / "speed.json").read_text())["rows"]
    ours = [row for row in rows if row["who"] in ("all", "index") and row["d"] in (1, 4) and row["precision"] == "fp32"]
    assert len(ours) >= 6
    for row in ours:
        passes = row["d"] ** 2 if row["who"] == "index" else 1
        found = 1000 * step_seconds(paper, f"{row['step']}_step", row["d"], row["batch"], passes)
        assert 0.5 < found / row["ms"] < 2, (row, found)


def test_times_measured_on_a_cpu_are_within_a_factor_of_two() -> None:
    """A published run of one thread."""
    folder = Path(__file__).parents[2] / "results" / "cifar10"
    experiment = load_experiment(folder / "experiment.toml")
    ratios = []
    for cell in read_cells(folder):
        for row in cell.rows:
            if (
                cell.kind == "measure"
                and row.temperature == "warm"
                and row.phase in ("sample_step", "train_step")
                and not row.variant
            ):
                assert row.patch_divider is not None
                assert row.batch_size is not None
                assert row.patch_batch_size is not None
                assert row.seconds_per_step is not None
                passes = row.batch_size * row.patch_divider**2 // row.patch_batch_size
                found = step_seconds(experiment, row.phase, row.patch_divider, row.batch_size, passes)
                ratios.append(found / row.seconds_per_step)
    assert len(ratios) == 14
    assert 0.5 < statistics.median(ratios) < 2
    near = [ratio for ratio in ratios if 0.5 < ratio < 2]  # the machine was not quiet: the same work took up to 3 times as long
    assert len(near) >= 11, ratios


def test_a_sweeps_time_is_the_sum_of_its_cells() -> None:
    experiment = parse_experiment({**TINY, "training": {"num_steps": 100}}, "the test")
    cells, durations = plan(experiment), Durations(experiment)
    each = [durations.of(cell) for cell in cells]
    assert durations.in_all(cells) == pytest.approx(sum(each))
    assert all(seconds > STARTING["cuda"] for seconds in each)
    longer = Durations(parse_experiment({**TINY, "training": {"num_steps": 100_000}}, "the test"))
    assert longer.of(cells[-1]) > 10 * each[-1]
    given = {**TINY, "sweep": {"dividers": [1, 2], "equal": "seconds", "equal_seconds": 500}, "quality": {"num_images": 64}}
    timed = parse_experiment(given, "the test")
    assert 500 < Durations(timed).of(plan(timed)[-1]) < 700
    assert (clock(125), clock(3725)) == ("2:05", "1:02:05")


@pytest.mark.slow
def test_the_default_sweep_on_a_gpu_takes_a_quarter_of_an_hour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run_app(app, ["sweep", "--preset", "gpu", "--dividers", "1", "2", "4", "8", "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    minutes, seconds = told.split("About ")[1].split(" in all")[0].split(":")
    assert 5 < int(minutes) + int(seconds) / 60 < 15
    assert "another network: dim 16, 32×32 pixels (scenes-gpu)" in told


# Quality from another experiment


def test_quality_cells_are_of_the_preset_that_is_named() -> None:
    experiment = load_experiment(preset="gpu", overrides=[{"seed": 7}])
    measured, *_, trained = plan(experiment)
    assert resolve(experiment, measured).model.dim == 128
    own = resolve(experiment, trained)
    scenes = load_experiment(preset="scenes-gpu")
    assert (own.model, own.data, own.training, own.sampling, own.quality) == (
        scenes.model.model_copy(update={"patch_divider": 8}),
        scenes.data,
        scenes.training,
        scenes.sampling,
        scenes.quality,
    )
    assert (own.seed, own.name, trained.batch_size) == (7, "gpu", 128)
    assert resolve(own, trained) == own  # of one that is resolved it is the same
    assert quality_experiment(own) is own


def test_what_cannot_go_with_it_is_refused() -> None:
    with pytest.raises(InputError, match="quality_from 'nowhere' is not known"):
        plan(parse_experiment({**TINY, "sweep": {"quality_from": "nowhere"}}, "the test"))
    for more in (
        {"equal": "seconds", "equal_seconds": 5},
        {"checkpoints": {"1": "x"}},
        {"variants": {"a": {"model": {"dim": 16}}}},
    ):
        with pytest.raises(InputError, match="with quality_from"):
            parse_experiment({**TINY, "sweep": {"quality_from": "scenes-gpu", **more}}, "the test")
    with pytest.raises(InputError, match="divi"):  # the other experiment's image does not divide so far
        plan(
            parse_experiment(
                {"model": {"image_size": 128}, "sweep": {"dividers": [16], "quality_from": "scenes-gpu"}}, "the test"
            )
        )
