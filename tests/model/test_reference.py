"""Weights and numbers of the released code: the small set in fixtures/, and the full files where they are at hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_unet import plain_unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbbench.errors import InputError
from pbbench.model.diffusion import Diffusion
from pbbench.model.reference import load_reference, parse_reference_config, read_reference_checkpoint, reference_name

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Recorded:
    """One file the released code wrote: its configuration, weights, gradients and values."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
        self.values = load_file(path)
        self.weights = {key.removeprefix("param."): v for key, v in self.values.items() if key.startswith("param.")}


@pytest.fixture(params=["fixture", "patch_divider_1", "patch_divider_2", "patch_divider_4"])
def recorded(request: pytest.FixtureRequest, fixtures: Path) -> Recorded:
    if request.param == "fixture":
        return Recorded(fixtures / "patch_divider_2.safetensors")
    return Recorded(request.getfixturevalue("shared") / "reference" / f"{request.param}.safetensors")


@pytest.fixture
def small(fixtures: Path) -> Recorded:
    return Recorded(fixtures / "patch_divider_2.safetensors")


def thinned(gradient: Tensor, like: Tensor) -> Tensor:
    """The full files hold whole gradients; the fixture every ceil(n / 16)-th value of the flattened tensor."""
    return gradient if gradient.shape == like.shape else gradient.flatten()[:: -(-gradient.numel() // 16)]


@pytest.mark.parametrize("patch_batch_size", [None, 2, 3])
def test_outputs_loss_gradients_and_posterior_are_the_released_ones(recorded: Recorded, patch_batch_size: int | None) -> None:
    values = recorded.values
    model = load_reference(recorded.weights, recorded.config)
    diffusion = Diffusion(parse_reference_config(recorded.config)[1])
    x_start, t, noise = values["x_start"], values["timestep"], values["noise"]

    x_t = diffusion.q_sample(x_start, t, noise)
    output = model(x_t, t, patch_batch_size)
    loss = diffusion.loss(output, diffusion.target(x_start, t, noise))
    loss.backward()
    torch.testing.assert_close(output, values["model_output"], **TOLERANCE)
    torch.testing.assert_close(loss, values["loss"].squeeze(), **TOLERANCE)
    for name, parameter in model.named_parameters():
        expected = values[f"grad.{reference_name(name)}"]
        assert parameter.grad is not None
        torch.testing.assert_close(thinned(parameter.grad, expected), expected, msg=name, **TOLERANCE)

    implied = diffusion.predict_x_start(output.detach(), x_t, t).clamp(-1, 1)
    mean, _, log_variance = diffusion.posterior(implied, x_t, t)
    torch.testing.assert_close(mean, values["posterior_mean"], **TOLERANCE)
    torch.testing.assert_close(log_variance, values["posterior_log_variance"], **TOLERANCE)
    for key in [key for key in values if key.startswith("schedule.")]:
        torch.testing.assert_close(getattr(diffusion, key.removeprefix("schedule.")), values[key], rtol=1e-6, atol=0)
    if "x_t" in values:
        torch.testing.assert_close(x_t, values["x_t"], **TOLERANCE)


def test_the_plain_network_is_the_released_one(recorded: Recorded) -> None:
    """The oracle of the other tests is itself held to the released numbers."""
    values = recorded.values
    diffusion = Diffusion(parse_reference_config(recorded.config)[1])
    x_t = diffusion.q_sample(values["x_start"], values["timestep"], values["noise"])
    out = plain_unet(recorded.weights, x_t, values["timestep"], recorded.config["patch_divider"])
    torch.testing.assert_close(out, values["model_output"], **TOLERANCE)


def test_every_released_weight_has_one_place(small: Recorded) -> None:
    model = load_reference(small.weights, small.config)
    names = [reference_name(name) for name, _ in model.named_parameters()]
    assert len(set(names)) == len(names)
    assert set(names) == {key for key in small.weights if "_embedder" not in key}


# What load_reference takes and refuses


def test_prefix_and_foreign_entries_do_not_matter(small: Recorded) -> None:
    state = {f"denoise_fn.{key}": value for key, value in small.weights.items()}
    state |= {"betas": torch.zeros(1000), "posterior_variance": torch.zeros(1000)}
    prefixed, plain = load_reference(state, small.config), load_reference(small.weights, small.config)
    for (name, a), (_, b) in zip(prefixed.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_missing_weights_are_named(small: Recorded) -> None:
    del small.weights["_patched_decoder.mid_attn.fn.norm.g"]
    with pytest.raises(InputError, match=r"lack: _patched_decoder\.mid_attn\.fn\.norm\.g; check"):
        load_reference(small.weights, small.config)


def test_weights_of_another_shape_are_named(small: Recorded) -> None:
    with pytest.raises(
        InputError, match=r"do not fit: _embedding\._pos_embedding_layer\.0\.weight is \(8, 4\), expected \(8, 16\)"
    ):
        load_reference(small.weights, small.config | {"patch_divider": 4})


def test_weights_of_a_deeper_model_are_refused(small: Recorded) -> None:
    """Without the check, the encoder's first level alone would load from these weights, and quietly."""
    extra = {"_patched_encoder._downsLayers.2.3.weight": torch.zeros(32, 32, 4, 4)}
    with pytest.raises(
        InputError, match=r"more than the configuration describes: _patched_encoder\._downsLayers\.2\.3\.weight"
    ):
        load_reference(small.weights | extra, small.config)


# Configurations


def test_omitted_fields_take_the_released_defaults() -> None:
    model, diffusion = parse_reference_config({"trainer": {}, "model": {"dim": 64, "init_dim": None}, "diffusion": {}})
    assert (model.dim, model.dim_mults, model.image_size, model.patch_divider) == (64, (1, 2, 4, 8), 128, 4)
    assert (model.channels, model.out_channels, model.init_dim, model.resnet_block_groups) == (3, None, None, 8)
    assert (diffusion.num_train_timesteps, diffusion.loss_type, diffusion.prediction_type) == (1000, "l1", "epsilon")


def test_given_fields_are_read_and_unknown_ones_ignored() -> None:
    model, diffusion = parse_reference_config(
        {
            "model": {"dim": 16, "dim_mults": [1, 2], "patch_divider": 2, "image_size": 64, "out_dim": 6, "novel": 1},
            "diffusion": {"timesteps": 500, "loss_type": "l2", "objective": "pred_x0", "image_size": 999},
        }
    )
    assert (model.dim, model.dim_mults, model.patch_divider, model.image_size, model.out_channels) == (16, (1, 2), 2, 64, 6)
    assert (diffusion.num_train_timesteps, diffusion.loss_type, diffusion.prediction_type) == (500, "l2", "sample")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"patch_divider": 3}}, "divisible by 24"),
        ({"model": {"dim": -8}}, "model.dim"),
        ({"model": {"dim_mults": "wide"}}, "model.dim_mults"),
        ({"model": {"learned_variance": True}}, "learned_variance"),
        ({"model": [1]}, "must be JSON objects"),
        ({"model": {}, "diffusion": {"objective": "pred_score"}}, "known are pred_noise, pred_x0"),
        ({"model": {}, "diffusion": {"loss_type": "huber"}}, "diffusion.loss_type"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_reference_config(config)


# Checkpoint files


def test_a_trainers_checkpoint_is_read(small: Recorded, tmp_path: Path) -> None:
    state = {f"denoise_fn.{key}": value for key, value in small.weights.items()}
    ema = {key: value + 1 for key, value in state.items()}
    torch.save({"step": 7, "model": state, "ema": ema, "opt": {"state": {}}, "scaler": None}, tmp_path / "model-last.pt")
    checkpoint = read_reference_checkpoint(tmp_path / "model-last.pt")
    assert checkpoint["step"] == 7
    key = "denoise_fn._patched_encoder._init_conv.bias"
    assert torch.equal(checkpoint["ema"][key], checkpoint["model"][key] + 1)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_alone_are_read(suffix: str, small: Recorded, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(small.weights, path) if suffix == ".safetensors" else torch.save(small.weights, path)
    checkpoint = read_reference_checkpoint(path)
    assert checkpoint["step"] is None
    assert checkpoint["ema"].keys() == checkpoint["model"].keys() == small.weights.keys()


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("modern", [True, False])
def test_a_checkpoint_that_would_run_code_is_not_opened(modern: bool, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "executed")
    path = tmp_path / "model-last.pt"
    torch.save({"model": trap}, path) if modern else path.write_bytes(pickle.dumps({"model": trap}))
    with pytest.raises(InputError, match="could execute code"):
        read_reference_checkpoint(path)
    assert not trap.marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "no checkpoint at"),
        ("empty.pt", b"", "cannot read"),
        ("noise.pt", b"\x80\x02garbage", "is not a checkpoint|cannot read"),
        ("noise.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!", "cannot read"),
        ("list.pt", [torch.zeros(2)], "holds a list"),
        ("foreign.pt", {"model": {"lr": 0.1}, "ema": {}}, "holds no weights under"),
        ("numbers.pt", {"step": 3}, "holds no weights under"),
    ],
)
def test_what_is_no_checkpoint_is_refused(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as raised:
        read_reference_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_the_released_checkpoint_gives_its_ema_output(shared: Path) -> None:
    folder = shared / "reference" / "checkpoint"
    checkpoint = read_reference_checkpoint(folder / "model-last.pt")
    config = json.loads((folder / "config_patch_divider=2.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    model = load_reference(checkpoint["ema"], config["model"])
    with torch.no_grad():
        out = model(expected["x_t"], expected["timestep"], patch_batch_size=3)
    torch.testing.assert_close(out, expected["ema_model_output"], **TOLERANCE)
    trained = load_reference(checkpoint["model"], config["model"])
    assert checkpoint["step"] == 2
    assert trained.config == model.config
