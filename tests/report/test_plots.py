"""The figures: they show the numbers they are given, nothing is clipped or overlaps, grey tells the fills apart, and equal
input gives equal files."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from make_run import grid_image, make_run, measure_cell, quality_cell
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

from pbbench.records.cells import CellResult, read_cells
from pbbench.report.figures import gallery, style
from pbbench.report.figures import scatter as plots
from pbbench.report.figures.bars import peak_by_category
from pbbench.report.figures.samples import sample_grids
from pbbench.report.tables.memory import split
from pbbench.report.tables.tradeoff import tradeoff

SETTINGS = [(d, p) for d in (1, 2, 4, 8) for p in (32 * d * d, 32)]


def cells_of(device: str = "cuda", scored: bool = True) -> list[CellResult]:
    made = [measure_cell(d, p, device=device) for d, p in dict.fromkeys(SETTINGS)]
    return made + ([quality_cell(d, device=device) for d in (1, 2, 4, 8)] if scored else [])


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    """Each chart of a CUDA run, and the two scatter charts of a crowded one (five ways to pass at each divider)."""
    cells = cells_of()
    crowd = [measure_cell(d, p, device="cuda") for d in (1, 2, 4, 8) for p in (32 * d * d, 64, 32, 16, 8) if p <= 32 * d * d]
    crowd += [quality_cell(d) for d in (1, 2, 4, 8)]
    frame, crowded = tradeoff(cells), tradeoff(crowd)
    drawn = {
        "quality": plots.memory_against_quality(frame),
        "speed": plots.speed_against_memory(frame),
        "split": peak_by_category(split(cells)),
        "crowded quality": plots.memory_against_quality(crowded),
        "crowded speed": plots.speed_against_memory(crowded),
        "crowded split": peak_by_category(split(crowd)),
        "one divider": plots.memory_against_quality(tradeoff([measure_cell(1, 32), quality_cell(1)])),
    }
    found = {name: figure for name, figure in drawn.items() if figure is not None}
    assert len(found) == len(drawn)
    for figure in found.values():
        style.rendered(figure, "png")  # lays the figure out as the files are
    return found


NAMES = ["quality", "speed", "split", "crowded quality", "crowded speed", "crowded split", "one divider"]


def texts(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_clipped(figures: dict[str, Figure], name: str) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(style.rendered(figures[name], "png"))).convert("L"))
    border = np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel(), pixels[:, -3:].ravel()])
    assert (border == 255).all()  # ink at the border would be cut off by it
    assert (pixels < 128).any()


@pytest.mark.parametrize("name", NAMES)
def test_labels_do_not_overlap(figures: dict[str, Figure], name: str) -> None:
    figure = figures[name]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    labels = [t for t in texts(figure) if isinstance(t, Annotation)]
    assert labels
    boxes = [(label.get_text(), Text.get_window_extent(label, renderer)) for label in labels]  # without leaders
    if name.startswith("crowded") and name != "crowded split":
        assert len({text for text, _ in boxes}) == 18  # every configuration found a place
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert a.width * a.height > 0
        overlap = max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))
        assert overlap < 0.02 * min(a.width * a.height, b.width * b.height), f"{one!r} and {other!r} overlap"


def test_axes_name_what_they_show_the_meter_and_the_unit(figures: dict[str, Figure]) -> None:
    left, right = figures["quality"].axes[:2]
    assert left.get_xlabel() == "training peak, torch.cuda peak allocated (GiB)"
    assert right.get_xlabel() == "sampling peak, torch.cuda peak allocated (GiB)"
    assert "(not FID)" in left.get_ylabel().replace("\n", " ")
    assert "1,000 images" in left.get_ylabel()
    assert "bars: 95%" in left.get_ylabel()
    assert figures["speed"].axes[0].get_ylabel() == "training speed (images/s)"
    assert figures["split"].axes[1].get_ylabel() == "sampling peak, allocated (GiB)"
    on_cpu = plots.speed_against_memory(tradeoff(cells_of("cpu")))
    assert on_cpu is not None
    assert on_cpu.axes[0].get_xlabel() == "training peak, live tensor bytes (MiB)"


def test_points_lie_where_the_table_says(figures: dict[str, Figure]) -> None:
    frame = tradeoff(cells_of())
    axes = figures["quality"].axes[0]
    drawn = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_linestyle() == "None"}
    columns = frame["train_peak_bytes"] / 2**30, frame["random_features_frechet_distance"]
    assert drawn == set(zip(*columns, strict=True))
    dark = {
        (x.get_xdata()[0], x.get_ydata()[0])
        for x in axes.lines
        if x.get_linestyle() == "None" and x.get_color() == style.STRONG
    }
    index = frame[(frame["patches_per_pass"] == "index") | (frame["patch_divider"] == 1)]
    assert dark == set(zip(index["train_peak_bytes"] / 2**30, index["random_features_frechet_distance"], strict=True))


def test_error_bars_are_the_intervals(figures: dict[str, Figure]) -> None:
    axes = figures["quality"].axes[0]
    frame = tradeoff(cells_of())
    name = "random_features_frechet_distance"
    (bars,) = (c for c in axes.collections if len(c.get_paths()) == len(frame))
    drawn = {tuple(path.vertices[:, 1]) for path in bars.get_paths()}
    assert drawn == set(zip(frame[f"{name}_low"], frame[f"{name}_high"], strict=True))
    low, high = axes.get_ylim()
    assert low < frame[f"{name}_low"].min()
    assert high > frame[f"{name}_high"].max()


def test_bars_stack_to_the_peak(figures: dict[str, Figure]) -> None:
    frame = split(cells_of())
    for axes, step in zip(figures["split"].axes[:2], ("train", "sample"), strict=True):
        heights: dict[float, float] = {}
        for bar in axes.patches:
            middle = round(bar.get_x() + bar.get_width() / 2, 6)  # type: ignore[attr-defined]
            heights[middle] = heights.get(middle, 0.0) + bar.get_height()  # type: ignore[attr-defined]
        peaks = frame.loc[frame["step"] == step, "measured_peak_bytes"] / 2**30  # with the workspaces
        assert list(heights.values()) == pytest.approx(list(peaks))


def test_pareto_is_what_no_other_beats() -> None:
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(rng.randint(1, 12))]
        beaten = [any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]
        front = plots.pareto(points)
        assert sorted(front) == [i for i, b in enumerate(beaten) if not b]
        assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_fills_are_steps_of_grey() -> None:
    grey = [
        sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True)) for colour, _ in style.FILLS.values()
    ]
    hatches = [hatch for _, hatch in style.FILLS.values()]
    assert grey == sorted(grey)
    steps = zip(itertools.pairwise(grey), itertools.pairwise(hatches), strict=True)
    assert all(b - a > 0.08 or h != g for (a, b), (h, g) in steps)  # a small step comes with another hatch


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_equal_input_gives_equal_files(kind: str) -> None:
    cells = [measure_cell(d, 32) for d in (1, 2)]
    once, again = (style.rendered(peak_by_category(split(cells)), kind) for _ in range(2))  # type: ignore[arg-type]
    assert once == again
    assert b"dc:date" not in once
    assert b"matplotlib.org" not in once.lower()


def test_png_is_sized_for_a_paper(figures: dict[str, Figure]) -> None:
    image = Image.open(io.BytesIO(style.rendered(figures["speed"], "png")))
    assert image.width / style.FULL_WIDTH >= 200  # dots per inch
    assert round(image.info["dpi"][0]) == style.DPI
    sizes = {t.get_fontsize() for name in NAMES for t in texts(figures[name])}
    assert min(sizes) >= 6
    assert max(sizes) <= 9


def test_nothing_to_draw_is_no_figure() -> None:
    failed = [measure_cell(1, 32, failed={"sample_step": "crashed", "train_step": "out_of_memory"}), quality_cell(1)]
    frame = tradeoff(failed)
    assert plots.memory_against_quality(frame) is None
    assert plots.speed_against_memory(frame) is None
    assert peak_by_category(split(failed)) is None
    assert plots.memory_against_quality(tradeoff([measure_cell(1, 32)])) is None  # nothing scored
    assert sample_grids({}) is None


def test_a_step_that_failed_everywhere_leaves_one_panel_of_a_columns_width() -> None:
    made = [measure_cell(d, 32, failed={"train_step": "out_of_memory"}) for d in (1, 2)]
    figure = plots.speed_against_memory(tradeoff(made))
    assert figure is not None
    assert len(figure.axes) == 1
    assert figure.get_size_inches()[0] == style.COLUMN_WIDTH


def test_sample_grids_stand_beside_each_other_with_the_reference(tmp_path: Path) -> None:
    for name in ("a", "b"):
        grid_image(1).save(tmp_path / f"{name}.png")
    grid_image(2).save(tmp_path / "square.png")
    grid_image(3, columns=12, rows=1).save(tmp_path / "strip.png")
    grids = {"d = 1": tmp_path / "a.png", "d = 2": tmp_path / "b.png"}
    beside = sample_grids(grids, tmp_path / "square.png")
    under = sample_grids(grids, tmp_path / "strip.png")
    assert beside is not None
    assert under is not None
    for figure in (beside, under):
        assert [axes.get_title() for axes in figure.axes] == ["d = 1", "d = 2", "reference images"]
    assert under.get_size_inches()[0] == style.FULL_WIDTH
    tops = [axes.get_position().y0 for axes in beside.axes]
    assert tops[0] == pytest.approx(tops[2])


def test_pictures_of_a_grid_of_settings_are_one_set_per_batch_size_and_precision() -> None:
    made = [measure_cell(1, n, batch_size=n, precision=p) for n in (4, 8) for p in ("no", "bf16")]
    found, absent = gallery.pictures(made, Path("nowhere"))
    names = {picture.name for picture in found}
    assert names == {f"{kind}-b{n}-{p}" for kind in ("memory_split", "speed_memory") for n in (4, 8) for p in ("no", "bf16")}
    assert any("scored no images" in line for line in absent)
    assert all("batch size" in picture.caption for picture in found)


def test_samples_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, dividers=(1, 2, 4), quality_status={4: "nan_loss"})
    (run / "samples" / "d1-quality.png").write_bytes(b"not an image")
    (run / "samples" / "reference.png").unlink()
    found, absent = gallery.pictures([c for c in read_cells(run) if c.kind == "quality"], run)
    assert [picture.name for picture in found] == ["samples"]
    assert [axes.get_title() for axes in found[0].figure.axes] == ["d = 2   (distance 44.9)"]
    told = " ".join(absent)
    assert "samples/d1-quality.png cannot be read as an image" in told
    assert "Samples at d = 4: nan loss" in told
    assert "samples/reference.png is not there" in told
    assert "no scored divider has a measured peak" in told
