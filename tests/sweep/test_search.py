"""What fits under a limit: the search itself, and its answers against predictions made one by one."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbbench.cli import app
from pbbench.cli.options import memory_size, run_app
from pbbench.errors import InputError
from pbbench.experiment.experiment import parse_experiment
from pbbench.sweep.grid import Cell
from pbbench.sweep.planning.calibration import UNCALIBRATED, Calibration
from pbbench.sweep.planning.forecast import forecast_step
from pbbench.sweep.planning.predictions import search
from pbbench.sweep.planning.search import Search, largest, relative_cost

MIB = 2**20
SMALL = {
    "model": {"dim": 16, "dim_mults": [1], "image_size": 32},
    "training": {"batch_size": 4},
    "sweep": {"dividers": [1, 2], "quality": False},
}


@given(
    fixed=st.integers(1, 10**4),
    each=st.integers(0, 10**3),
    unit=st.sampled_from([1, 512, 4096]),
    limit=st.integers(1, 10**6),
    most=st.sampled_from([1, 7, 65_536]),
)
def test_the_largest_that_fits_is_found_whatever_the_line(fixed: int, each: int, unit: int, limit: int, most: int) -> None:
    def bytes_of(n: int) -> int:
        assert 1 <= n <= most
        return -(-(fixed + each * n) // unit) * unit

    found = largest(bytes_of, limit, most)
    assert found == 0 or bytes_of(found) <= limit
    assert found == most or bytes_of(found + 1) > limit


def test_a_straight_line_takes_few_questions() -> None:
    asked = []

    def bytes_of(n: int) -> int:
        asked.append(n)
        return 500 + 7 * n

    assert largest(bytes_of, 100_000, 65_536) == (100_000 - 500) // 7
    assert len(asked) <= 6


@pytest.fixture(scope="module")
def seeking() -> Search:
    return Search(parse_experiment(SMALL, "test"), "train_step", 200 * MIB, UNCALIBRATED)


def reserved(divider: int, batch: int, patches: int, recompute: str = "none") -> int:
    """Predicted on its own, apart from the search."""
    values = SMALL | {"training": {"batch_size": 4, "recompute": recompute}}
    cell = Cell("cell", "measure", divider, patches, batch, "no")
    return forecast_step(parse_experiment(values, "test"), cell, "train_step").steady.warm.reserved_bytes


@pytest.mark.parametrize("divider", [1, 2])
def test_one_image_more_than_the_largest_batch_does_not_fit(seeking: Search, divider: int) -> None:
    found = seeking.largest_batch(divider)
    assert found is not None
    assert found.predicted_reserved_bytes == reserved(divider, found.batch_size, found.batch_size) <= 200 * MIB
    assert reserved(divider, found.batch_size + 1, found.batch_size + 1) > 200 * MIB
    assert found.margin_bytes == 200 * MIB - found.predicted_reserved_bytes


def test_the_fastest_setting_is_the_least_estimated_time_of_all_that_fit() -> None:
    """Against every combination there is."""
    limit, batch, divider = 30 * MIB, 8, 2
    seeking = Search(parse_experiment(SMALL, "test"), "train_step", limit, UNCALIBRATED)
    found = seeking.fastest(divider, batch, ["no"])
    every = [
        seeking._fit(divider, batch, patches, "no", recompute)  # type: ignore[arg-type]
        for patches in (1, 2, 4, 8, 16, 32)
        for recompute in ("none", "cheap", "full")
    ]
    fitting = [fit for fit in every if fit.margin_bytes >= 0]
    assert 0 < len(fitting) < len(every)
    assert found is not None
    assert found.relative_cost == min(fit.relative_cost for fit in fitting)
    assert seeking.fastest(divider, batch, ["no"]) == found


def test_known_terms_take_their_part_of_the_limit(seeking: Search) -> None:
    terms = Calibration(workspace_bytes=80 * MIB, context_bytes=4 * MIB, source="a run")
    beside = copy.copy(seeking)  # with the predictions that are there already
    beside.calibration = terms
    tighter = beside.largest_batch(2)
    free = seeking.largest_batch(2)
    assert tighter is not None
    assert free is not None
    assert tighter.batch_size < free.batch_size
    assert tighter.with_known_terms_bytes == tighter.predicted_reserved_bytes + 84 * MIB


def test_nothing_fits() -> None:
    found = search(parse_experiment(SMALL, "test"), 1 * MIB, "sample", (), UNCALIBRATED)
    assert [line["fastest"] for line in found["dividers"]] == [None, None]
    assert [line["largest_batch"] for line in found["dividers"]] == [None, None]
    assert found["fastest_divider"] is None


def test_the_estimate_of_time() -> None:
    """More passes, less precision and recomputation move it as they move a GPU's time."""

    def cost(passes: int = 1, flops: int = 10**13, precision: str = "no") -> float:
        return relative_cost(flops, passes, 1000, 5 * 10**8, precision, "train_step")

    assert cost(passes=16) > cost(passes=4) > cost()
    assert cost(precision="bf16") < cost() < cost(flops=13 * 10**12)


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 * 2**30), ("500 MB", 500 * 10**6), ("1.5gib", 3 * 2**29), ("4096", 4096), ("24gb", 24 * 10**9)],
)
def test_an_amount_of_memory(text: str, count: int) -> None:
    assert memory_size("--memory-limit", text) == count


@pytest.mark.parametrize("text", ["", "0", "-8GiB", "eight", "8 GiB free", "8XB", "nan", "0.0000001B"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(InputError, match="8GiB"):
        memory_size("--memory-limit", text)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "--preset", "cpu", "--dividers", "2", "--batch-size", "2", "--memory-limit", "64MiB"]
    words += ["--set", "model.dim_mults=[1]", "--step", "sample"]
    assert run_app(app, [*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_limit_bytes"] == 64 * MIB
    assert found["batch_size"] == 2
    (line,) = found["dividers"]
    assert line["patch_divider"] == 2
    assert line["fastest"]["margin_bytes"] >= 0
    assert run_app(app, words) == 0
    told = capsys.readouterr().out
    assert f"{line['largest_batch']['batch_size']:,}" in told


@pytest.mark.parametrize(
    "words",
    [
        ["--memory-limit", "much"],
        ["--memory-limit", "1GiB", "--step", "walk"],
        ["--memory-limit", "1GiB", "--precisions", "fp8"],
        ["--memory-limit", "1GiB", "--dividers", "5"],
        ["--calibration", "nowhere"],
    ],
)
def test_bad_input_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["predict", "--preset", "cpu", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
