"""Settings: merged, checked, refused by name with what would fit."""

import pytest

from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment, differences, known_keys, parse_experiment
from pbbench.experiment.presets import load_experiment, parse_override, preset_names
from pbbench.experiment.settings import ModelConfig, resolve_patch_batch_size


def load(*overrides, preset="cpu"):
    return load_experiment(preset=preset, overrides=[parse_override(text) for text in overrides])


@pytest.mark.parametrize("name", preset_names())
def test_every_experiment_file_loads_and_survives_a_round_trip(name, tmp_path):
    experiment = load_experiment(preset=name)
    (tmp_path / "again.toml").write_text(experiment.to_toml())
    assert load_experiment(tmp_path / "again.toml") == experiment
    for divider in experiment.sweep.dividers:
        assert experiment.with_divider(divider).model.patch_divider == divider


def test_the_paper_files_are_the_paper():
    experiment = load_experiment(preset="paper-celeba-128")
    assert (experiment.model.dim, experiment.model.dim_mults, experiment.model.size) == (128, (1, 2, 4, 8), (128, 128))
    assert (experiment.training.num_steps, experiment.training.batch_size) == (100_000, 32)
    assert (experiment.training.learning_rate, experiment.training.ema_decay) == (1e-4, 0.995)
    assert experiment.sampling.sampler == "ddpm"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.dim=-3", "model.dim"),
        ("model.dim=20", "for example 16"),
        ("model.image_size=30", "image_size 32 would fit"),
        ("model.patch_divider=1000", "patch_divider 1, 2, 4, 8"),
        ("model.dim_mults=[1,1,1,1,1,1,1]", "at most 6 levels"),
        ("model.dim_mults=[2,4]", "must start with 1"),
        ("model.dim_mults=[]", "model.dim_mults"),
        ("model.patch_divider=x", "'x'"),
        ("training.num_stesp=3", "did you mean training.num_steps"),
        ("training.patch_batch_size=0", "'index'"),
        ("training.patch_batch_size=some", "'some'"),
        ("training.learning_rate=nan", "training.learning_rate"),
        ("training.ema_decay=1.5", "training.ema_decay"),
        ("sampling.sampler=euler", "'ddpm', 'ddim' or 'dpm++'"),
        ("quality.metrics=[]", "quality.metrics"),
        ("sweep.dividers=[1,-2]", "-2"),
        ("model=3", "model"),
        ("nonsense=1", "unknown key nonsense"),
        ("name='a/b'", "name"),
        ("just words", "section.key=value"),
    ],
)
def test_a_bad_setting_is_refused_by_name_in_one_line(override, told):
    with pytest.raises(InputError) as caught:
        load(override)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a = = 3", b"[model]\ndim = 'wide'\n"])
def test_a_malformed_file_is_refused(tmp_path, content):
    file = tmp_path / "e.toml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"e\.toml"):
        load_experiment(file)


def test_an_absent_file_an_unknown_preset_and_both_at_once_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        load_experiment(tmp_path / "none.toml")
    with pytest.raises(InputError, match=r"there are .*cpu"):
        load_experiment(preset="tpu")
    with pytest.raises(InputError, match="exclude"):
        load_experiment(tmp_path / "none.toml", preset="cpu")


def test_overrides_are_read_as_toml_and_words_need_no_quotes():
    experiment = load(
        "training.learning_rate=1e-3", "data.source=photos.zip", "model.image_size=[32, 64]", "data.horizontal_flip=false"
    )
    assert experiment.training.learning_rate == 1e-3
    assert experiment.data.source == "photos.zip"
    assert experiment.model.size == (32, 64)
    assert not experiment.data.horizontal_flip


def test_a_sweep_need_not_name_a_divider_of_its_own():
    values = {"model": {"image_size": 24, "dim_mults": [1, 2, 4]}, "sweep": {"dividers": [1, 2, 3, 6]}}
    assert parse_experiment(values, "test").model.patch_divider == 1


@pytest.mark.parametrize(("setting", "expected"), [(None, 32), ("all", 32), ("index", 8), (3, 3), (32, 32), (1000, 32)])
def test_the_effective_number_of_patches_a_pass(setting, expected):
    assert resolve_patch_batch_size(setting, batch_size=8, patch_divider=2) == expected


def test_non_square_images_must_fit_both_ways():
    assert ModelConfig(dim=16, dim_mults=(1, 2), image_size=(32, 64), patch_divider=4).patch_size == (8, 16)
    with pytest.raises(ValueError, match="divisible by 8"):
        ModelConfig(dim=16, dim_mults=(1, 2), image_size=(32, 60), patch_divider=4)


def test_differences_name_the_settings():
    assert differences(load(), load("training.num_steps=7")) == [f"training.num_steps: {load().training.num_steps} → 7"]


def test_known_keys_are_settable():
    assert {"seed", "model.dim", "sweep.cell_timeout_seconds"} <= set(known_keys())
    assert all(key.split(".")[0] in Experiment.model_fields for key in known_keys())
