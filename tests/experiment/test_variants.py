"""A fair comparison: variants beside the experiment, several seeds on the same images, equal images or equal time."""

import tomllib
from typing import Any

import pytest

from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.experiment.presets import load_experiment, parse_override
from pbbench.sweep.grid import plan, resolve
from pbbench.training.train import train

TINY = """
name = "tiny"
device = "cpu"
[model]
dim = 8
dim_mults = [1, 2]
image_size = 16
[training]
batch_size = 4
num_steps = 6
sample_every = 0
[data]
num_images = 40
num_workers = 0
[sweep]
dividers = [1, 2]
patch_batch_sizes = ["all"]
"""


def tiny(more: str = "", **sweep: Any) -> Experiment:
    values = tomllib.loads(TINY + more)
    values["sweep"] |= sweep
    return parse_experiment(values, "test")


ABLATIONS = """
[sweep.variants."no position"]
model.position_conditioning = false
[sweep.variants.bordered]
"model.border_context" = true
[sweep.variants.accumulated]
dividers = [1]
training = { batch_size = 2, gradient_accumulation_steps = 2 }
"""


def test_every_variant_has_cells_of_its_own_at_its_dividers() -> None:
    cells = plan(tiny(ABLATIONS))
    assert [cell.id for cell in cells if not cell.variant] == ["d1-p4-b4-no", "d2-p16-b4-no", "d1-quality", "d2-quality"]
    assert [cell.id for cell in cells if cell.variant == "no position"] == [
        "no_position-d1-p4-b4-no",
        "no_position-d2-p16-b4-no",
        "no_position-d1-quality",
        "no_position-d2-quality",
    ]
    rivals = [cell for cell in cells if cell.variant == "accumulated"]
    assert [cell.id for cell in rivals] == ["accumulated-d1-p2-b2-no", "accumulated-d1-quality"]
    assert {cell.batch_size for cell in rivals} == {2}
    assert len({cell.id for cell in cells}) == len(cells)
    assert {cell.axes()["variant"] for cell in cells} == {"", "no position", "bordered", "accumulated"}


def test_a_cells_experiment_is_that_of_its_variant_and_resolving_twice_changes_nothing() -> None:
    experiment = tiny(ABLATIONS, seeds=[5, 7])
    for cell in plan(experiment):
        found = resolve(experiment, cell)
        assert found.model.patch_divider == cell.patch_divider
        assert found.model.position_conditioning is (cell.variant != "no position")
        assert found.model.border_context is (cell.variant == "bordered")
        assert found.training.gradient_accumulation_steps == (2 if cell.variant == "accumulated" else 1)
        again = parse_experiment(found.model_dump(mode="json"), "a job")  # as a worker gets it
        assert resolve(again, cell) == found
        assert found.seed == (0 if cell.seed is None else cell.seed)
        assert found.data_seed == 0  # whatever a training starts from, the images are the same


def test_a_variant_survives_the_file_it_is_written_to(tmp_path: Any) -> None:
    (tmp_path / "resolved.toml").write_text(tiny(ABLATIONS, seeds=[1]).to_toml())
    assert load_experiment(tmp_path / "resolved.toml") == tiny(ABLATIONS, seeds=[1])


def test_a_variant_can_be_given_on_the_command_line() -> None:
    given = parse_override("sweep.variants.narrow={model.dim=16, dividers=[1]}")
    assert load_experiment(preset="cpu", overrides=[given]).at(1, "narrow").model.dim == 16


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ({"a": {"model.positoin_conditioning": False}}, 'sweep.variants."a": unknown key model.positoin_conditioning'),
        ({"a": {"model.dim": 12}}, 'sweep.variants."a": model: dim 12 does not fit'),
        ({"a/b": {"model.dim": 16}}, "'a/b' is no name"),
        ({" a": {"model.dim": 16}}, "' a' is no name"),
        ({"a b": {"model.dim": 16}, "A_b": {"model.dim": 24}}, "share their files"),
        ({"a": {}}, "'a' sets nothing"),
        ({"a": {"dividers": [1]}}, "'a' sets nothing"),
        ({"a": {"model.dim": 16, "dividers": []}}, r"dividers \[\]"),
        ({"a": {"model.dim": 16, "dividers": [1.5]}}, r"dividers \[1.5\]"),
        ({"a": {"data.num_images": 3}}, "cannot set data.num_images"),
        ({"a": {"model": {"patch_divider": 2}}}, "give the variant dividers"),
        ({"a": {"model.image_size": 32}}, "another sweep"),
        ({"a": 3}, "sweep.variants.a"),
    ],
)
def test_what_a_variant_may_not_be_is_refused_in_a_line_that_names_it(variant: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as refused:
        tiny(variants=variant)
    assert "\n" not in str(refused.value)


def test_a_variant_is_checked_at_each_of_its_dividers() -> None:
    deep = {"deep": {"model.dim_mults": [1, 2, 2, 2]}}
    with pytest.raises(InputError, match=r'sweep\.variants\."deep" at divider 4'):
        plan(tiny(variants=deep, dividers=[1, 2, 4]))
    plan(tiny(variants={"deep": {**deep["deep"], "dividers": [1]}}, dividers=[1, 2, 4]))


def test_where_images_are_held_equal_no_variant_sees_others() -> None:
    fewer = {"fewer": {"training.batch_size": 3}}
    with pytest.raises(InputError, match=r"18 images and the experiment on 24; give it training\.num_steps = 8"):
        plan(tiny(variants=fewer))
    plan(tiny(variants={"fewer": {"training.batch_size": 3, "training.num_steps": 8}}))
    plan(tiny(variants={"fewer": {"training.batch_size": 3}}, quality=False))


def test_seeds_multiply_trainings_and_leave_measurements_alone() -> None:
    one, three = plan(tiny()), plan(tiny(seeds=[3, 0, 3, 1]))
    assert [cell for cell in three if cell.kind == "measure"] == [cell for cell in one if cell.kind == "measure"]
    assert [cell.id for cell in three if cell.kind == "quality"] == [
        f"d{d}-quality-s{seed}" for d in (1, 2) for seed in (3, 0, 1)
    ]


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ({"equal": "seconds"}, "equal_seconds"),
        ({"equal_seconds": 3}, "equal_seconds"),
        ({"equal": "luck"}, "'images', 'seconds' or 'memory'"),
        ({"checkpoints": {"1": "x"}, "seeds": [1]}, "trained already"),
    ],
)
def test_what_does_not_go_together_is_refused(sweep: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        tiny(**sweep)


def test_where_time_is_held_equal_a_training_ends_by_the_clock_and_can_go_on(tmp_path: Any) -> None:
    experiment = tiny(equal="seconds", equal_seconds=1.0)
    cell = next(cell for cell in plan(experiment) if cell.kind == "quality")
    found = resolve(experiment, cell)
    assert resolve(experiment, plan(experiment)[0]).training == experiment.training  # a measured step has no budget
    told: list[dict[str, Any]] = []
    result = train(found, tmp_path / "run", progress=told.append)
    assert result.status == "ok"
    assert 1.0 <= result.seconds < 20
    assert result.steps > 2
    assert result.images_seen == 4 * result.steps
    assert told[-1]["step"] == told[-1]["num_steps"] == result.steps
    assert all(state["num_steps"] < 10**6 for state in told[1:])  # what the clock allows, not the limit of steps
    again = train(found, tmp_path / "run", resume=True)
    assert (again.steps, again.images_seen) == (result.steps, result.images_seen)
    longer = found.model_copy(update={"training": found.training.model_copy(update={"max_seconds": result.seconds + 0.5})})
    assert train(longer, tmp_path / "run", resume=True).steps > result.steps


def test_the_ablations_file_plans_each_conditioning_without_the_other() -> None:
    experiment = load_experiment(preset="ablations")
    cells = plan(experiment)
    variants = ["", "no position", "no global content", "border context"]
    trained = [(cell.variant, cell.patch_divider) for cell in cells if cell.kind == "quality"]
    assert trained == [(variant, divider) for variant in variants for divider in (2, 4)]
    assert [(c.variant, c.patch_divider) for c in cells if c.kind == "measure"] == trained
    switched = {c.variant: resolve(experiment, c).model for c in cells}
    plain = switched.pop("")
    changes = {name: [k for k, v in model if v != getattr(plain, k)] for name, model in switched.items()}
    assert changes == {
        "no position": ["position_conditioning"],
        "no global content": ["global_content"],
        "border context": ["border_context"],
    }


def test_trainings_from_several_seeds_start_elsewhere_on_the_same_images() -> None:
    from pbbench.data.images import training_and_held_out
    from pbbench.training.setup import build_network

    experiment = tiny(seeds=[0, 7])
    one, other = (resolve(experiment, cell) for cell in plan(experiment) if cell.kind == "quality" and cell.patch_divider == 1)
    assert training_and_held_out(one)[0].fingerprint() == training_and_held_out(other)[0].fingerprint()
    weights = [next(build_network(e).parameters()) for e in (one, other)]
    assert not weights[0].equal(weights[1])


def test_a_scored_cell_says_which_variant_seed_and_budget_it_is_of(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pbbench.quality.fid import MissingWeightsError
    from pbbench.sweep.quality_cell import train_and_score

    def without_weights(*_: Any, **__: Any) -> None:
        raise MissingWeightsError("none in this test")

    small = {"num_images": 8, "metrics": ["fid"], "reference_grid": False}
    given = tiny(ABLATIONS, seeds=[7], equal="seconds", equal_seconds=0.1).model_dump(mode="json")
    experiment = parse_experiment(given | {"quality": small, "sampling": {"sampler": "ddim", "num_inference_steps": 1}}, "test")
    cell = next(cell for cell in plan(experiment) if cell.id == "bordered-d2-quality-s7")
    told: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr("pbbench.quality.fid.resolve_inception_weights", without_weights)
    train_and_score(resolve(experiment, cell), cell, "cpu", tmp_path, lambda event, **values: told.update({event: values}))
    row = told["row"]["row"]
    assert (row["variant"], row["patch_divider"], row["seed"]) == ("bordered", 2, 0)  # the samples' seed
    assert (told["detail"]["training_seed"], told["detail"]["equal"]) == (7, "seconds")
    assert row["images_seen"] == 4 * told["detail"]["trained_steps"] > 0
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir() if folder.name != "statistics"] == [cell.id]
