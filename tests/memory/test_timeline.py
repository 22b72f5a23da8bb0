"""Live bytes over a step: the data hold the true peak however few places they keep, and the figure shows them."""

import inspect
import io
import json
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from make_run import MIB, measure_cell
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from pbbench.memory.tracer.live import LiveTrace, trace
from pbbench.memory.tracer.storages import CATEGORIES
from pbbench.memory.tracer.timeline import timeline
from pbbench.memory.tracer.viewer import MAX_ENTRIES, memory_snapshot
from pbbench.report.figures import gallery, style
from pbbench.report.figures.timelines import _shortened, live_bytes_over_a_step, representative

BLOCK = 512


def training() -> LiveTrace:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(32, 64)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    step()
    return trace(step, modules=model, optimizer=optimizer, inputs=x, record_events=True)


@pytest.fixture(scope="module")
def live() -> LiveTrace:
    return training()


def curve(data: dict, name: str) -> list[int]:
    values = data["live_bytes"].get(name, 0)
    return values if isinstance(values, list) else [values] * len(data["index"])


def totals(data: dict) -> list[int]:
    return [sum(level) for level in zip(*(curve(data, name) for name in CATEGORIES), strict=True)]


def test_a_step_by_hand() -> None:
    """One block of input; two made, one of them freed at once."""
    x = torch.ones(128)

    def step() -> None:
        y = x + 1
        y = y + 1
        del y

    data = timeline(trace(step, inputs=x, record_events=True))
    assert data["num_events"] == 4
    assert data["index"] == [0, 1, 2, 3, 4]
    assert data["live_bytes"] == {"input": BLOCK, "activation": [0, BLOCK, 2 * BLOCK, BLOCK, 0]}
    assert (data["peak_index"], data["peak_bytes"], data["phases"]) == (2, 3 * BLOCK, [])


def test_every_place_is_the_running_sum_of_the_events(live: LiveTrace) -> None:
    data = timeline(live, points=100_000)
    during = [event for event in live.events if event.allocation.born or event.delta < 0]
    assert data["index"] == list(range(len(during) + 1))
    assert totals(data) == list(accumulate((event.delta for event in during), initial=live.start_bytes))
    assert totals(data)[-1] == live.end_bytes


@pytest.mark.parametrize("points", [2, 3, 10, 50, 240])
def test_few_places_keep_the_peak_and_its_parts(live: LiveTrace, points: int) -> None:
    data = timeline(live, points=points)
    assert len(data["index"]) <= max(points, 4)
    assert data["index"] == sorted(set(data["index"]))
    at = data["index"].index(data["peak_index"])
    assert max(totals(data)) == totals(data)[at] == data["peak_bytes"] == live.peak_bytes
    assert {name: curve(data, name)[at] for name in CATEGORIES} == live.by_category
    whole = timeline(live, points=100_000)
    assert [totals(whole)[i] for i in data["index"]] == totals(data)


def test_phases_and_modules(live: LiveTrace) -> None:
    data = timeline(live)
    assert [name for name, _ in data["phases"]] == ["forward", "backward", "optimizer"]
    assert data["top_modules"] == [list(entry) for entry in live.by_module[:8]]
    assert data["peak_phase"] == live.peak_phase


def test_it_is_json_and_compact(live: LiveTrace) -> None:
    data = timeline(live)
    assert json.loads(json.dumps(data)) == data
    assert len(json.dumps(data, indent=1)) < 20_000
    assert all(isinstance(value, int) for name in CATEGORIES for value in curve(data, name))
    assert isinstance(data["live_bytes"]["parameter"], int), "what never changes is said once"


def test_an_empty_tensor_of_the_start_may_go_in_the_step() -> None:
    """Its coming and its going are both of zero bytes; only the first was before the step."""
    empty = [torch.empty(0)]

    def step() -> None:
        empty.clear()
        torch.ones(1000)

    data = timeline(trace(step, inputs=empty, record_events=True))
    assert (data["num_events"], data["peak_index"], data["peak_bytes"]) == (3, 2, 4096)


def test_a_trace_without_events_is_refused() -> None:
    with pytest.raises(ValueError, match="record_events"):
        timeline(trace(lambda: torch.ones(1)))


# -- the figure


def made(divider: int, passes: int, peak: int, **settings: object):
    """A cell whose two steps climb to ``peak`` MiB and fall again; in training gradients take over."""
    cell = measure_cell(divider, passes, **settings)
    places, half = list(range(0, 101, 2)), peak * MIB // 2
    up = [half - half * abs(50 - x) // 50 for x in places]
    base = {"num_events": 100, "index": places, "peak_bytes": 2 * half, "peak_index": 50, "peak_module": "ups.0"}
    base |= {"peak_operator": "aten.add", "peak_phase": "forward", "top_modules": [["downs.0.block1", half], ["a" * 60, 512]]}
    sampled = base | {"live_bytes": {"parameter": half, "activation": up}, "phases": []}
    trained = base | {"live_bytes": {"parameter": half, "gradient": [512] * 25 + [1024] * 26, "activation": up}}
    trained["phases"] = [["forward", 0], ["backward", 50], ["optimizer", 95]]
    cell.details["timeline"] = {"sample_step": sampled, "train_step": trained}
    return cell


CELLS = [made(1, 32, 800), made(2, 128, 820), made(2, 32, 400), made(4, 32, 300), made(8, 32, 250), made(8, 2048, 830)]


def test_each_divider_is_shown_where_its_peak_is_lowest() -> None:
    chosen = representative(CELLS, "train")
    titles = ["d = 1", "d = 2, one index a pass", "d = 4, one index a pass", "d = 8, one index a pass"]
    assert {title: data["peak_bytes"] // MIB for title, data in chosen.items()} == dict(
        zip(titles, (800, 400, 300, 250), strict=True)
    )


@pytest.mark.parametrize("number", [1, 4, 6])
@pytest.mark.parametrize("step", ["train", "sample"])
def test_nothing_is_clipped_or_overlaps(step: str, number: int) -> None:
    phase = f"{step}_step"
    chosen = {f"d = {d}, one index a pass": made(1, 32, 700 - 100 * d).details["timeline"][phase] for d in range(number)}
    figure = live_bytes_over_a_step(chosen, step)
    assert figure is not None
    pixels = np.asarray(Image.open(io.BytesIO(style.rendered(figure, "png"))).convert("L"))
    assert (
        np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel(), pixels[:, -3:].ravel()]) == 255
    ).all()
    renderer = figure.canvas.get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    for axes in figure.axes[:number]:
        room = axes.get_window_extent(renderer)
        assert not legend.overlaps(axes.xaxis.label.get_window_extent(renderer))
        words = next(text for text in axes.texts if text.get_text().startswith("peak"))
        box = words.get_window_extent(renderer)
        assert room.y0 <= box.y0 and box.y1 <= room.y1 + 1  # noqa: PT018
        assert box.x0 >= room.x0 - 2
        assert "downs.0.block1" in words.get_text()


def test_the_areas_stack_to_the_data_and_the_phases_are_named() -> None:
    figure = live_bytes_over_a_step(representative(CELLS[:1], "train"), "train")
    assert isinstance(figure, Figure)
    axes = figure.axes[0]
    tops = [collection.get_paths()[0].vertices[:, 1].max() for collection in axes.collections]
    assert max(tops) == pytest.approx(800, rel=0.001)
    written = [text.get_text() for text in axes.texts]
    assert {"forward", "backward"} <= set(written)
    assert axes.get_ylabel() == "training step,\nlive tensor bytes (MiB)"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["weights", "gradients", "activations"]


def test_long_module_names_keep_their_end() -> None:
    assert _shortened("ups.0.block1", 19) == "ups.0.block1"
    assert _shortened("encoder.0.attention.norm", 19) == "…0.attention.norm"
    assert _shortened("a" * 60, 19) == "…" + "a" * 18


def test_a_report_has_a_figure_a_step_or_says_why_not(tmp_path: Path) -> None:
    found, absent = gallery.pictures(CELLS, tmp_path)
    named = {picture.name: picture for picture in found}
    assert {"timeline_train", "timeline_sample"} <= set(named)
    assert "sampling step" in named["timeline_sample"].caption
    assert not any("timeline" in line for line in absent)
    found, absent = gallery.pictures([measure_cell(1, 32)], tmp_path)
    assert not any(picture.name.startswith("timeline") for picture in found)
    assert any("no cell holds a timeline" in line for line in absent)
    assert live_bytes_over_a_step({}, "train") is None


# -- torch's own snapshot


class FakeMemory:
    """torch.cuda.memory's two functions; the snapshot is the calls so far."""

    def __init__(self, broken: bool = False) -> None:
        self.calls: list[object] = []
        self.broken = broken
        self.memory = self

    def _record_memory_history(self, enabled: str | None = "all", stacks: str = "all", max_entries: int = 0) -> None:
        self.calls.append((enabled, max_entries))

    def _dump_snapshot(self, filename: str) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        Path(filename).write_text(repr(self.calls))


def test_a_snapshot_is_recorded_around_the_block_and_written_whole(tmp_path: Path) -> None:
    cuda, path = FakeMemory(), tmp_path / "snapshots" / "cell-step.pickle"
    with memory_snapshot(path, cuda=cuda):
        assert cuda.calls == [("all", MAX_ENTRIES)]
        assert not path.exists()
    assert path.read_text() == repr([("all", MAX_ENTRIES)])
    assert cuda.calls[-1] == (None, 0), "torch records no longer"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failing_block_leaves_its_snapshot(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), memory_snapshot(tmp_path / "a.pickle", cuda=FakeMemory()):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert (tmp_path / "a.pickle").exists()


def test_torch_has_the_functions_as_they_are_called_here() -> None:
    """Both are private: a torch that renames them or their arguments must be noticed without a GPU."""
    record = inspect.signature(torch.cuda.memory._record_memory_history)
    assert record.bind(stacks="python", max_entries=MAX_ENTRIES).arguments == {"stacks": "python", "max_entries": MAX_ENTRIES}
    assert record.bind(enabled=None).arguments == {"enabled": None}
    assert inspect.signature(torch.cuda.memory._dump_snapshot).bind("file").args == ("file",)


def test_a_snapshot_that_cannot_be_written_leaves_no_torn_file(tmp_path: Path) -> None:
    cuda = FakeMemory(broken=True)
    with pytest.raises(RuntimeError, match="illegal"), memory_snapshot(tmp_path / "a.pickle", cuda=cuda):
        pass
    assert list(tmp_path.iterdir()) == []
    assert cuda.calls[-1] == (None, 0)


@pytest.mark.cuda
def test_a_real_snapshot_is_written(tmp_path: Path) -> None:
    with memory_snapshot(tmp_path / "a.pickle"):
        torch.ones(1000, device="cuda")
    assert (tmp_path / "a.pickle").stat().st_size > 1000
