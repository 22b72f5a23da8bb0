"""The report of a comparison: variants and seeds in its tables and on its plot, and what was held equal, said in words."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from make_run import make_run, measure_cell, quality_cell
from matplotlib.text import Annotation
from PIL import Image

from pbbench.records.cells import CellResult, read_cells, write_cell
from pbbench.report.answer import patching_pays
from pbbench.report.compare.runs import compare
from pbbench.report.figures import gallery, style
from pbbench.report.figures import scatter as plots
from pbbench.report.pages.prose import headline, quality_statements
from pbbench.report.tables.held_equal import held_equal, trained_from
from pbbench.report.tables.quality import bands_table, quality_table
from pbbench.report.tables.tradeoff import tradeoff, tradeoff_table

SEEDS = (0, 1, 2)
FRECHET = "random_features_frechet_distance"


def compared() -> list[CellResult]:
    """Two dividers, an ablation of d = 2 and a rival of d = 1 with a quarter of the batch, each trained from three seeds."""
    cells = [measure_cell(1, 32), measure_cell(2, 32), measure_cell(2, 32, variant="no position")]
    cells.append(measure_cell(1, 8, batch_size=8, variant="small batch"))
    for seed in SEEDS:
        cells += [quality_cell(d, seed=seed) for d in (1, 2)]
        cells += [quality_cell(2, seed=seed, variant="no position"), quality_cell(1, seed=seed, variant="small batch")]
    return cells


@pytest.fixture(scope="module")
def cells() -> list[CellResult]:
    return compared()


def test_each_variant_has_lines_of_its_own_with_its_own_quality(cells: list[CellResult]) -> None:
    frame = tradeoff(cells)
    lines = list(zip(frame["variant"], frame["patch_divider"], frame["batch_size"], strict=True))
    assert lines == [("", 1, 32), ("", 2, 32), ("no position", 2, 32), ("small batch", 1, 8)]
    assert list(frame[FRECHET]) == pytest.approx([41.2 * 1.01, 44.9 * 1.01, 44.9 * 1.111, 41.2 * 1.111])
    sheet = tradeoff_table(cells)
    assert [c.title for c in sheet.columns][:3] == ["variant", "d", "patches a pass"]
    assert sheet.columns[0].cells == ["", "", "no position", "small batch"]


def test_without_variants_there_is_no_such_column() -> None:
    made = [measure_cell(1, 32), quality_cell(1)]
    for sheet in (tradeoff_table(made), quality_table(made), bands_table(made)):
        assert sheet is not None
        assert "variant" not in [c.title for c in sheet.columns]


def test_several_seeds_give_median_least_and_most(cells: list[CellResult]) -> None:
    line = tradeoff(cells).iloc[0]
    assert (line[f"{FRECHET}_min"], line[f"{FRECHET}_max"]) == pytest.approx((41.2, 41.2 * 1.02))
    assert f"{FRECHET}_low" not in tradeoff(cells)  # an interval over samples would pass for the spread of trainings
    column = next(c for c in tradeoff_table(cells).columns if c.title.startswith("Fréchet"))
    assert column.cells[0] == "41.6 (41.2–42.0)"
    sheet = quality_table(cells)
    assert sheet is not None
    assert next(c for c in sheet.columns if c.title == "trainings").cells == ["3 of 3"] * 4
    assert any("Trained 3 times, from seeds 0, 1, 2" in note for note in tradeoff_table(cells).notes)


def test_a_training_that_failed_is_left_out_and_told() -> None:
    made = [measure_cell(1, 32), quality_cell(1, seed=0), quality_cell(1, seed=1, status="nan_loss"), quality_cell(1, seed=2)]
    line = tradeoff(made).iloc[0]
    assert line["status"] == "nan_loss in quality (1 of 3 trainings)"
    assert line[FRECHET] == pytest.approx(41.2 * 1.01)  # of seeds 0 and 2
    alone = tradeoff([measure_cell(1, 32), quality_cell(1, seed=0), quality_cell(1, seed=1, status="nan_loss")]).iloc[0]
    assert alone[f"{FRECHET}_low"] == pytest.approx(0.98 * 41.2)  # one training is left: what is known is its interval


def test_a_rivals_peak_is_held_against_the_experiments_whole_image(cells: list[CellResult]) -> None:
    frame = tradeoff(cells)
    changes = frame["train_peak_bytes"] / frame["train_peak_bytes"][0] - 1
    assert list(frame["train_peak_change"]) == pytest.approx(list(changes))
    two = [*cells, measure_cell(1, 16, batch_size=16)]  # now there are two whole images: which one is not known
    assert math.isnan(tradeoff(two).iloc[-1]["train_peak_change"])


def test_what_was_held_equal_is_said_as_the_cells_have_it(cells: list[CellResult]) -> None:
    assert held_equal(cells) == "Held equal between trainings: 16,000 images seen each (with repetition)."
    assert held_equal([measure_cell(1, 32)]) is None
    assert trained_from(cells) == "3 times, from seeds 0, 1, 2"
    assert trained_from([quality_cell(1), quality_cell(2)]) == "once"
    other = [quality_cell(1), quality_cell(2)]
    other[1].rows[0].images_seen = 9_000
    assert held_equal(other) == "Not held equal: the trainings saw 9,000 to 16,000 images."
    for cell, seconds in zip(other, (60.04, 61.9), strict=True):
        cell.details |= {"equal": "seconds", "train_seconds": seconds}
    told = held_equal(other)
    assert told == (
        "Held equal between trainings: the time (60.0 to 61.9 s each, checkpoints included); they saw 9,000 to 16,000 images."
    )
    assert told in tradeoff_table([measure_cell(1, 32), *other]).notes
    assert any(line.startswith(told) for line in quality_statements(other))


def test_the_headline_and_what_patching_saves_are_of_the_experiment_itself() -> None:
    narrow = measure_cell(1, 32, variant="a narrow one")
    for row in narrow.rows:
        row.dim = 8
    made = [narrow, measure_cell(1, 32), measure_cell(2, 32)]
    assert "dim 128" in headline(made, {})[1]
    assert headline(made, {})[1].endswith("Variants: a narrow one.")
    assert patching_pays(made) == patching_pays(made[1:])


def test_rivals_stand_on_the_plot_of_the_dividers_whatever_their_batch(cells: list[CellResult]) -> None:
    found, _ = gallery.pictures(cells, Path("nowhere"))
    assert [p.name for p in found] == ["memory_quality", "memory_split", "speed_memory"]  # one set: no figure per batch size
    figure = found[0].figure
    points = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    shapes = [line.get_marker() for line in points]
    assert len(points) == 4
    assert shapes[0] == shapes[1]  # the experiment's two dividers
    assert len(set(shapes)) == 3
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:3] == ["the experiment", "no position", "small batch"]
    assert "d = 1" not in legend
    assert {t.get_text() for t in figure.findobj(Annotation)} >= {"d=1", "d=2 index"}
    assert "least–most" in figure.axes[0].get_ylabel()
    assert "no position, small batch" in found[0].caption
    assert "16,000 images seen" in found[0].caption


def test_names_of_any_length_fit_the_figure() -> None:
    made = [measure_cell(1, 32), quality_cell(1)]
    for i in range(5):
        name = f"{i} a rival of a name as long as allowed"
        made += [measure_cell(1, 32, variant=name), quality_cell(1, variant=name)]
    figure = plots.memory_against_quality(tradeoff(made))
    assert figure is not None
    pixels = np.asarray(Image.open(io.BytesIO(style.rendered(figure, "png"))).convert("L"))
    assert (np.concatenate([pixels[:, :3], pixels[:, -3:]]) == 255).all()


def test_grids_of_samples_are_one_per_variant_and_divider(tmp_path: Path) -> None:
    run = make_run(tmp_path, dividers=(1, 2))
    for cell in (quality_cell(1, variant="rival"), quality_cell(2, seed=1)):
        write_cell(run, cell)
        (run / cell.details["grid"]).write_bytes((run / "samples" / "d1-quality.png").read_bytes())
    found, _ = gallery.pictures(read_cells(run), run)
    titles = [axes.get_title().split("   ")[0] for axes in found[-1].figure.axes]
    assert titles == ["d = 1", "d = 2", "rival, d = 1", "reference images"]


def test_runs_are_compared_variant_by_variant(tmp_path: Path) -> None:
    old, new = (make_run(tmp_path / name, dividers=(1, 2)) for name in ("old", "new"))
    for run, seed in ((old, 0), (new, 3)):
        write_cell(run, measure_cell(2, 32, variant="rival", repeat=seed))
        write_cell(run, quality_cell(2, variant="rival"))
    found = compare(old, new)
    assert not found.missing
    assert not found.added
    assert {(s.settings["variant"], s.settings["patch_divider"]) for s in found.steps} == {("", 1), ("", 2), ("rival", 2)}
    assert {(c.settings["variant"], c.settings["patch_divider"]) for c in found.quality} == {("", 1), ("", 2), ("rival", 2)}
    assert not [note for note in found.notes if "variant" in note]


def at_equal_memory() -> list[CellResult]:
    """Three dividers in the same memory, each with a batch of its own; the first does not fit."""
    cells = [measure_cell(1, 1, batch_size=1, failed={"train_step": "out_of_memory"}), measure_cell(2, 8, batch_size=8)]
    cells += [measure_cell(4, 32), quality_cell(1, status="out_of_memory"), quality_cell(2), quality_cell(4)]
    cells[3].status = "out_of_memory"
    for cell in cells[:3]:
        cell.details["equal_memory"] = 200 * 2**20
        for row in cell.rows:
            row.gradient_accumulation_steps = 32 // (row.batch_size or 1)
    cells[4].details |= {"equal": "memory", "train_seconds": 60.04}
    cells[5].details |= {"equal": "memory", "train_seconds": 81.5}
    return cells


def test_at_equal_memory_time_is_what_is_compared() -> None:
    made = at_equal_memory()
    assert held_equal(made) == (
        "Held equal between trainings: the memory (200 MiB given to a training step; measured peaks 32.3 MiB to 62.1 MiB) and "
        "the images (16,000 seen each, in the same optimizer batches); they took 60.0 to 81.5 s."
    )
    assert held_equal(made[:3]) == (
        "Held equal between training steps: the memory (200 MiB given to a training step; measured peaks 32.3 MiB to 62.1 MiB)."
    )
    sheet = tradeoff_table(made)
    columns = {column.title: column.cells for column in sheet.columns}
    assert columns["batch × accum."] == ["1 × 32", "8 × 4", "32 × 1"]
    assert columns["training (s)"] == ["–", "60.0", "81.5"]
    assert not [title for title in columns if "vs d=1" in title]
    assert not [note for note in sheet.notes if note.startswith("No change")]
    (said,) = patching_pays(made)
    assert said.startswith("A training step was given 200 MiB at every divider")
    assert said.endswith("d = 1 out of memory.")
    found, absent = gallery.pictures(made, Path("nowhere"))
    assert [p.name for p in found] == ["time_quality", "memory_split", "speed_memory"]  # not one of each batch size
    assert "60.0 to 81.5 s" in found[0].caption
    assert not [line for line in absent if "against quality" in line]
    assert found[0].figure.axes[0].get_xlabel() == "training (s)"
