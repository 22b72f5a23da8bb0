"""Several cells at once, and several sweeps in one folder: nothing lost, nothing torn, each cell once, no GPU shared."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_sweeps import ENVIRONMENT, Ears, command, experiment, held_elsewhere, other_process, read_diary, sweep

from pbbench.errors import InputError
from pbbench.records import folder
from pbbench.records.cells import read_cells
from pbbench.sweep import local, process, run
from pbbench.sweep.grid import plan
from pbbench.sweep.live import LiveView
from pbbench.sweep.local import Place, places, run_cells
from pbbench.sweep.run import Shard


def at_once(lines: list[dict[str, Any]], key: str | None = None) -> int:
    """The most cells that ran at the same moment, in all or (``key``) on any one GPU."""
    running: Counter[Any] = Counter()
    most = 0
    for line in sorted(lines, key=lambda line: line["time"]):
        running[line[key] if key else None] += 1 if line["what"] == "began" else -1
        most = max(most, *running.values())
    return most


def gpus(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "uuid": f"test-{os.getpid()}-{number}"} for number, name in enumerate(names)]


def test_on_a_cpu_cells_run_one_after_the_other(tmp_path: Path, diary: Path) -> None:
    assert sweep(tmp_path / "out") == (True, True)
    assert at_once(read_diary(diary)) == 1
    assert [line["cell"] for line in read_diary(diary)[::2]] == [cell.id for cell in plan(experiment(repeats=4))]


def test_one_cell_on_each_gpu_and_never_two(
    tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    monkeypatch.setattr(run.environments, "probe", lambda device: {**ENVIRONMENT, "gpus": gpus("H200", "H200")})
    ears = Ears()
    assert sweep(tmp_path / "out", ears).fine
    lines = read_diary(diary)
    assert {line["gpu"] for line in lines} == {"3", "GPU-abc"}
    assert at_once(lines) == 2
    assert at_once(lines, "gpu") == 1
    assert len([what for what, _ in ears.heard if what == "ok"]) == 12


def test_gpus_of_another_kind_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = places({"gpus": [{"name": "A", "uuid": "1"}, {"name": "B", "uuid": "2"}, {"name": "A", "uuid": "3"}]})
    assert found == [Place("0", "1"), Place("2", "3")]
    assert places({"gpus": []}) == places({}) == [Place(None, None)]


def test_a_gpu_that_another_sweep_measures_on_is_waited_for(
    tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GPU_POLL_SECONDS", 0.05)
    settings, ears = experiment(), Ears()
    place = Place("0", gpus("H200")[0]["uuid"])
    with local._GpuLock(place.uuid) as held:
        assert held.take()
        ended = run_cells(settings, plan(settings), "cpu", tmp_path, ears, [place])

        def free(cell: Any, event: dict[str, Any]) -> None:
            if "measuring for another sweep" in event.get("text", ""):
                assert not read_diary(diary)
                ears.heard.append(("waited", cell.id))
                held.give_back()

        monkeypatch.setattr(ears, "cell_event", free)
        assert len(list(ended)) == 3
        assert [what for what, _ in ears.heard].count("waited") == 1
        with local._GpuLock(place.uuid) as again:
            assert again.take()  # given back after the last cell


def test_stopping_leaves_no_process_and_lets_a_training_save(
    tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "COMMAND", command(diary, "saves"))
    trains = 0

    def interrupt(cell: Any, event: dict[str, Any]) -> None:
        nonlocal trains
        trains += event.get("phase") == "train"
        if trains == 2:
            raise KeyboardInterrupt

    ears = Ears()
    monkeypatch.setattr(ears, "cell_event", interrupt)
    settings = experiment()
    with pytest.raises(KeyboardInterrupt):
        list(run_cells(settings, plan(settings), "cpu", tmp_path, ears, [Place("0"), Place("1")]))
    lines = read_diary(diary)
    assert sorted(line["what"] for line in lines) == ["began", "began", "saved", "saved"]
    for line in lines:
        with pytest.raises(ProcessLookupError):
            os.kill(line["pid"], 0)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_shards_that_are_no_parts(text: str) -> None:
    with pytest.raises(InputError, match="for example --shard 1/4"):
        Shard.parse(text)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_shards_share_out_every_cell_once(count: int) -> None:
    parts = [Shard(number, count).of(list(range(7))) for number in range(1, count + 1)]
    assert sorted(cell for part in parts for cell in part) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_last_shard_writes_the_report(tmp_path: Path, diary: Path) -> None:
    out = tmp_path / "out"
    assert sweep(out, shard=Shard(2, 3)) == (True, False)
    assert sweep(out, shard=Shard(1, 3)) == (True, False)
    assert not (out / "report.html").exists()
    assert len(read_cells(out)) == 8
    assert sweep(out, shard=Shard(3, 3)) == (True, True)
    assert (out / "report.html").exists()
    assert sweep(out, shard=Shard(3, 3)) == (True, True)  # run again: nothing is done twice
    assert len(read_diary(diary)) == 2 * 12


def test_shards_at_once_in_one_folder_lose_and_tear_nothing(tmp_path: Path) -> None:
    out, diary = tmp_path / "out", tmp_path / "diary.jsonl"
    shards = [other_process(out, f"{number}/3", diary, "meets") for number in (1, 2, 3)]
    told = [shard.communicate(timeout=60) for shard in shards]
    assert all(stdout.startswith("fine True") for stdout, _ in told), told
    assert "complete True" in "".join(stdout for stdout, _ in told)
    assert {cell.id: cell.status for cell in read_cells(out)} == {cell.id: "ok" for cell in plan(experiment(repeats=4))}
    lines = read_diary(diary)
    assert Counter(line["cell"] for line in lines if line["what"] == "began") == Counter(
        {cell.id: 1 for cell in read_cells(out)}
    )
    assert at_once(lines) > 1  # they did run side by side
    assert json.loads((out / "environment.json").read_text()) == ENVIRONMENT
    assert (out / "report.html").is_file()
    assert not list(out.rglob(".*.json.*"))


@pytest.mark.parametrize("part", [None, Shard(1, 2), Shard(1, 4)])
def test_whoever_would_do_a_cell_that_is_being_done_is_refused(tmp_path: Path, diary: Path, part: Shard | None) -> None:
    """The whole sweep a second time, the same shard twice, or a shard of another division that shares a cell."""
    with held_elsewhere(tmp_path / "out", folder.CELLS), pytest.raises(InputError, match="another sweep"):
        sweep(tmp_path / "out", shard=part)
    assert not read_diary(diary)


def test_another_shard_is_no_obstacle(tmp_path: Path, diary: Path) -> None:
    with held_elsewhere(tmp_path / "out", folder.CELLS):
        assert sweep(tmp_path / "out", shard=Shard(2, 2)) == (True, False)


def test_shards_of_different_settings_or_machines_are_refused(
    tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(tmp_path / "out", shard=Shard(1, 2))
    with pytest.raises(InputError, match=r"sweep.repeats: 4 → 2"):
        sweep(tmp_path / "out", shard=Shard(2, 2), settings=experiment(repeats=2))
    monkeypatch.setattr(run.environments, "probe", lambda device: {**ENVIRONMENT, "torch": "9.9"})
    with pytest.raises(InputError, match=r"torch: none → 9\.9"):
        sweep(tmp_path / "out", shard=Shard(2, 2))
    for _ in range(2):
        assert sweep(tmp_path / "out", shard=Shard(2, 2), any_environment=True) == (True, True)
    described = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert [one["torch"] for one in described["continued_in"]] == ["9.9"]  # told once, however often it is continued


def test_a_sweep_under_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every process of it would want to do every cell."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        sweep(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_view_shows_every_running_cell() -> None:
    from io import StringIO

    from rich.console import Console

    first, second, _ = cells = plan(experiment())
    console = Console(file=StringIO(), width=100)
    view = LiveView(console)
    view.started(cells, {})
    for cell in (first, second):
        view.cell_started(cell)
    view.cell_event(first, {"event": "phase", "phase": "train_step"})
    view.cell_event(second, {"event": "progress", "doing": "train", "step": 3, "num_steps": 10, "loss": 0.5})
    console.print(view)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert first.describe() in shown
    assert "measuring a training step" in shown
    assert second.describe() in shown
    assert "3 of 10 steps" in shown
