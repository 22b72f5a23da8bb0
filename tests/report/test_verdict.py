"""The rule that says whether a run ranks its dividers, on made-up runs on both sides of each of its conditions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from make_run import FLOOR, make_run, quality_cell

from pbbench.records.cells import CellResult, read_cells
from pbbench.report.figures.scatter import memory_against_quality
from pbbench.report.pages.prose import quality_statements
from pbbench.report.tables.quality import differences_table, quality_table
from pbbench.report.tables.tradeoff import tradeoff, tradeoff_table
from pbbench.report.verdict import FAR, NEAR, RULE, Verdict, verdict

NAME = "random_features_frechet_distance"


def scored(
    d: int, distance: float, loss: float, excess: float = 4.0, wobble: float = 0.001, floor: float | None = FLOOR
) -> CellResult:
    """A divider whose figures vary over samples by ``wobble``, as a fraction."""
    cell = quality_cell(d)
    metrics: dict[str, Any] = cell.details["metrics"]
    turned = [wobble * math.sin(17 * group + d) for group in range(20)]  # each divider its own way: pairing takes nothing off
    figures = {NAME: distance, "held_out_loss": loss}
    if d > 1:
        figures["seam_excess_square"] = excess**2
        metrics["seam_excess_square"] = excess**2
    metrics |= {NAME: distance, "left_out": {name: [v * (1 + w) for w in turned] for name, v in figures.items()}}
    metrics["floor"] = None if floor is None else {NAME: floor}
    setattr(cell.rows[0], NAME, distance)
    cell.rows[0].held_out_loss = loss
    return cell


def judged(*cells: CellResult) -> Verdict:
    found = verdict(cells)
    assert found is not None
    return found


def test_figures_that_agree_near_the_floor_rank() -> None:
    found = judged(scored(1, 1.5 * FLOOR, 0.10), scored(2, 1.7 * FLOOR, 0.11), scored(4, 2.2 * FLOOR, 0.13))
    assert found.ranks, found.said
    assert [(pair.a, pair.b) for pair in found.pairs] == [(1, 2), (1, 4), (2, 4)]
    difference = found.to_first(4)
    assert difference is not None
    assert difference.value == pytest.approx(0.7 * FLOOR)
    assert difference.decided
    assert difference.training is None
    assert "trained once" in " ".join(found.said)


@pytest.mark.parametrize("times", [NEAR * 0.99, NEAR * 1.01])
def test_far_from_the_floor_the_held_out_loss_must_confirm(times: float) -> None:
    """Losses that cannot be told apart: enough below three floors, too little above."""
    cells = scored(1, times * FLOOR, 0.10), scored(2, 1.2 * times * FLOOR, 0.1000001)
    assert judged(*cells).ranks is (times < NEAR)
    assert judged(scored(1, times * FLOOR, 0.10), scored(2, 1.2 * times * FLOOR, 0.11)).ranks


@pytest.mark.parametrize("times", [FAR * 0.99, FAR * 1.01])
def test_much_too_far_nothing_ranks(times: float) -> None:
    found = judged(scored(1, times * FLOOR, 0.10), scored(2, 1.2 * times * FLOOR, 0.11))
    assert found.ranks is (times < FAR)
    assert found.ranks or "trained too little" in found.said[0]


def test_a_loss_that_says_the_opposite_withholds() -> None:
    found = judged(scored(1, 2 * FLOOR, 0.12), scored(4, 1.5 * FLOOR, 0.13, excess=1.5))
    assert not found.ranks
    assert found.said == ("By its distance d = 4 is better than d = 1, by its held-out loss worse.",)


def test_seams_that_say_the_opposite_withhold() -> None:
    found = judged(scored(2, 2 * FLOOR, 0.13, excess=3.0), scored(4, 1.5 * FLOOR, 0.13, excess=9.0))
    assert "by its seams worse" in found.said[0]
    assert judged(scored(2, 2 * FLOOR, 0.13, excess=1.0), scored(4, 1.5 * FLOOR, 0.13, excess=1.9)).ranks  # unseen
    whole = scored(1, 2 * FLOOR, 0.13)  # at the lines of d = 4 it has an excess of 0.2 grey levels
    assert "by its seams worse" in judged(whole, scored(4, 1.5 * FLOOR, 0.13, excess=9.0)).said[0]


def test_differences_within_their_intervals_rank_nothing() -> None:
    near = scored(1, 1.50 * FLOOR, 0.10, wobble=0.05), scored(2, 1.52 * FLOOR, 0.12, wobble=0.05)
    found = judged(*near)
    assert not found.ranks
    assert "95% interval" in found.said[0]


def test_without_a_floor_nothing_ranks() -> None:
    found = judged(scored(1, 2 * FLOOR, 0.10, floor=None), scored(2, 3 * FLOOR, 0.11, floor=None))
    assert not found.ranks
    assert "floor" in found.said[0]


def test_trainings_that_differ_by_seed_widen_what_must_be_exceeded() -> None:
    def seeded(d: int, distances: list[float]) -> list[CellResult]:
        cells = [scored(d, distance, 0.10) for distance in distances]
        for seed, cell in enumerate(cells):
            cell.axes["seed"], cell.id = seed, f"{cell.id}-s{seed}"
        return cells

    one, steady, varying = (seeded(d, [x * FLOOR for x in v]) for d, v in ((1, [1.5, 1.51]), (2, [1.7, 1.71]), (2, [1.5, 1.9])))
    assert judged(*one, *steady).pairs[0].distance.decided
    pair = judged(*one, *varying).pairs[0].distance
    assert not pair.decided
    assert pair.training is not None
    assert pair.sampling is not None
    assert pair.training > 10 * pair.sampling


def test_one_divider_is_not_ranked() -> None:
    assert verdict([quality_cell(1)]) is None


def test_a_withheld_run_says_so_everywhere_and_draws_no_front(tmp_path: Path) -> None:
    run = read_cells(make_run(tmp_path / "run", dividers=(1, 4)))
    measured = [cell for cell in run if cell.kind == "measure"]
    for cells, ranks in (
        ([*measured, scored(1, 2 * FLOOR, 0.10), scored(4, 2.5 * FLOOR, 0.13)], True),
        ([*measured, scored(1, 2 * FLOOR, 0.10), scored(4, 1.5 * FLOOR, 0.13)], False),
    ):
        figure = memory_against_quality(tradeoff(cells))
        assert figure is not None
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert any("Pareto" in label for label in labels) is ranks
        assert any("floor" in label for label in labels)
        assert any(line.get_ydata()[0] == FLOOR for line in figure.axes[0].lines)
        assert any("do not rank" in note for note in tradeoff_table(cells).notes) is not ranks
        told = quality_statements(cells)
        assert any("does not rank" in line for line in told) is not ranks
        assert f"The rule: {RULE}" in told


def test_tables_hold_the_floor_and_the_differences() -> None:
    cells = [scored(1, 1.5 * FLOOR, 0.10), scored(2, 1.7 * FLOOR, 0.11)]
    table, differences = quality_table(cells), differences_table(cells)
    assert table is not None
    assert differences is not None
    floor = next(column for column in table.columns if column.title.startswith("floor"))
    assert floor.cells == ["18.5", "18.5"]
    there = next(column for column in table.columns if column.title.startswith("seam score of d = 1"))
    assert there.cells == ["–", "1.02"]
    by_title = {column.title: column.cells for column in differences.columns}
    assert by_title["d"] == ["2"]
    assert next(cells for title, cells in by_title.items() if "held-out" in title and "more" in title) == ["+0.0100"]
