"""Checkpoints: read back as written, whole after a kill at any moment, and one clear line for every folder that is not one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment
from pbbench.experiment.settings import ModelConfig
from pbbench.model import kernels
from pbbench.model.unet import PatchUNet
from pbbench.training import checkpoint as module
from pbbench.training.checkpoint import (
    checkpoints_of,
    find_checkpoint,
    load_model,
    load_training_state,
    prune,
    read_config,
    step_folder,
    write_checkpoint,
)
from pbbench.training.ema import ExponentialMovingAverage
from pbbench.training.setup import build_network


@pytest.fixture
def experiment(tiny_config: ModelConfig) -> Experiment:
    return Experiment(name="saved", model=tiny_config)


@pytest.fixture
def networks(experiment: Experiment) -> tuple[PatchUNet, PatchUNet]:
    """The weights and their average, which differ."""
    return PatchUNet(experiment.model), PatchUNet(experiment.model)


@pytest.fixture
def write(networks: tuple[PatchUNet, PatchUNet], experiment: Experiment) -> Callable[..., Path]:
    def write(folder: Path, step: int = 7, **more: Any) -> Path:
        model, average = networks
        return write_checkpoint(
            folder, model=model, ema_model=average, experiment=experiment, step=step, images_seen=step * 4, **more
        )

    return write


def test_read_back_as_written(
    tmp_path: Path, write: Callable[..., Path], networks: tuple[PatchUNet, PatchUNet], experiment: Experiment
) -> None:
    folder = write(tmp_path / "new" / "kept")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "ema.safetensors", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["kept"]
    for which, expected in zip(("model", "ema"), networks, strict=True):
        loaded, its_experiment = load_model(folder, "cpu", which)  # type: ignore[arg-type]
        assert its_experiment == experiment
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        for (name, mine), theirs in zip(loaded.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs), name
    assert torch.equal(load_model(folder)[0].stem.weight, networks[1].stem.weight)  # the average, unless asked otherwise
    config = read_config(folder)
    assert (config["step"], config["images_seen"], config["schema_version"]) == (7, 28, 1)


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path, write: Callable[..., Path]) -> None:
    write(tmp_path / "kept")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_model(tmp_path / "kept")
    assert torch.equal(torch.rand(4), expected)


def test_training_state_comes_back_to_the_bit(
    tmp_path: Path, write: Callable[..., Path], networks: tuple[PatchUNet, PatchUNet], experiment: Experiment
) -> None:
    model, _ = networks
    adam = torch.optim.Adam(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    adam.step()
    folder = write(tmp_path / "kept", optimizer=adam, state={"scaler": {"scale": 4.0}, "loss": 0.25})

    other, average = PatchUNet(experiment.model), PatchUNet(experiment.model)
    restored = torch.optim.Adam(other.parameters(), fused=True)
    state = load_training_state(folder, model=other, ema_model=average, optimizer=restored)
    assert state == {"step": 7, "images_seen": 28, "scaler": {"scale": 4.0}, "loss": 0.25}
    before, after = adam.state_dict(), restored.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, values in before["state"].items():
        assert set(values) == set(after["state"][number]) == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in values.items():
            assert torch.equal(value, after["state"][number][key])
            assert value.dtype == after["state"][number][key].dtype
    assert torch.equal(other.stem.weight, model.stem.weight)
    assert torch.equal(average.stem.weight, networks[1].stem.weight)


@pytest.mark.parametrize(("written", "read"), [(True, False), (False, True), (True, True)])
def test_a_checkpoint_does_not_say_how_weights_lay(tmp_path: Path, experiment: Experiment, written: bool, read: bool) -> None:
    """In channels_last, as on a GPU, or not: the same files, and what is read lies as it does there."""
    folders, networks = [], []
    for fused in (written, False):
        torch.manual_seed(3)
        with kernels.everywhere() if fused else kernels.nowhere():
            model = build_network(experiment)
            average = ExponentialMovingAverage(model, experiment.training).model
        adam = torch.optim.Adam(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        adam.step()
        more: dict[str, Any] = {"optimizer": adam, "state": {}, "step": 1, "images_seen": 1}
        folder = tmp_path / str(len(folders))
        folders.append(write_checkpoint(folder, model=model, ema_model=average, experiment=experiment, **more))
        networks.append(model)
    for name in ("model", "ema", "optimizer"):
        assert (folders[0] / f"{name}.safetensors").read_bytes() == (folders[1] / f"{name}.safetensors").read_bytes()
    with kernels.everywhere() if read else kernels.nowhere():
        loaded, other = load_model(folders[0], which="model")[0], build_network(experiment)
    restored = torch.optim.Adam(other.parameters())
    load_training_state(folders[0], model=other, ema_model=loaded, optimizer=restored)
    assert loaded.stem.weight.is_contiguous(memory_format=torch.channels_last) is read
    for mine, theirs in zip(other.parameters(), networks[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert restored.state[mine]["exp_avg"].stride() == mine.stride()


def test_weights_alone_cannot_be_trained_on(
    tmp_path: Path, write: Callable[..., Path], networks: tuple[PatchUNet, PatchUNet]
) -> None:
    folder = write(tmp_path / "kept")
    model, average = networks
    with pytest.raises(InputError, match="holds weights only"):
        load_training_state(folder, model=model, ema_model=average, optimizer=torch.optim.Adam(model.parameters()))


def test_a_run_is_read_at_its_latest_checkpoint_and_keeps_two(tmp_path: Path, write: Callable[..., Path]) -> None:
    for step in (5, 10, 100, 99_999_999, 100_000_000):
        write(step_folder(tmp_path, step), step)
        prune(tmp_path)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-99999999", "step-100000000"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-100000000", "step-99999999"]
    assert find_checkpoint(tmp_path).name == "step-100000000"
    assert read_config(tmp_path)["step"] == 100_000_000
    load_model(tmp_path)


def test_what_is_kept_for_good_outlives_the_last_ones(tmp_path: Path, write: Callable[..., Path]) -> None:
    for step in range(1, 12):
        write(step_folder(tmp_path, step), step)
        prune(tmp_path, keep=3, keep_every=4)
    assert [int(path.name[5:]) for path in checkpoints_of(tmp_path)] == [4, 8, 9, 10, 11]


def test_nothing_is_written_over(tmp_path: Path, write: Callable[..., Path]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(InputError, match="exists already"):
            write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    load_model(write(tmp_path / "empty"))


class _KilledError(BaseException):
    """Stands for kill -9: nothing that the program would do afterwards happens (see ``killed_after``)."""


def killed_after(calls: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run ``action`` and end it at its ``calls``-th step that reaches the disk; whether that came to pass."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count >= calls:
                raise _KilledError
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(module, "_write_json", counted(module._write_json))
        patch.setattr(module, "_write_tensors", counted(module._write_tensors))
        try:
            action()
        except _KilledError:
            return True
        return False


def test_a_kill_at_any_moment_leaves_the_last_good_checkpoint(
    tmp_path: Path, write: Callable[..., Path], networks: tuple[PatchUNet, PatchUNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    adam = torch.optim.Adam(networks[0].parameters(), fused=True)
    found = []
    for calls in range(1, 100):
        out = tmp_path / f"run{calls}"
        for step in (1, 2):
            write(step_folder(out, step), step)

        def save(out: Path = out) -> None:
            write(step_folder(out, 3), 3, optimizer=adam, state={})
            prune(out)

        if not killed_after(calls, save, monkeypatch):
            break
        found.append(read_config(out)["step"])
        load_model(out)
        # The next run goes on from there as if nothing had been.
        if found[-1] == 2:
            save()
        prune(out)
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert len(found) > 12  # every file, folder and rename was a moment to be killed at


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def retensored(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, "there is no checkpoint folder at"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_bytes(b"PK")), "is a file, not a checkpoint folder"),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), "holds no checkpoint"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no checkpoint"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "cannot read .*config.json"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot read .*config.json"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "not a JSON object"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot read .*config.json"),
    "another program's": (lambda f: (f / "config.json").write_text('{"_class_name": "UNet2DModel"}'), "not of a pbbench"),
    "newer": (lambda f: rewritten(f / "config.json", lambda c: c.update(schema_version=9)), "update pbbench"),
    "version text": (lambda f: rewritten(f / "config.json", lambda c: c.update(schema_version="x")), "update pbbench"),
    "no step": (lambda f: rewritten(f / "config.json", lambda c: c.pop("step")), "step is None"),
    "experiment text": (lambda f: rewritten(f / "config.json", lambda c: c.update(experiment="x")), "experiment is 'x'"),
    "unknown key": (
        lambda f: rewritten(f / "config.json", lambda c: c["experiment"]["model"].update(hue=1)), "unknown key model.hue",
    ),
    "impossible model": (
        lambda f: rewritten(f / "config.json", lambda c: c["experiment"]["model"].update(dim=-8)), "model.dim",
    ),
    "another width": (
        lambda f: rewritten(f / "config.json", lambda c: c["experiment"]["model"].update(dim=16)), "of another network",
    ),
    "no weights": (lambda f: (f / "ema.safetensors").unlink(), "cannot read .*ema.safetensors"),
    "cut short": (
        lambda f: (f / "ema.safetensors").write_bytes((f / "ema.safetensors").read_bytes()[:-100]), "cannot read .*ema.safe",
    ),
    "no header": (lambda f: (f / "ema.safetensors").write_bytes(b"\x00" * 4), "cannot read .*ema.safe"),
    "endless header": (lambda f: (f / "ema.safetensors").write_bytes(b"\xff" * 64), "cannot read .*ema.safe"),
    "a tensor lacks": (lambda f: retensored(f / "ema.safetensors", lambda t: t.pop("stem.bias")), r"lacks 1 .*\(stem.bias\)"),
    "a tensor more": (
        lambda f: retensored(f / "ema.safetensors", lambda t: t.update(x=torch.ones(1))), r"has unknown 1 .*\(x\)",
    ),
    "a shape": (
        lambda f: retensored(f / "ema.safetensors", lambda t: t.update({"stem.bias": torch.ones(3)})), "stem.bias is F32",
    ),
    "a type": (
        lambda f: retensored(f / "ema.safetensors", lambda t: t.update({"stem.bias": t["stem.bias"].half()})), "is F16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_foreign_folders(tmp_path: Path, write: Callable[..., Path], name: str) -> None:
    damage, message = BROKEN[name]
    folder = write(tmp_path / "kept")
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_pickle_is_never_executed(tmp_path: Path, write: Callable[..., Path]) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    folder = write(tmp_path / "kept")
    for name in ("ema.safetensors", "config.json"):
        (folder / name).write_bytes(pickle.dumps(Hostile()))
        with pytest.raises(InputError, match=f"cannot read .*{name}"):
            load_model(folder)
    assert not (tmp_path / "executed").exists()


def test_only_two_sets_of_weights(tmp_path: Path, write: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="'ema' and 'model'"):
        load_model(write(tmp_path / "kept"), which="best")  # type: ignore[arg-type]
