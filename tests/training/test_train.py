"""Training: a step's gradients against plain torch, resuming to the bit, two processes against one, and what goes wrong."""

from __future__ import annotations

import copy
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_training import WELL_CONDITIONED, files_of, state_of, tiny
from torch import Tensor, nn

from pbbench.data.images import to_x_start, training_and_held_out
from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment
from pbbench.model.diffusion import Diffusion
from pbbench.training import progress
from pbbench.training import train as training
from pbbench.training.checkpoint import checkpoints_of, load_model
from pbbench.training.ema import ExponentialMovingAverage
from pbbench.training.optimizers import build_optimizer
from pbbench.training.setup import build_accelerator, build_network, draw_noise
from pbbench.training.train import train, train_step


def batch(num_images: int = 4, seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_start = torch.rand(num_images, 3, size, size, generator=generator) * 2 - 1
    t = torch.randint(0, 1000, (num_images,), generator=generator)
    return x_start, t, torch.randn(num_images, 3, size, size, generator=generator)


def gradients_by_train_step(
    experiment: Experiment, patch_batch_size: int | None, micro_batches: int = 1
) -> tuple[list[Tensor], Tensor]:
    """What SGD with step size 1 takes off the weights, and the last loss."""
    accelerator = build_accelerator(experiment, "cpu")
    bare = build_network(experiment)
    before = copy.deepcopy(bare)
    model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=1.0))
    diffusion = Diffusion(experiment.diffusion)
    for micro in range(micro_batches):
        with accelerator.accumulate(model):
            loss = train_step(
                model, *batch(seed=micro), diffusion=diffusion, optimizer=optimizer, accelerator=accelerator,
                patch_batch_size=patch_batch_size, max_grad_norm=experiment.training.max_grad_norm,
            )  # fmt: skip
    assert all(parameter.grad is None for parameter in bare.parameters())
    return [old - new for old, new in zip(before.parameters(), bare.parameters(), strict=True)], loss


def gradients_by_hand(experiment: Experiment, micro_batches: int = 1) -> tuple[list[Tensor], Tensor]:
    """The oracle: one pass per micro-batch, mean of the losses, clipped by torch, no accelerate."""
    model, diffusion = build_network(experiment), Diffusion(experiment.diffusion)
    for micro in range(micro_batches):
        x_start, t, noise = batch(seed=micro)
        output = model(diffusion.q_sample(x_start, t, noise), t)
        loss = diffusion.loss(output, diffusion.target(x_start, t, noise))
        (loss / micro_batches).backward()
    if experiment.training.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), experiment.training.max_grad_norm)
    return [parameter.grad for parameter in model.parameters()], loss.detach()  # type: ignore[misc]


def assert_same_gradients(ours: list[Tensor], expected: list[Tensor]) -> None:
    mine, theirs = torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in expected])
    assert (mine - theirs).norm() < 2e-5 * theirs.norm()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_batch_size", [1, 3, 4, 10, 16, None])
@pytest.mark.parametrize(("micro_batches", "clip"), [(1, None), (3, None), (2, 0.05)])
def test_gradients_do_not_depend_on_the_chunks(patch_batch_size: int | None, micro_batches: int, clip: float | None) -> None:
    settings = {"gradient_accumulation_steps": micro_batches, "max_grad_norm": clip}
    experiment = tiny(model=WELL_CONDITIONED, training=settings)
    ours, loss = gradients_by_train_step(experiment, patch_batch_size, micro_batches)
    expected, expected_loss = gradients_by_hand(experiment, micro_batches)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, expected)
    if clip is not None:  # the clip was in force
        assert torch.nn.utils.get_total_norm(ours).item() == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_every_target_and_loss_in_chunks(prediction_type: str, loss_type: str) -> None:
    experiment = tiny(model=WELL_CONDITIONED, diffusion={"prediction_type": prediction_type, "loss_type": loss_type})
    ours, loss = gradients_by_train_step(experiment, 3)
    expected, expected_loss = gradients_by_hand(experiment)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_mixed_precision_approximates_the_gradients(precision: str, clip: float | None) -> None:
    settings = {"mixed_precision": precision, "max_grad_norm": clip, "gradient_accumulation_steps": 2}
    # The squared error: the absolute one has gradients ±1, which flip where low precision changes a small error's sign.
    experiment = tiny(model=WELL_CONDITIONED, training=settings, diffusion={"loss_type": "l2"})
    ours, _ = gradients_by_train_step(experiment, 4, micro_batches=2)
    exact, _ = gradients_by_hand(experiment, micro_batches=2)
    mine, theirs = torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in exact])
    error = (mine - theirs).norm() / theirs.norm()
    low, high = (0.005, 0.1) if precision == "bf16" else (5e-4, 0.01)
    assert low < error < high  # the lower bound: the low precision was really used


def test_fp16_skips_a_step_whose_gradients_overflow() -> None:
    experiment = tiny(training={"mixed_precision": "fp16"})
    accelerator = build_accelerator(experiment, "cpu")
    bare = build_network(experiment)
    before = copy.deepcopy(bare.state_dict())
    model, optimizer = accelerator.prepare(bare, build_optimizer(bare, experiment.training))
    x_start, t, noise = batch()
    arguments = {"diffusion": Diffusion(experiment.diffusion), "optimizer": optimizer, "accelerator": accelerator}
    train_step(model, x_start, t, noise * 1e30, patch_batch_size=4, **arguments)
    assert accelerator.scaler.get_scale() == 2**15
    for name, value in bare.state_dict().items():
        assert torch.equal(value, before[name]), name
    train_step(model, x_start, t, noise, patch_batch_size=4, **arguments)
    assert not torch.equal(bare.stem.weight, before["stem.weight"])


def test_nothing_of_a_finished_chunk_survives() -> None:
    """A chunk's output dies before the next chunk begins: else the memory that chunks save would be spent again."""
    experiment = tiny()
    accelerator = build_accelerator(experiment, "cpu")
    bare = build_network(experiment)
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    bare.register_forward_pre_hook(lambda module, args: alive.append(sum(ref() is not None for ref in outputs)))
    bare.projection.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    model, optimizer = accelerator.prepare(bare, build_optimizer(bare, experiment.training))
    diffusion = Diffusion(experiment.diffusion)
    train_step(model, *batch(), diffusion=diffusion, optimizer=optimizer, accelerator=accelerator, patch_batch_size=4)
    assert len(outputs) == 4
    assert alive == [0, 0, 0, 0]


def test_noise_belongs_to_the_training_image() -> None:
    """Rows of the global batch are the same, however many processes share it."""
    device, shape = torch.device("cpu"), (3, 8, 8)
    t, noise = draw_noise(5, 40, 8, shape, 1000, device)
    assert t.shape == (8,)
    assert t.dtype == torch.int64
    assert noise.shape == (8, 3, 8, 8)
    parts = [draw_noise(5, 40 + 2 * part, 2, shape, 1000, device) for part in range(4)]
    assert torch.equal(torch.cat([p[0] for p in parts]), t)
    assert torch.equal(torch.cat([p[1] for p in parts]), noise)
    assert not torch.equal(draw_noise(6, 40, 8, shape, 1000, device)[1], noise)

    t, noise = draw_noise(0, 0, 4000, (4, 4), 10, device)
    assert set(t.tolist()) == set(range(10))
    assert torch.bincount(t).min() > 330  # 400 expected, standard deviation 19
    assert abs(noise.mean()) < 0.02  # 64,000 draws: standard deviation 0.004
    assert abs(noise.std() - 1) < 0.02
    neighbours = (noise[1:] * noise[:-1]).mean()  # images with successive numbers are independent
    assert abs(neighbours) < 0.02


@pytest.mark.parametrize("phase", [0, 1])
def test_average_equals_torch_swa_utils(phase: int) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    experiment = tiny(training={"ema_decay": 0.9, "ema_start_step": 5, "ema_update_every": 3, "ema_update_phase": phase})
    model = build_network(experiment)
    ours = ExponentialMovingAverage(model, experiment.training)
    oracle: AveragedModel | None = None
    for step in range(1, 14):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        ours.update(model, step)
        if step == 3 + phase:  # the last copy that was due
            oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            oracle.update_parameters(model)  # its first update is a copy
        elif step in (6 + phase, 9 + phase, 12 + phase):
            assert oracle is not None
            oracle.update_parameters(model)
    assert oracle is not None
    for mine, theirs in zip(ours.model.parameters(), oracle.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())


def test_average_is_the_weights_before_its_start() -> None:
    experiment = tiny(training={"ema_start_step": 100})
    model = build_network(experiment)
    ours = ExponentialMovingAverage(model, experiment.training)
    nn.init.ones_(model.stem.weight)
    ours.update(model, 7, about_to_be_read=True)
    assert torch.equal(ours.model.stem.weight, model.stem.weight)


def released_average(weights: list[float], every: int, start: int, decay: float) -> float:
    """The oracle: the loop of the released trainer, which counts steps from 0; ``weights`` after each optimizer step, 0 before
    the first."""
    average = 0.0
    for step, weight in enumerate(weights):
        if step % every == 0:
            average = weight if step < start else average * decay + (1 - decay) * weight
    return average


@pytest.mark.parametrize("num_steps", [1, 21, 41, 93])
@pytest.mark.parametrize("start", [0, 20, 25])
def test_average_in_the_released_phase(start: int, num_steps: int) -> None:
    settings = {"ema_decay": 0.9, "ema_start_step": start, "ema_update_every": 10, "ema_update_phase": 1}
    model = build_network(tiny())
    nn.init.constant_(model.stem.bias, 0.0)
    ours = ExponentialMovingAverage(model, tiny(training=settings).training)
    weights = [math.sin(step) for step in range(num_steps)]
    for step, weight in enumerate(weights, 1):
        nn.init.constant_(model.stem.bias, weight)
        ours.update(model, step)
    ours.update(model, num_steps, about_to_be_read=True)
    expected = released_average(weights, 10, start, 0.9)
    assert ours.model.stem.bias.tolist() == pytest.approx([expected] * 4, abs=1e-6)


def test_a_warm_up_forgets_where_the_average_began() -> None:
    """The decays are 1/10, 2/11, 3/12, ... until they reach ema_decay."""
    settings = {"ema_decay": 0.5, "ema_warmup": True, "ema_start_step": 3, "ema_update_every": 2}
    section = tiny(training=settings).training
    model = build_network(tiny())
    nn.init.constant_(model.stem.bias, 1.0)
    ours = ExponentialMovingAverage(model, section)
    ours.update(model, 2)
    nn.init.constant_(model.stem.bias, 0.0)
    share, decays = 1.0, iter([1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5])
    for step in range(3, 23):
        ours.update(model, step)
        share *= next(decays) if step % 2 == 0 else 1
        assert ours.model.stem.bias[0].item() == pytest.approx(share, rel=1e-5)
    assert section.ema_updates(22) == 10


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"ema_decay": 0.995, "ema_update_every": 10, "ema_start_step": 100, "num_steps": 1500}, "49% those of step 100"),
        ({"ema_decay": 0.995, "ema_update_every": 10, "ema_start_step": 100, "num_steps": 1500, "ema_warmup": True}, None),
        ({"ema_decay": 0.995, "ema_update_every": 10, "ema_start_step": 2000, "num_steps": 100_000}, None),
        ({"ema_decay": 0.9, "num_steps": 30}, None),  # 29 updates: 0.047
        ({"ema_decay": 0.9, "num_steps": 29}, "5% those of step 2"),  # 28: 0.052
        ({"ema_decay": 0.9, "num_steps": 1}, None),  # a plain copy
    ],
)
def test_a_stale_average_is_warned_of(settings: dict[str, Any], warned: str | None) -> None:
    line = tiny(training=settings).training.stale_average()
    assert (line is None) == (warned is None)
    assert warned is None or warned in str(line)


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_resuming_equals_the_uninterrupted_run_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Under fp16 after a step that was skipped, so that the loss scaler is not what a new run begins with."""
    overflows = {3} if precision == "fp16" else set()

    def overflowing(model: nn.Module, x_start: Tensor, *tensors: Tensor, **arguments: Any) -> Tensor:
        return train_step(model, x_start * (math.nan if next(calls) in overflows else 1), *tensors, **arguments)

    monkeypatch.setattr(training, "train_step", overflowing)
    settings = {"mixed_precision": precision, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    settings |= {"ema_warmup": precision == "bf16", "keep_every": 2}
    experiment, calls = tiny(training=settings), iter(range(100))
    straight = train(experiment, tmp_path / "straight")
    calls = iter(range(100))
    train(tiny(training={**settings, "num_steps": 3}), tmp_path / "parts")
    resumed = train(experiment, tmp_path / "parts", resume=True)

    assert set(files_of(tmp_path / "straight")) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert files_of(tmp_path / "straight") == files_of(tmp_path / "parts")
    assert state_of(tmp_path / "straight") == state_of(tmp_path / "parts")
    for run in ("straight", "parts"):  # of all steps, the last two saved and those kept for good
        kept = {path.name: (path / "ema.safetensors").read_bytes() for path in checkpoints_of(tmp_path / run)}
        assert list(kept) == ["step-00000002", "step-00000004", "step-00000006"]
        assert kept["step-00000004"] == (tmp_path / "straight/checkpoints/step-00000004/ema.safetensors").read_bytes()
    assert (state_of(tmp_path / "parts")["scaler"] or {}).get("scale") == (2.0**15 if overflows else None)
    assert (resumed.loss, resumed.steps, resumed.images_seen) == (straight.loss, 6, 24)
    assert resumed.status == "ok"
    assert resumed.checkpoint == tmp_path / "parts/checkpoints/step-00000006"
    assert resumed.seconds > 0


@pytest.mark.slow
def test_kill_9_in_the_midst_of_saving_and_resumed_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    experiment = tiny(training={"num_steps": 40, "save_every": 1})
    (tmp_path / "tiny.toml").write_text(experiment.to_toml())
    killed = tmp_path / "killed"
    words = [sys.executable, "-m", "pbbench.cli", "train", "--experiment", tmp_path / "tiny.toml", "--out", killed]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saving = f".step-*.unfinished-{process.pid}"
    while len(checkpoints_of(killed)) < 2 or not list((killed / "checkpoints").glob(saving)):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    train(experiment, killed, resume=True)
    train(experiment, tmp_path / "straight")
    assert files_of(killed) == files_of(tmp_path / "straight")
    assert len(list((killed / "checkpoints").iterdir())) == 2  # nothing unfinished is left


def test_a_finished_run_resumes_at_once(tmp_path: Path) -> None:
    first = train(tiny(), tmp_path / "run")
    again = train(tiny(), tmp_path / "run", resume=True)
    assert (again.loss, again.steps, again.checkpoint) == (first.loss, 6, first.checkpoint)


def test_resume_begins_where_nothing_was_saved(tmp_path: Path) -> None:
    """Killed before the first checkpoint, or not begun at all."""
    assert train(tiny(training={"num_steps": 1}), tmp_path / "new", resume=True).steps == 1
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "experiment.toml").write_text(tiny().to_toml())
    assert train(tiny(), tmp_path / "young", resume=True).steps == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    straight = train(tiny(), tmp_path / "straight")

    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    def interrupt(state: dict[str, Any]) -> None:
        if state["step"] == 4:
            os.kill(os.getpid(), number)

    previous = signal.signal(number, stop)
    try:
        with pytest.raises(StoppedError):
            train(tiny(), tmp_path / "stopped", progress=interrupt)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, previous)
    assert checkpoints_of(tmp_path / "stopped")[-1].name == "step-00000005"
    assert train(tiny(), tmp_path / "stopped", resume=True).loss == straight.loss
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "straight")


def test_the_loss_goes_down(tmp_path: Path) -> None:
    """On images that were held out, with fixed timesteps and noise, for the averaged weights."""
    settings = {"batch_size": 8, "num_steps": 100, "save_every": 100, "learning_rate": 3e-3, "ema_start_step": 1000}
    data = {"num_images": 600, "num_held_out": 60}
    experiment = tiny(model={"dim": 16}, data=data, training={**settings, "patch_batch_size": "all"})
    train(experiment, tmp_path / "run")
    trained, _ = load_model(tmp_path / "run")
    _, held_out = training_and_held_out(experiment)
    assert held_out is not None
    x_start = to_x_start(torch.stack([held_out[n] for n in range(60)]))
    _, t, noise = batch(60, size=8)
    diffusion = Diffusion(experiment.diffusion)

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return diffusion.loss(model(diffusion.q_sample(x_start, t, noise), t), noise).item()

    assert loss(trained) < 0.82 * loss(build_network(experiment))


def test_a_run_leaves_grids_progress_and_two_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    states: list[dict[str, Any]] = []
    settings = {"save_every": 2, "sample_every": 4, "num_grid_samples": 7}
    train(tiny(training=settings), tmp_path / "run", progress=states.append)
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    grids = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in grids] == ["step-00000004.png", "step-00000006.png"]
    with Image.open(grids[0]) as grid:
        assert grid.size == (3 * 9 + 1, 3 * 9 + 1)  # 7 images of 8 × 8 in three columns
        assert len(set(grid.convert("L").crop((1, 1, 9, 9)).tobytes())) > 8  # drawn, not left empty
    assert [state["step"] for state in states] == [1, 2, 3, 4, 5, 6]
    assert states[-1]["num_steps"] == 6
    assert states[-1]["seconds_left"] == 0
    assert all(math.isfinite(state["loss"]) and state["images_per_second"] > 0 for state in states)


def test_bar_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(training={"num_steps": 2}), tmp_path / "run", show_bar=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"step 2 of 2 · loss \d\.\d+ · [\d.,]+ images/s · 0:00:00 left", captured.err)


@pytest.mark.parametrize(("precision", "poisoned", "status"), [("no", {4}, "nan_loss"), ("fp16", {1, 2, 3, 5}, "ok")])
def test_a_loss_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, poisoned: set[int], status: str
) -> None:
    """It ends the run and keeps the last good checkpoint; under fp16 the scaler skips such steps, so a few are no failure."""
    calls = iter(range(1, 100))

    def poison(model: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, **arguments: Any) -> Tensor:
        return train_step(model, x_start * (math.nan if next(calls) in poisoned else 1), t, noise, **arguments)

    monkeypatch.setattr(training, "train_step", poison)
    result = train(tiny(training={"mixed_precision": precision}), tmp_path / "run")
    assert result.status == status
    assert math.isnan(result.loss) == (status == "nan_loss")
    assert result.steps == (4 if status == "nan_loss" else 6)
    assert result.checkpoint is not None
    assert result.checkpoint.name == ("step-00000003" if status == "nan_loss" else "step-00000006")
    model, _ = load_model(tmp_path / "run")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss whose update ruins the weights, at a step that would be saved."""

    def ruin(model: nn.Module, *tensors: Tensor, **arguments: Any) -> Tensor:
        loss = train_step(model, *tensors, **arguments)
        nn.init.constant_(next(model.parameters()), math.inf)
        return loss

    monkeypatch.setattr(training, "train_step", ruin)
    result = train(tiny(training={"num_steps": 1}), tmp_path / "run")
    assert (result.status, result.checkpoint) == ("nan_loss", None)


def test_tensorboard_gets_the_loss(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tiny(training={"trackers": ["tensorboard"], "num_steps": 3}), tmp_path / "run")
    (events,) = (path for path in (tmp_path / "run").rglob("events.out*") if path.parent.name == "pbbench")
    read = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3]
    assert read.Scalars("loss")[-1].value == pytest.approx(result.loss)


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb is not installed; pip install 'pbbench\[wandb\]'"):
        train(tiny(training={"trackers": ["wandb"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no CUDA GPU here"):
        train(tiny(device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        train(tiny(), tmp_path / "file")
    with pytest.raises(InputError, match="cannot write to"):
        train(tiny(), tmp_path / "file" / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty; go on with --resume"):
        train(tiny(), tmp_path / "full")
    with pytest.raises(InputError, match="not the folder of a training run"):
        train(tiny(), tmp_path / "full", resume=True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_what_a_resumed_run_may_change_and_what_not(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    before = files_of(tmp_path / "run")
    for section, changed, shown in [
        ("training", {"learning_rate": 0.5}, r"training.learning_rate: 0.0001 → 0.5"),
        ("model", {"dim": 16}, r"model.dim: 8 → 16"),
        ("data", {"num_images": 20}, r"data.num_images: 24 → 20"),
        ("training", {"num_steps": 5}, r"is at step 6; raise training.num_steps"),
    ]:
        with pytest.raises(InputError, match=shown):
            train(tiny(**{section: changed}), tmp_path / "run", resume=True)
    assert files_of(tmp_path / "run") == before

    longer = tiny(name="other", training={"num_steps": 7, "save_every": 1, "patch_batch_size": 1}, quality={"num_images": 7})
    assert train(longer, tmp_path / "run", resume=True).steps == 7


def test_images_that_changed_under_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(4):
        Image.new("RGB", (8, 8), (n * 50, 0, 0)).save(folder / f"{n}.png")
    experiment = tiny(data={"source": str(folder), "num_images": None, "num_held_out": 0})
    train(experiment, tmp_path / "run")
    Image.new("RGB", (8, 8), (0, 99, 0)).save(folder / "2.png")
    with pytest.raises(InputError, match="the images have changed"):
        train(experiment, tmp_path / "run", resume=True)
