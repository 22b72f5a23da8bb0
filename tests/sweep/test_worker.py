"""What one cell's worker tells its parent: rows with energy or why not, timelines that agree with the rows, snapshots."""

from pathlib import Path
from typing import Any

import pytest

from pbbench.experiment.experiment import parse_experiment
from pbbench.memory.meters.phases import Reading
from pbbench.records.rows import CATEGORIES, Row
from pbbench.sweep.cell_rows import columns_of
from pbbench.sweep.grid import plan
from pbbench.sweep.worker import measure


def events_of(tmp_path: Path, device: str, **sweep: Any) -> list[dict[str, Any]]:
    values = {
        "name": "tiny",
        "device": device,
        "model": {"dim": 8, "dim_mults": [1, 2], "image_size": 16},
        "training": {"batch_size": 2},
        "sweep": {"dividers": [2], "patch_batch_sizes": ["index"], "measured_steps": 1, "quality": False, **sweep},
    }
    experiment = parse_experiment(values, "test")
    found: list[dict[str, Any]] = []
    cell = plan(experiment)[0]
    resolved = experiment.with_divider(cell.patch_divider)
    measure(resolved, cell, device, tmp_path, lambda event, **told: found.append({"event": event, **told}))
    assert not [told for told in found if told["event"] == "error"]
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return events_of(tmp_path_factory.mktemp("run"), "cpu", memory_snapshots=True)


def test_timelines_agree_with_the_rows(told: list[dict[str, Any]]) -> None:
    rows = {e["row"]["phase"]: e["row"] for e in told if e["event"] == "row" and e["row"].get("peak_live_bytes")}
    lines = {phase: data for e in told if e["event"] == "detail" for phase, data in e.get("timeline", {}).items()}
    assert set(lines) == {"sample_step", "train_step"}
    for phase, data in lines.items():
        assert data["peak_bytes"] == rows[phase]["peak_live_bytes"]
        at = data["index"].index(data["peak_index"])
        for name in CATEGORIES:
            values = data["live_bytes"].get(name, 0)
            assert (values if isinstance(values, int) else values[at]) == rows[phase][f"{name}_bytes"]
    assert {name for name, _ in lines["train_step"]["phases"]} >= {"forward", "backward"}


def test_a_step_without_an_energy_reading_says_why(told: list[dict[str, Any]]) -> None:
    for event in told:
        if event["event"] == "row" and event["row"]["phase"] != "load":
            row = Row.model_validate(event["row"])
            assert row.joules_per_image is None
            assert row.reasons["joules_per_image"]


def test_energy_is_shared_among_the_images() -> None:
    assert columns_of(Reading("step", energy_joules=30.0), images=12)["joules_per_image"] == 2.5
    unread = columns_of(Reading("step", reasons={"energy_joules": "no counter"}), images=12)
    assert unread["reasons"] == {"joules_per_image": "no counter"}
    assert "joules_per_image" not in columns_of(Reading("load", energy_joules=30.0)), "loading handles no images"


def test_snapshots_are_of_cuda_memory_and_elsewhere_that_is_said(told: list[dict[str, Any]]) -> None:
    assert [event["text"] for event in told if event["event"] == "note"] == [
        "sweep.memory_snapshots: torch's snapshots are of CUDA memory; none is written on this device"
    ]
    assert not any("snapshot" in event for event in told)


@pytest.mark.cuda
def test_real_cuda_snapshots_are_written_and_named(tmp_path: Path) -> None:
    named = {p: file for e in events_of(tmp_path, "cuda", memory_snapshots=True) for p, file in e.get("snapshot", {}).items()}
    assert set(named) == {"sample_step", "train_step"}
    assert all((tmp_path / file).stat().st_size > 0 for file in named.values())
