"""Two runs against each other: the gate is exact in bytes, times are judged beside their noise, unlike things never meet."""

import json
import math
import random
import shutil
from fractions import Fraction

import pytest
from make_run import make_run

from pbbench import cli
from pbbench.cli.options import run_app
from pbbench.errors import InputError
from pbbench.records.cells import read_cells, write_cell
from pbbench.records.files import write_json
from pbbench.report.compare.gate import parse_increase, too_much
from pbbench.report.compare.output import to_json, to_page
from pbbench.report.compare.runs import compare
from pbbench.report.compare.speed import judge_speed

D4 = "d4-p32-b32-no"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on a GPU and one on a CPU, to be copied and never changed."""
    folder = tmp_path_factory.mktemp("runs")
    return {device: make_run(folder / device, device=device, dividers=(1, 4)) for device in ("cuda", "cpu")}


@pytest.fixture
def pair(made, tmp_path):
    """(A, B): the same CUDA run twice; B may be changed."""
    return made["cuda"], shutil.copytree(made["cuda"], tmp_path / "b")


def edit(run, name, change):
    """Apply ``change`` to the cells whose id is ``name`` and write them back."""
    for cell in read_cells(run):
        if cell.id == name:
            change(cell)
            write_cell(run, cell)


def warm(cell, phase):
    return next(row for row in cell.rows if (row.phase, row.temperature) == (phase, "warm"))


def grow(run, name, phase, column, extra):
    def change(cell):
        row = warm(cell, phase)
        setattr(row, column, extra(getattr(row, column)))

    edit(run, name, change)


def step(found, name=D4, phase="train_step"):
    return next(s for s in found.steps if (s.cell, s.phase) == (name, phase))


def command(capsys, *words):
    code = run_app(cli.app, ["compare", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_same_run_twice_passes_the_tightest_gate(made, device):
    found = compare(made[device], made[device], "0%")
    assert found.failures == []
    assert {s.phase for s in found.steps} == {"train_step", "sample_step"}
    assert {s.gated for s in found.steps} == {"peak_allocated_bytes" if device == "cuda" else "peak_live_bytes"}
    assert {s.speed for s in found.steps} == {"same"}
    assert {c.verdict for c in found.quality} == {"same"}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_increase_of_the_limit_passes_and_one_byte_more_does_not(made, tmp_path, device):
    a, b = (shutil.copytree(made[device], tmp_path / name) for name in "ab")
    column = "peak_allocated_bytes" if device == "cuda" else "peak_live_bytes"
    grow(a, D4, "train_step", column, lambda _: 300_000_000)
    grow(b, D4, "train_step", column, lambda _: 303_000_000)
    assert compare(a, b, "1%").failures == []
    grow(b, D4, "train_step", column, lambda _: 303_000_001)
    assert compare(a, b, "0.01").failures == [
        f"{D4} train_step: {column} 300,000,000 → 303,000,001 bytes (+3,000,001, +1%; the limit is 0.01)"
    ]
    assert compare(a, b).failures == []  # without a limit nothing is held against it
    assert compare(b, a, "0%").failures == []  # less is never too much


def test_a_limit_is_exact_where_floats_are_not():
    assert not too_much(10**15, 10**15 + 10**12, parse_increase("0.1%"))
    assert too_much(10**15, 10**15 + 10**12 + 1, parse_increase("0.1%"))
    assert too_much(0, 1, parse_increase("50%"))
    assert (parse_increase("1%"), parse_increase(" .01 "), parse_increase("150%")) == (
        Fraction(1, 100),
        Fraction(1, 100),
        Fraction(3, 2),
    )


@pytest.mark.parametrize("text", ["", "%", "-1%", "1", "1 MiB", "nan", "1/2", "1e-2"])
def test_what_is_no_limit_is_refused(made, text):
    with pytest.raises(InputError, match="--max-increase"):
        compare(made["cpu"], made["cpu"], text)


def test_the_gate_goes_by_the_allocator_not_by_the_other_meters(pair):
    a, b = pair
    for column in ("peak_live_bytes", "peak_reserved_bytes"):
        grow(b, D4, "train_step", column, lambda v: v * 2)
    found = compare(a, b, "1%")
    assert found.failures == []
    assert step(found).change("peak_reserved_bytes") == 1.0


def test_a_cell_that_ended_worse_fails_without_a_limit_and_one_that_ended_better_does_not(made, tmp_path):
    failing = make_run(
        tmp_path / "b",
        device="cuda",
        dividers=(1, 4),
        failed={D4: {"train_step": "out_of_memory"}},
        quality_status={4: "nan_loss"},
    )
    found = compare(made["cuda"], failing)
    assert found.failures == [
        f"{D4} train_step: ok in A, out_of_memory in B",
        "d4-quality: ok in A, nan_loss in B",
    ]
    assert step(found, phase="sample_step").status == ("ok", "ok")
    assert compare(failing, made["cuda"], "0%").failures == []
    assert compare(failing, failing, "0%").failures == []


def test_a_cell_that_was_killed_before_it_had_a_row_is_matched_by_its_axes(pair):
    a, b = pair

    def kill(cell):
        cell.status, cell.rows = "killed", []

    edit(b, D4, kill)
    assert compare(a, b).failures == [f"{D4} {phase}: ok in A, killed in B" for phase in ("train_step", "sample_step")]


def test_repeats_are_gathered_and_the_largest_peak_counts(tmp_path):
    a, b = (make_run(tmp_path / name, device="cuda", dividers=(4,), repeats=3, scored=False) for name in "ab")
    grow(b, f"{D4}-r1", "train_step", "peak_allocated_bytes", lambda v: v * 2)
    found = compare(a, b, "1%")
    assert len(found.steps) == 4  # two configurations, two steps
    assert [line.split(":")[0] for line in found.failures] == [f"{D4} train_step"]

    def crash(cell):
        for row in cell.rows:
            row.status = "crashed" if row.phase == "train_step" else row.status

    edit(b, f"{D4}-r1", crash)  # the reading taken while it failed no longer counts; the failure does
    assert compare(a, b, "1%").failures == [f"{D4} train_step: ok in A, crashed (1 of 3 repeats) in B"]


def test_cells_that_only_one_run_has_are_named_and_fail_the_gate(pair, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    a, b = pair
    (b / "cells" / f"{D4}.json").unlink()
    assert compare(a, b).missing == [D4]
    assert compare(b, a).added == [D4]
    assert compare(b, a, "0%").failures == []
    marked = shutil.copytree(a, b.parent / "[red]")
    assert "[red]: d4" in command(capsys, marked, b)[1]
    code, _, said = command(capsys, a, b, "--max-increase", "1%")
    assert code == 1
    assert said.splitlines() == [f"pbbench: {D4}: missing in {b}"]


def test_a_reading_that_only_a_has_does_not_pass(pair):
    a, b = pair
    for column in ("peak_allocated_bytes", "peak_live_bytes"):
        grow(b, D4, "train_step", column, lambda _: None)
    assert compare(a, b, "1%").failures == [
        f"{D4} train_step: A has peak_allocated_bytes, B does not: nothing shows that it did not grow"
    ]


def test_a_gate_with_nothing_to_go_by_is_refused(tmp_path):
    run = make_run(tmp_path / "run", dividers=(4,))
    for path in (run / "cells").glob("d4-p*"):
        path.unlink()
    assert compare(run, run).steps == []
    with pytest.raises(InputError, match="no warm memory reading"):
        compare(run, run, "1%")


def test_runs_with_nothing_in_common_are_refused(made, tmp_path, capsys):
    other = make_run(tmp_path / "other", dividers=(2,))
    code, out, said = command(capsys, made["cpu"], other)
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert "patch_divider 1, 4 and 2" in said
    with pytest.raises(InputError, match="no run folder"):
        compare(made["cpu"], tmp_path / "absent")


def test_a_setting_that_one_run_does_not_know_keeps_cells_apart_only_where_it_varies(pair):
    a, b = pair
    for cell in read_cells(b):
        cell.axes["halo"] = 0
        write_cell(b, cell)
    found = compare(a, b, "0%")
    assert found.failures == []
    assert any("halo" in note for note in found.notes)
    edit(b, D4, lambda cell: cell.axes.update(halo=2))
    with pytest.raises(InputError, match="no configuration in common"):
        compare(*(_without_quality(run) for run in (a, b)))


def _without_quality(run):
    kept = run.parent / f"{run.name}-measured"
    shutil.copytree(run, kept, ignore=shutil.ignore_patterns("*-quality.json"), dirs_exist_ok=True)
    return kept


def judged(a, b):
    """Of one process each."""
    return judge_speed([a], [b])


def test_speed_is_judged_beside_the_noise_of_single_steps():
    assert judged([1.00, 1.01, 1.02, 1.01, 0.99], [1.10, 1.11, 1.12, 1.11, 1.10]) == "slower"
    assert judged([1.10, 1.11, 1.12, 1.11, 1.10], [1.00, 1.01, 1.02, 1.01, 0.99]) == "faster"
    assert judged([1.0, 1.3, 0.8, 1.2, 0.9], [1.10, 1.11, 1.12, 1.11, 1.10]) == "same"
    assert judged([1.0] * 5, [1.029] * 5) == "same"  # steady steps, but no more than processes differ
    assert judged([1.0] * 5, [1.04] * 5) == "slower"
    assert judged([1.0, 1.06, 1.0], [1.05, 1.08, 1.09]) == "same"  # of three steps the whole ranges count


def test_a_repeat_that_lies_among_the_others_takes_the_verdict_back():
    steady = [[1.0] * 5, [1.0] * 5, [1.0] * 5]
    assert judge_speed(steady, [[1.2] * 5, [1.2] * 5, [1.2] * 5]) == "slower"
    assert judge_speed(steady, [[1.2] * 5, [1.2] * 5, [0.9] * 5]) == "same"


@pytest.mark.parametrize(("steps", "noise", "at_most"), [(3, 0.03, 0.03), (5, 0.03, 0.08), (10, 0.1, 0.01)])
def test_noise_alone_is_rarely_called_a_change(steps, noise, at_most):
    draw = random.Random(0)
    trials = [[[draw.gauss(1, noise) for _ in range(steps)] for _ in "ab"] for _ in range(1000)]
    assert sum(judged(*trial) != "same" for trial in trials) <= at_most * 1000


def test_a_slowdown_beyond_the_noise_is_seen():
    draw = random.Random(0)
    trials = [[[draw.gauss(mean, 0.01) for _ in range(5)] for mean in (1.0, 1.1)] for _ in range(200)]
    assert all(judged(*trial) == "slower" for trial in trials)


def test_times_of_other_machines_or_too_few_steps_are_not_judged(pair):
    a, b = pair
    edit(b, D4, lambda cell: cell.details["step_seconds"].update(train_step=[9.0, 9.1, 9.2]))
    assert step(compare(a, b)).speed == "slower"
    assert any("sweep.repeats" in note for note in compare(a, b).notes)
    assert not any("sweep.repeats" in note for note in compare(a, a).notes)
    edit(b, D4, lambda cell: cell.details["step_seconds"].update(train_step=[9.0, 9.1]))
    assert (step(compare(a, b)).speed, step(compare(a, b)).seconds[1]) == ("unknown", 9.05)
    environment = json.loads((b / "environment.json").read_text())
    write_json(b / "environment.json", {**environment, "continued_in": [{**environment, "gpu": "NVIDIA L4"}]})
    found = compare(a, b)
    assert {s.speed for s in found.steps} == {"unknown"}
    told = "Times are not compared: the machines differ (gpu NVIDIA H100 80GB HBM3 and NVIDIA L4)."
    assert told in found.notes
    assert f"- {told}" in to_page(found)
    (b / "environment.json").unlink()
    assert any("does not say on which machine" in note for note in compare(a, b).notes)


def test_quality_is_compared_under_one_name_and_one_extractor_only(made, tmp_path):
    genuine = make_run(tmp_path / "genuine", device="cuda", dividers=(1, 4), genuine=True)
    columns = {(c.column, c.verdict) for c in compare(made["cuda"], genuine).quality}
    assert ("precision", "not comparable") in columns
    assert ("held_out_loss", "same") in columns
    assert not any("distance" in column for column, _ in columns)


@pytest.mark.parametrize(
    ("column", "value", "verdict"),
    [
        ("random_features_frechet_distance", 60.0, "worse"),
        ("random_features_frechet_distance", 50.0, "better"),
        ("precision", 0.7, "better"),
        ("recall", 0.3, "worse"),
        ("seam_score", 1.2, "better"),
        ("seam_score", 0.8, "better"),
        ("seam_score", 0.7, "worse"),
        ("held_out_loss", 0.2, "worse"),
    ],
)
def test_each_figure_knows_which_way_is_better(pair, column, value, verdict):
    a, b = pair
    edit(b, "d4-quality", lambda cell: setattr(cell.rows[0], column, value))
    found = compare(a, b)
    verdicts = {c.column: c.verdict for c in found.quality if c.cell == "d4-quality"}
    assert verdicts.pop(column) == verdict
    assert set(verdicts.values()) == {"same"}
    assert any("trained once" in note for note in found.notes)
    edit(b, "d4-quality", lambda cell: setattr(cell.rows[0], "num_images", 5000))
    reasons = {c.reason for c in compare(a, b).quality if c.column == "precision" and c.cell == "d4-quality"}
    assert reasons == {"the numbers of images scored differ"}


def test_a_change_within_its_interval_is_not_decided(pair):
    """Of other samples (another seed) 4% of the distance are noise; of the same ones, paired, they are not."""
    a, b = pair

    def change(cell):
        name, row = "random_features_frechet_distance", cell.rows[0]
        value = getattr(row, name) * 1.04
        setattr(row, name, value)
        wobble = [0.01 * math.cos(5 * group) for group in range(20)]
        cell.details["metrics"] |= {name: value, "left_out": {name: [value * (1 + w) for w in wobble]}}
        row.seed = 1

    edit(b, "d4-quality", change)
    found = next(c for c in compare(a, b).quality if c.cell == "d4-quality" and "frechet" in c.column)
    assert (found.verdict, found.reason.split()[-4:]) == ("not decided", ["images", "would", "decide", "it"])
    number = int(found.reason.split()[1].replace(",", ""))
    assert 1000 < number < 100_000

    def paired(cell):
        name, before = "random_features_frechet_distance", next(c for c in read_cells(a) if c.id == "d4-quality")
        cell.rows[0].seed = 0
        left_out = before.details["metrics"]["left_out"][name]
        cell.details["metrics"]["left_out"] = {name: [1.04 * v for v in left_out]}

    edit(b, "d4-quality", paired)
    assert next(c for c in compare(a, b).quality if c.cell == "d4-quality" and "frechet" in c.column).verdict == "worse"


def test_losses_of_other_objectives_are_not_compared(pair):
    a, b = pair
    a = shutil.copytree(a, b.parent / "a")
    for run, objective in ((a, "epsilon, l1"), (b, "epsilon, l2")):
        edit(run, "d4-quality", lambda cell, o=objective: cell.details.update(objective=o))
    found = next(c for c in compare(a, b).quality if c.cell == "d4-quality" and c.column == "held_out_loss")
    assert (found.verdict, found.reason) == ("not comparable", "the objectives differ")


def test_trainings_whose_ranges_overlap_do_not_differ(pair):
    a, b = pair
    a = shutil.copytree(a, b.parent / "a")
    for run, losses in ((a, (0.18, 0.20)), (b, (0.19, 0.21))):
        for i, loss in enumerate(losses):
            cell = next(c for c in read_cells(run) if c.id == "d4-quality")
            cell.id, cell.rows[0].held_out_loss = f"d4-quality-s{i}", loss
            write_cell(run, cell)
        (run / "cells" / "d4-quality.json").unlink()
    verdict = next(c for c in compare(a, b).quality if c.cell.startswith("d4") and c.column == "held_out_loss")
    assert (verdict.verdict, verdict.values) == ("not decided", (0.19, 0.2))
    assert verdict.reason.endswith("trainings of each would decide it")


def test_differing_settings_and_software_are_told(pair):
    a, b = pair
    text = (b / "experiment.toml").read_text()
    (b / "experiment.toml").write_text(text.replace("num_steps = 500", "num_steps = 900"))
    environment = json.loads((b / "environment.json").read_text())
    write_json(b / "environment.json", {**environment, "torch": "2.16.0"})
    notes = compare(a, b).notes
    assert "Differing settings: training.num_steps 500 → 900." in notes
    assert "Differing software: torch 2.15.0 → 2.16.0." in notes


def test_json_markdown_and_terminal_say_the_same(pair, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    a, b = pair
    grow(b, D4, "train_step", "peak_allocated_bytes", lambda v: v + v // 50)
    grow(b, D4, "sample_step", "peak_allocated_bytes", lambda v: v + 512)
    code, out, said = command(capsys, a, b, "--max-increase", "1%", "--json")
    told = json.loads(out)
    assert (code, told["passed"], len(told["failures"])) == (1, False, 1)
    assert said == f"pbbench: {told['failures'][0]}\n"
    assert told == json.loads(json.dumps(to_json(compare(a, b, "1%"))))
    line = next(s for s in told["steps"] if (s["cell"], s["phase"]) == (D4, "train_step"))
    assert line["peak_allocated_bytes"]["change"] == pytest.approx(0.02, abs=1e-6)
    assert (line["patch_divider"], line["gated_by"], line["speed"]) == (4, "peak_allocated_bytes", "same")
    code, markdown, _ = command(capsys, a, b, "--max-increase", "1%", "--markdown")
    assert code == 1
    assert "| 4 | index | train | 3.06 | 3.12 | +2.0% |" in markdown
    assert "- Failed: d4-p32-b32-no train_step: peak_allocated_bytes 3" in markdown
    assert "| 4 | index | sample | 0.70 | 0.70 | +512 B |" in markdown
    code, terminal, _ = command(capsys, a, b)
    assert code == 0
    assert "+2.0%" in terminal
    assert "+512 B" in terminal
    assert command(capsys, a, b, "--json", "--markdown")[0] == 2
