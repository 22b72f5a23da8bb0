"""Training: one step that fits a screen, and the loop around it.

``train_step`` is the very function the sweep measures. The loop adds what a run needs: random numbers that depend on
(seed, training image) alone, the moving average, checkpoints, sample grids, progress, and a stop where the loss is no number.
It runs alone or as several processes (torchrun); all processes draw the same initial weights and differ only in their images.

Shapes: N images of this process's micro-batch, C, H, W; d the patch divider; R rows (patches) of one chunk.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pbbench.data.images import ImageSet, to_x_start, training_and_held_out
from pbbench.data.loader import training_loader
from pbbench.errors import InputError, writing_to
from pbbench.experiment.experiment import Experiment
from pbbench.experiment.settings import resolve_patch_batch_size
from pbbench.model.diffusion import Diffusion
from pbbench.model.patching import row_chunks, split
from pbbench.model.unet import PatchUNet
from pbbench.processes import failing_in_turn
from pbbench.records.files import write_text
from pbbench.signals import StopSignals
from pbbench.training import checkpoint as checkpoints
from pbbench.training.ema import ExponentialMovingAverage
from pbbench.training.generate import save_sample_grid
from pbbench.training.optimizers import build_optimizer
from pbbench.training.progress import Progress
from pbbench.training.setup import (
    build_accelerator,
    build_network,
    check_folder,
    draw_noise,
    settle_gradient_buckets,
)

SETTLE_EVERY = 10
"""Steps between two looks at the loss on a GPU, each of which waits for it; on a CPU every step is looked at."""
SKIPPED_STEPS_TOLERATED = 20
"""fp16: the loss scaler skips steps whose gradients overflow; so many in a row are not yet a failure."""


def train_step(
    model: nn.Module,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    diffusion: Diffusion,
    optimizer: Any,
    accelerator: Any,
    patch_batch_size: int | None,
    max_grad_norm: float | None = None,
) -> Tensor:
    """One micro-batch: forward and backward per chunk of patches, then the optimizer's step where one is due.

    Args:
        model, optimizer: from ``accelerator.prepare``.
        x_start: images in [−1, 1], N C H W; ``noise`` likewise, standard normal; t: timesteps, N, int64.
        patch_batch_size: patches per pass; None: all N·d². Gradients are the same within rounding.
        max_grad_norm: clip the gradient's norm to this.

    Under ``accelerator.accumulate(model)`` the gradients of several calls add up to their mean, and only the last one steps.
    Returns the micro-batch's mean loss, a detached scalar that nothing has waited for.
    """
    network: Any = getattr(model, "module", model)  # DDP wraps it
    d: int = network.config.patch_divider
    x_t = diffusion.q_sample(x_start, t, noise)  # N C H W
    target = diffusion.target(x_start, t, noise)  # N C H W
    # Last first: where one chunk is smaller, it runs before there are gradients to hold, and smaller chunks never need more.
    chunks = row_chunks(x_start.shape[0] * d * d, patch_batch_size)[::-1]
    mean_loss = torch.zeros((), device=x_start.device)
    for rows in chunks:
        # Processes exchange gradients once, in the last chunk's backward.
        with nullcontext() if rows is chunks[-1] else accelerator.no_sync(model):
            with accelerator.autocast():
                output = model(x_t, t, rows=rows)  # R C h w
                loss = diffusion.loss(output, split(target, d, rows), total=target.numel())
            accelerator.backward(loss)
        mean_loss += loss.detach()
        del output, loss  # else they would live beside the next chunk's activations
    if accelerator.sync_gradients:
        if max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean_loss


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to. ``seconds`` counts every part of an interrupted and resumed run."""

    checkpoint: Path | None
    """The last good checkpoint; None where the loss failed before the first."""
    images_seen: int
    steps: int
    """Optimizer steps done; with nan_loss, the step whose loss was the first that is no number."""
    loss: float
    """Of the last step (mean over its images and all processes)."""
    status: Literal["ok", "nan_loss"]
    seconds: float


def train(
    experiment: Experiment,
    out: Path | str,
    *,
    resume: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    show_bar: bool = False,
) -> TrainingResult:
    """Train ``experiment`` to ``training.num_steps``, or for ``training.max_seconds`` where those pass first, into the folder
    ``out``: checkpoints, sample grids, experiment.toml.

    With ``resume`` an interrupted run of the same settings goes on from its last checkpoint; equal to the bit, on a CPU, to
    the run that was never interrupted. Ctrl-C and SIGTERM save a checkpoint, then have their usual effect. To be called by
    every process of a torchrun. Raises InputError for bad settings, data or folders, before anything is written.
    """
    out = Path(out)
    accelerator = build_accelerator(experiment, experiment.device, out=out)
    stop = StopSignals()
    try:
        with failing_in_turn():
            result = _train(experiment, out, accelerator, resume, progress, show_bar, stop)
    finally:
        # gloo sometimes aborts at exit unless DDP's object is gone before the process group is.
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()
    stop.deliver()
    return result


@dataclass
class _Run:
    """A training under way."""

    experiment: Experiment
    out: Path
    accelerator: Any
    diffusion: Diffusion
    bare: PatchUNet
    model: nn.Module
    bare_optimizer: torch.optim.Optimizer
    optimizer: Any
    ema: ExponentialMovingAverage
    fingerprint: str
    step: int = 0
    loss: float = math.nan
    seconds: float = 0.0

    @property
    def images_per_step(self) -> int:
        section = self.experiment.training
        return section.batch_size * section.gradient_accumulation_steps * self.accelerator.num_processes

    def optimizer_step(self, batches: Iterator[Tensor]) -> Tensor:
        """Every micro-batch of one optimizer step; returns this process's mean loss, still on the device."""
        section, model, device = self.experiment.training, self.experiment.model, self.accelerator.device
        patches = resolve_patch_batch_size(section.patch_batch_size, section.batch_size, model.patch_divider)
        mean_loss = torch.zeros((), device=device)
        for micro in range(section.gradient_accumulation_steps):
            number = self.step * section.gradient_accumulation_steps + micro
            first = (number * self.accelerator.num_processes + self.accelerator.process_index) * section.batch_size
            shape, T = (model.channels, *model.size), self.experiment.diffusion.num_train_timesteps
            t, noise = draw_noise(self.experiment.seed, first, section.batch_size, shape, T, device)
            x_start = to_x_start(next(batches).to(device, non_blocking=True))
            with self.accelerator.accumulate(self.model):
                mean_loss += train_step(
                    self.model, x_start, t, noise, diffusion=self.diffusion, optimizer=self.optimizer,
                    accelerator=self.accelerator, patch_batch_size=patches, max_grad_norm=section.max_grad_norm,
                )  # fmt: skip
        self.step += 1
        self.ema.update(self.bare, self.step)
        return mean_loss / section.gradient_accumulation_steps

    def settle(self, pending: list[Tensor], stop: bool) -> tuple[list[float], bool]:
        """Wait for the device once: the losses since the last look, and whether any process is to stop."""
        values = torch.stack([*pending, torch.tensor(float(stop), device=pending[0].device)])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "mean")
        *losses, stopping = values.tolist()
        return losses, stopping > 0

    def weights_are_finite(self) -> bool:
        return bool(torch.isfinite(torch.nn.utils.get_total_norm([p.detach() for p in self.bare.parameters()])))

    def save(self, seconds: float) -> None:
        """Write this step's checkpoint and remove the oldest; the other processes wait."""
        self.ema.update(self.bare, self.step, about_to_be_read=True)
        folder = checkpoints.step_folder(self.out, self.step)
        if self.accelerator.is_main_process and folder not in checkpoints.checkpoints_of(self.out):
            scaler = self.accelerator.scaler
            state = {
                "num_processes": self.accelerator.num_processes,
                "data_fingerprint": self.fingerprint,
                "loss": self.loss if math.isfinite(self.loss) else None,
                "seconds": seconds,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            checkpoints.write_checkpoint(
                folder, model=self.bare, ema_model=self.ema.network("cpu"), experiment=self.experiment, step=self.step,
                images_seen=self.step * self.images_per_step, optimizer=self.bare_optimizer, state=state,
            )  # fmt: skip
            section = self.experiment.training
            with writing_to(self.out):
                checkpoints.prune(self.out, section.keep_checkpoints, section.keep_every)
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> None:
        """Go back to a checkpoint. Raises InputError where it belongs to other data or another number of processes."""
        state = checkpoints.load_training_state(
            folder, model=self.bare, ema_model=self.ema.model, optimizer=self.bare_optimizer
        )
        try:
            processes, fingerprint, scaler = state["num_processes"], state["data_fingerprint"], state["scaler"]
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.loss = math.nan if state["loss"] is None else float(state["loss"])
            if self.accelerator.scaler is not None and scaler is not None:
                self.accelerator.scaler.load_state_dict(scaler)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / 'training_state.json'} is broken ({error!r}); use another checkpoint") from None
        if processes != self.accelerator.num_processes:
            now = self.accelerator.num_processes
            raise InputError(f"{self.out} was trained by {processes} processes, this is {now}; resume with as many (torchrun)")
        if fingerprint != self.fingerprint:
            raise InputError(f"the images have changed since {self.out} was begun; restore them, or train into another folder")

    def draw_grid(self) -> None:
        self.ema.update(self.bare, self.step, about_to_be_read=True)
        path = self.out / "samples" / f"step-{self.step:08d}.png"
        save_sample_grid(path, self.ema.network(self.accelerator.device), self.diffusion, self.experiment, self.accelerator)


def _train(
    experiment: Experiment, out: Path, accelerator: Any, resume: bool, progress: Callable[[dict[str, Any]], None] | None,
    show_bar: bool, stop: StopSignals,
) -> TrainingResult:  # fmt: skip
    section = experiment.training
    resumed = check_folder(out, experiment, resume)
    images, _ = training_and_held_out(experiment)
    run = _start(experiment, out, accelerator, images)
    if resumed is not None:
        run.restore(resumed)
    batches = training_loader(
        images, experiment, run.step, process_index=accelerator.process_index, num_processes=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes to it
    if accelerator.is_main_process:
        with writing_to(out):
            write_text(out / "experiment.toml", experiment.to_toml())
            checkpoints.set_aside_broken(out, resumed)
            checkpoints.prune(out, section.keep_checkpoints, section.keep_every)
    if section.trackers:
        accelerator.init_trackers("pbbench", config={"experiment": experiment.to_toml()})
    main = accelerator.is_main_process
    if show_bar and main:
        print(f"images: {images.notice()}", file=sys.stderr)
        if stale := section.stale_average():
            print(f"pbbench: {stale}", file=sys.stderr)
    settle_every = 1 if accelerator.device.type == "cpu" else SETTLE_EVERY
    tolerated = SKIPPED_STEPS_TOLERATED if section.mixed_precision == "fp16" else 0
    pending: list[Tensor] = []
    limit = math.inf if section.max_seconds is None else section.max_seconds
    bad, status, stopping = 0, "ok", run.seconds >= limit
    started = time.monotonic() - run.seconds
    told, ends_at = progress if main else None, started + limit
    reporter = Progress(told, show_bar and main, section.num_steps, run.step, run.images_per_step, ends_at)
    with stop, reporter:
        while run.step < section.num_steps and not stopping:
            pending.append(run.optimizer_step(batches))
            last = run.step == section.num_steps
            saving = last or any(run.step % every == 0 for every in (section.save_every, section.keep_every) if every)
            drawing = section.sample_every > 0 and (last or run.step % section.sample_every == 0)
            if saving or drawing or run.step % settle_every == 0:
                losses, stopping = run.settle(pending, stop.received is not None or time.monotonic() >= ends_at)
                pending.clear()
                for loss in losses:
                    bad = 0 if math.isfinite(loss) else bad + 1
                    run.loss = run.loss if bad else loss
                if section.trackers and math.isfinite(run.loss):
                    accelerator.log({"loss": run.loss}, step=run.step)
                if bad > tolerated or ((saving or stopping) and not run.weights_are_finite()):
                    status = "nan_loss"
                    break
                if saving or stopping:
                    run.save(time.monotonic() - started)
                if drawing:
                    run.draw_grid()
            reporter.report(run.step, run.loss, force=last or stopping)
    batches.close()  # type: ignore[attr-defined]
    steps = run.step - max(bad - 1, 0) if status == "nan_loss" else run.step
    saved = checkpoints.checkpoints_of(out)
    return TrainingResult(
        checkpoint=saved[-1] if saved else None, images_seen=steps * run.images_per_step, steps=steps,
        loss=run.loss if status == "ok" else math.nan, status=status, seconds=time.monotonic() - started,  # type: ignore[arg-type]
    )  # fmt: skip


def _start(experiment: Experiment, out: Path, accelerator: Any, images: ImageSet) -> _Run:
    """The network with weights from the experiment's seed, its average and its optimizer, before the first step."""
    bare = build_network(experiment, accelerator.device)
    ema = ExponentialMovingAverage(bare, experiment.training)
    bare_optimizer = build_optimizer(bare, experiment.training)
    model, optimizer = accelerator.prepare(bare, bare_optimizer)
    if accelerator.num_processes > 1:
        settle_gradient_buckets(model, experiment, accelerator.device)
    diffusion = Diffusion(experiment.diffusion, accelerator.device)
    return _Run(experiment, out, accelerator, diffusion, bare, model, bare_optimizer, optimizer, ema, images.fingerprint())
