"""The memory table and its rule: sums, the reference as a bound, the published files in step with the code; speed."""

import csv
import json
import statistics
from pathlib import Path

import pytest

import data_loading
import gpu
import memory_rule
import memory_table
import meter_overhead
import processes
import rivals
import speed

PUBLISHED = Path(__file__).parents[2] / "results" / "memory"


def number(text: str):
    return int(text) if text.isdecimal() else text or None


def test_loading_is_measured_for_every_source_and_published_as_quicker(tmp_path, monkeypatch):
    monkeypatch.setattr(data_loading, "SECONDS", 0)
    data_loading.main(["--num-images", "8", "--out", str(tmp_path)])
    for folder in (tmp_path, PUBLISHED.parent / "data"):
        report = json.loads((folder / "loading.json").read_text(encoding="utf-8"))
        assert [row["source"] for row in report["rows"]] == list(data_loading.SOURCES)
        assert data_loading.markdown(report) == (folder / "loading.md").read_text(encoding="utf-8")
    assert all(min(row["ratio_of_each_round"]) > 10 for row in report["rows"])


@pytest.mark.slow
def test_one_and_two_processes_are_timed_on_the_same_work(tmp_path):
    processes.main(["--num-images", "9", "--rounds", "1", "--out", str(tmp_path)])
    for folder, num_images in ((tmp_path, 9), (PUBLISHED.parent / "processes", 128)):
        report = json.loads((folder / "processes.json").read_text(encoding="utf-8"))
        expected = [("sample", num_images), ("score", 16 * num_images)]
        assert [(row["work"], row["num_images"]) for row in report["rows"]] == expected
        for row in report["rows"]:
            one, two = (statistics.median(row["seconds"][count]) for count in "12")
            assert row["times_as_fast"] == pytest.approx(one / two)
        assert processes.markdown(report) == (folder / "processes.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def published() -> list[dict]:
    with (PUBLISHED / "memory.csv").open(encoding="utf-8") as file:
        return [{key: number(text) for key, text in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("key", [(128, 1, 1, "all"), (128, 32, 4, "index")])
def test_a_cell_of_the_table_is_what_the_code_gives_today(key, published):
    for row in memory_table.rows_of(key):
        assert sum(row[f"{part}_bytes"] for part in memory_table.PARTS) == row["peak_bytes"]
        same = [r for r in published if all(r[k] == row[k] for k in list(row)[:5])]
        assert [r["peak_bytes"] for r in same] == [pytest.approx(row["peak_bytes"], rel=0.01)], "run benchmarks/memory_table.py"


def test_every_cell_is_published_once_and_its_parts_sum_to_its_peak(published):
    keys = [tuple(r[k] for k in ("image_size", "batch_size", "patch_divider", "passes")) for r in published]
    assert sorted(keys) == sorted(memory_table.cells() * 2)
    for row in published:
        assert sum(row[f"{part}_bytes"] for part in memory_table.PARTS) == row["peak_bytes"]


def test_never_above_the_reference(published):
    compared = [r for r in published if r["reference_stacked_bytes"] is not None]
    assert len(compared) == 2 * 6 * (1 + 3 * 2)
    for row in compared:
        limit = row["reference_one_patch_bytes" if row["passes"] == "index" else "reference_stacked_bytes"]
        assert row["peak_bytes"] <= limit, row
        if row["step"] == "sample":
            theirs = limit - row["weights_bytes"] - row["inputs_bytes"]
            assert row["activations_bytes"] - row["inputs_bytes"] < 0.4 * theirs, row


def test_the_table_for_people_is_that_of_the_bytes(published):
    text = memory_table.markdown(published)
    assert text == (PUBLISHED / "memory.md").read_text(encoding="utf-8")
    for d in memory_table.DIVIDERS:
        assert text.count(f"| {d} | ") >= 2 * len(memory_table.SIZES) * len(memory_table.BATCHES)


def test_the_rule_follows_the_numbers():
    def row(peak: int, activations: int) -> dict:
        return {"step": "sample", "peak_bytes": peak, "activations_bytes": activations}

    def words(whole: int, divided: int, alone: int) -> str:
        found = {(128, 8, 1): row(whole, 0), (128, 8, 8): row(divided, 0), (128, 1, 1): row(alone, 0)}
        return memory_rule.verdict(found, 128, 8)

    assert words(100, 80, 90).startswith("neither helps")
    assert "so does a batch of 1" in words(100, 50, 52)
    assert "more than any smaller batch" in words(100, 50, 70)
    assert memory_rule.share(row(100, 25)) == 0.25


def test_the_search_for_the_largest_that_fits():
    def fits(choice: int) -> dict:
        return {"choice": choice, "peak_bytes": 10 * choice}

    for limit, expected in ((9, 1), (10, 1), (45, 4), (1000, 16)):
        assert rivals.largest(fits, (1, 2, 4, 8, 16), limit)["choice"] == expected


@pytest.mark.slow
def test_speed_rounds_and_their_ratios(tmp_path):
    words = ["--dim", "8", "--image-size", "16", "--batch-size", "1", "--dividers", "1", "2", "4", "--seconds", "0"]
    speed.main([*words, "--device", "cpu", "--out", str(tmp_path)])
    with (tmp_path / "speed.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {int(r["patch_divider"]) for r in rows} == {1, 2}  # 16² does not divide by 4 · 2³
    assert {(r["step"], r["passes"]) for r in rows if r["patch_divider"] == "2"} == {
        (step, passes) for step in ("sample", "train") for passes in ("all", "all, plain", "index")
    }
    for r in rows:
        assert int(r["rounds"]) == speed.FEWEST_ROUNDS
        if r["passes"] == "all" and r["recompute"] == "none":
            assert float(r["time_over_all_patches"]) == 1
        if r["passes"] == "all, plain":
            assert float(r["time_over_plain"]) == 1
    assert "| 16² | 1 | 2 | index (1) |" in (tmp_path / "speed.md").read_text(encoding="utf-8")


def test_overhead_of_every_meter_is_written(tmp_path):
    meter_overhead.main(["--seconds", "0", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))
    assert found["rounds"] == meter_overhead.FEWEST_ROUNDS
    median = found["median_seconds"]
    assert len(median) == 6
    assert median[meter_overhead.TRACED] > median[meter_overhead.ALONE]
    assert found["operators"] > 100
    text = (tmp_path / "overhead.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in median)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("divider", [1, 8])
def test_one_pass_on_a_gpu_launches_few_operators(divider, precision):
    """The limits of the design; bf16 launches hardly more than float32, and the path of a CPU more than twice as much."""
    assert gpu.counted("sample", divider, precision, "all", "cuda") <= 250
    assert gpu.counted("train", divider, precision, "all", "cuda") <= 700


def test_operators_of_many_passes_are_counted_from_three():
    few, every = (gpu.counted("sample", 2, "no", "index", "aten", every=every) for every in (False, True))
    assert few == every == 2597
    assert gpu.counted("sample", 1, "no", "all", "aten") == 720  # as the network was counted before there were fused operators


def test_without_a_gpu_only_operators_are_counted(capsys, monkeypatch, tmp_path):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--counts" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "WAYS", [(1, "all")])
    monkeypatch.setattr(gpu, "PRECISIONS", ("no",))
    assert gpu.main(["--counts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["path"]) for row in rows] == [
        ("sample", "aten"),
        ("sample", "cuda"),
        ("train", "aten"),
        ("train", "cuda"),
    ]
    assert set(rows[0]) == {"step", "divider", "precision", "passes", "path", "operators"}
    assert list(tmp_path.iterdir()) == []


def test_times_stand_beside_those_of_the_released_code():
    row = {"step": "train", "divider": 4, "batch": 8, "precision": "no", "passes": "index", "milliseconds": 132.08}
    sizes = {"least_milliseconds": 131.0, "allocated_bytes": 2**30, "reserved_bytes": 2**31}
    known, unknown = gpu.with_ratios([row, row | {"batch": 3}])
    assert known["of_released"] == pytest.approx(2.0)
    assert unknown["of_released"] is None
    counts = [{**{k: row[k] for k in ("step", "divider", "precision", "passes")}, "path": "cuda", "operators": 12633}]
    text = gpu.markdown({"gpu": "a card", "torch": "2.11", "rows": [known | sizes, unknown | sizes], "counts": counts})
    assert "| train | 4 | 8 | float32 | index | 132.1 (131.0) | 2.00 | 1,024 | 2,048 | 12,633 |" in text
    assert "| 3 | float32 | index | 132.1 (131.0) | – |" in text


def test_the_released_codes_times_are_the_shared_ones(shared):
    measured = json.loads((shared / "data" / "h200" / "speed.json").read_text())["rows"]
    theirs = {(r["step"], r["d"], r["batch"]): (r["ms"], r["peak_allocated"]) for r in measured if r["who"] == "reference"}
    ours = json.loads(gpu.RELEASED.read_text())["rows"]
    assert len(ours) == len(theirs)
    for row in ours:
        milliseconds, peak = theirs[row["step"], row["divider"], row["batch"]]
        assert row["milliseconds"] == pytest.approx(milliseconds, abs=0.01)
        assert row["allocated_bytes"] == peak
