"""Checkpoints: what a run keeps of its training, written whole or not at all, read back without executing anything.

A checkpoint folder holds ``model.safetensors`` and ``ema.safetensors`` (the weights and their moving average),
``config.json`` (the resolved experiment, the step, the images seen) and, where training may go on from it,
``optimizer.safetensors`` and ``training_state.json``. A run's folder holds them as ``checkpoints/step-00002000``. A folder is
filled under another name, flushed to disk and then renamed, so that one which has its proper name is complete, whenever the
process was killed; ``config.json`` holds the other files' checksums, which tell what a disk has lost or changed since, and a
run is read at its last checkpoint that is whole. There is no pickle anywhere: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pbbench import __version__
from pbbench.errors import InputError, one_line, writing_to
from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.model.placement import arranged
from pbbench.model.unet import PatchUNet
from pbbench.processes import is_main_process
from pbbench.training.optimizers import make_state

FORMAT = "pbbench-checkpoint"
SCHEMA_VERSION = 1
_FILES = {"ema": "ema.safetensors", "model": "model.safetensors"}
_STEP = re.compile(r"step-(\d{8,})")


def write_checkpoint(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module,
    ema_model: nn.Module,
    experiment: Experiment,
    step: int,
    images_seen: int | None,
    optimizer: torch.optim.Optimizer | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder; with ``optimizer`` and ``state`` (plain JSON values) training can go on from it.

    ``optimizer`` (see ``optimizers``) is over ``model.parameters()``, neither of them wrapped; ``images_seen`` None is unknown.
    Raises InputError where ``folder`` already holds something, StorageError where it cannot be written (a full disk).
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; name a new folder for the checkpoint")
    aside = folder.parent / f".{folder.name}.unfinished-{os.getpid()}"
    with writing_to(folder, SafetensorError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            _write_tensors(aside / _FILES["model"], model.state_dict())
            _write_tensors(aside / _FILES["ema"], ema_model.state_dict())
            if optimizer is not None:
                _write_tensors(aside / "optimizer.safetensors", _optimizer_tensors(model, optimizer))
                _write_json(aside / "training_state.json", {"step": step, "images_seen": images_seen, **(state or {})})
            config = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "pbbench": __version__, "step": step}
            config |= {"images_seen": images_seen, "experiment": experiment.model_dump(mode="json")}
            config["sha256"] = {path.name: _checksum(path) for path in sorted(aside.iterdir())}
            _write_json(aside / "config.json", config)
            _flush(aside)
            os.replace(aside, folder)  # an empty folder of that name is replaced, too
            _flush(folder.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return folder


def step_folder(out: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of an optimizer step."""
    return out / "checkpoints" / f"step-{step:08d}"


def checkpoints_of(out: Path) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first."""
    try:
        found = [(int(m[1]), p) for p in (out / "checkpoints").iterdir() if (m := _STEP.fullmatch(p.name))]
        return [path for _, path in sorted(found) if (path / "config.json").is_file()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot look for checkpoints in {out} ({one_line(error)})") from None


def what_is_broken(folder: Path) -> str | None:
    """Why a checkpoint cannot be used: a file absent, cut short or no longer what was written; None where it is whole."""
    try:
        for name, checksum in read_config(folder)["sha256"].items():
            _compare(folder / name, checksum)
    except InputError as error:
        return str(error)
    return None


def last_good(out: Path) -> Path | None:
    """The latest checkpoint of a run that is whole; None where there is no checkpoint at all. Those passed over are told on
    stderr. Raises InputError where none is whole."""
    found = checkpoints_of(out)
    for path in reversed(found):
        why = what_is_broken(path)
        if why is None:
            return path
        if is_main_process():
            print(f"pbbench: {why}; looking for an earlier one", file=sys.stderr)
    if found:
        raise InputError(f"none of the checkpoints in {out / 'checkpoints'} is whole; move them away to begin again")
    return None


def set_aside_broken(out: Path, good: Path | None) -> None:
    """Give what lies after the last good checkpoint another name, so that training can write those steps again."""
    folder = out / "checkpoints"
    for path in sorted(folder.glob("step-*")) if good is not None else ():
        match = _STEP.fullmatch(path.name)
        if match and good is not None and int(match[1]) > int(good.name.removeprefix("step-")):
            aside = folder / f"broken-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def prune(out: Path, keep: int = 2, keep_every: int | None = None) -> None:
    """Remove all but the last ``keep`` checkpoints and those at multiples of ``keep_every`` steps, and what a killed process
    left unfinished."""
    folder = out / "checkpoints"
    for old in checkpoints_of(out)[:-keep]:
        if keep_every is not None and int(old.name.removeprefix("step-")) % keep_every == 0:
            continue
        os.replace(old, folder / f".{old.name}.removed")  # a kill in mid-removal leaves no folder that looks complete
    for rest in folder.glob(".step-*"):
        shutil.rmtree(rest, ignore_errors=True)


def find_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint folder itself, or the latest whole one of a run's folder. Raises InputError where there is neither."""
    path = Path(folder)
    try:
        if (path / "config.json").is_file():
            return path
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path} ({one_line(error)})") from None
    if is_folder and (found := last_good(path)):
        return found
    if not exists:
        raise InputError(f"there is no checkpoint folder at {path}; name a folder that pbbench train or convert wrote")
    if not is_folder:
        raise InputError(f"{path} is a file, not a checkpoint folder; a released checkpoint is read by pbbench convert")
    raise InputError(f"{path} holds no checkpoint (neither config.json nor checkpoints/step-*); train or convert one first")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``config.json`` of a checkpoint or of a run's latest one: format, schema_version, step, images_seen, experiment (a
    dict). Raises InputError where it is foreign, broken or newer than this program."""
    path = find_checkpoint(folder) / "config.json"
    config = _read_json(path)
    if config.get("format") != FORMAT:
        raise InputError(f"{path} is not of a pbbench checkpoint; a released checkpoint is read by pbbench convert")
    version = config.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {version!r}; this pbbench reads up to {SCHEMA_VERSION}: update pbbench")
    config.setdefault("sha256", {})  # checkpoints of before had none
    for name, kinds in (("step", int), ("images_seen", (int, type(None))), ("experiment", dict), ("sha256", dict)):
        if not isinstance(config.get(name), kinds):
            raise InputError(f"{path} is broken: {name} is {config.get(name)!r}; use another checkpoint")
    return config


def load_model(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu", which: Literal["ema", "model"] = "ema"
) -> tuple[PatchUNet, Experiment]:
    """The network of a checkpoint (or of a run's latest one) in evaluation mode, without gradients, and its experiment.

    Weights are copied tensor by tensor, so that loading needs the device memory of one network, not of two. Raises
    InputError where the folder is absent, foreign or broken.
    """
    if which not in _FILES:
        raise InputError(f"which={which!r}: a checkpoint holds 'ema' and 'model'")
    path = find_checkpoint(folder)
    config = read_config(path)
    experiment = parse_experiment(config["experiment"], f"{path / 'config.json'}")
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn only to be replaced
        model = arranged(PatchUNet(experiment.model).to(device))
    _read_tensors(path / _FILES[which], model.state_dict(), config)
    return model.eval().requires_grad_(False), experiment


def load_training_state(
    folder: Path, *, model: nn.Module, ema_model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill the network, its average and the optimizer's state from a checkpoint; returns its ``training_state.json``.

    Raises InputError where a file is absent or broken, or where the checkpoint cannot be trained on (a converted one).
    """
    if not (folder / "training_state.json").is_file():
        raise InputError(
            f"{folder} holds weights only, so training cannot go on from it; name a folder that pbbench train wrote"
        )
    config = read_config(folder)
    state = _read_json(folder / "training_state.json")
    _read_tensors(folder / _FILES["model"], model.state_dict(), config)
    _read_tensors(folder / _FILES["ema"], ema_model.state_dict(), config)
    make_state(optimizer)
    _read_tensors(folder / "optimizer.safetensors", _optimizer_tensors(model, optimizer), config)
    return state


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its state as flat names; of Adam ``exp_avg.<parameter>``, ``exp_avg_sq.<parameter>``, ``step.<parameter>``."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    _flush(path)


def _read_tensors(path: Path, targets: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Copy a file's tensors into ``targets``; names, shapes, dtype and the file's checksum in ``config`` must agree, and are
    checked before anything is copied. float32, but where ``config`` names another ``dtype``: those that come with pbbench."""
    from safetensors import safe_open

    dtype = config.get("dtype", "F32")
    with _readable(path), safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(targets):
            what, some = ("lacks", set(targets) - names) if set(targets) - names else ("has unknown", names - set(targets))
            raise InputError(f"{path} {what} {len(some)} of the network's tensors ({min(some)}); it is of another network")
        for name, target in targets.items():
            found = file.get_slice(name)
            if found.get_shape() != list(target.shape) or found.get_dtype() != dtype:
                text = f"{found.get_dtype()} {found.get_shape()}, expected {dtype} {list(target.shape)}"
                raise InputError(f"{path}: the tensor {name} is {text}; it is of another network")
        if path.name in config["sha256"]:
            _compare(path, config["sha256"][path.name])
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(file.get_tensor(name))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(path: Path, checksum: str) -> None:
    with _readable(path):
        if _checksum(path) != checksum:
            raise InputError(
                f"{path} is broken: it is no longer what was written (its checksum differs); use another checkpoint"
            )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    _flush(path)


def _read_json(path: Path) -> dict[str, Any]:
    with _readable(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise InputError(f"{path} is broken: not a JSON object; use another checkpoint")
    return value


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a file that is absent, cut short or of another kind raises, as one line that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({one_line(error)[:150]}): absent or broken: use another checkpoint") from None


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
