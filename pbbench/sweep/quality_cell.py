"""A quality cell: train one divider to its budget (or load a checkpoint), sample, score, and say what was scored.

Quality is one row with phase ``quality``; what is scored, and how, is in ``quality.scorecard``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment
from pbbench.experiment.sweep_settings import SHIPPED
from pbbench.sweep.cell_rows import Emit, NanLossError, base_row
from pbbench.sweep.grid import Cell
from pbbench.sweep.shipped import FOLDER, checkpoint_of

GRID_IMAGES = 36


def train_and_score(experiment: Experiment, cell: Cell, device_name: str, run: Path, emit: Emit) -> None:
    """Raises what training, sampling or scoring raise; NanLossError where training's loss stops being a number."""
    import torch

    from pbbench.model.diffusion import Diffusion
    from pbbench.model.placement import cast_weights
    from pbbench.model.sampling import num_inference_steps
    from pbbench.quality.scorecard import real_images, scorecard
    from pbbench.training.checkpoint import load_model
    from pbbench.training.generate import generate, save_images, write_grid

    device = torch.device(device_name)
    emit("phase", phase="train")
    checkpoint, trained = _checkpoint(experiment, cell, device_name, run, emit)
    model, its_experiment = load_model(checkpoint, device)
    if its_experiment.model != experiment.model:
        raise InputError(f"the checkpoint {checkpoint} is of another network than the sweep's divider {cell.patch_divider}")
    diffusion = Diffusion(experiment.diffusion, device)
    real = real_images(experiment)
    if real.training.skipped:
        emit("note", text=real.training.notice())

    emit("phase", phase="sample")
    settings, count = experiment.sampling, experiment.quality.num_images
    started = time.perf_counter()
    cast_weights(model, settings.mixed_precision)
    samples = generate(model, diffusion, settings, count, device, lambda state: emit("progress", doing="sample", **state))
    model, _ = load_model(checkpoint, device)  # uncast, for the held-out loss
    seconds = {"sample_seconds": time.perf_counter() - started}
    grid = f"samples/{cell.id}.png"
    write_grid(run / grid, torch.stack(samples[:GRID_IMAGES]))
    if experiment.quality.save_samples:
        save_images(samples, run / "samples" / cell.id)
    if experiment.quality.reference_grid:
        write_grid(run / "samples" / "reference.png", real.reference.batch(range(min(GRID_IMAGES, len(real.reference)))))

    emit("phase", phase="score")
    started = time.perf_counter()
    card = scorecard(
        samples,
        real,
        model,
        diffusion,
        experiment,
        dividers=experiment.sweep.dividers,
        cache=run / "checkpoints" / "statistics",
        device=device,
        patch_batch_size=cell.patch_batch_size,
    )
    seconds["score_seconds"] = time.perf_counter() - started
    described = {
        "num_images": count,
        "images_seen": trained["images_seen"],
        "sampler": settings.sampler,
        "num_inference_steps": num_inference_steps(settings, experiment.diffusion.num_train_timesteps),
        "seed": settings.seed,
        "reasons": card.reasons,
    }
    emit("row", row={**base_row(experiment, cell, device_name), "phase": "quality", **card.columns, **described})
    sets = {"reference": real.reference.description, "num_reference_images": len(real.reference)}
    sets["skipped"] = [f"{unreadable.name}: {unreadable.reason}" for unreadable in real.training.skipped]
    sets["objective"] = f"{experiment.diffusion.prediction_type}, {experiment.diffusion.loss_type}"  # of the held-out loss
    sets["num_held_out"] = len(real.held_out) if real.held_out else 0
    trained |= {"training_seed": experiment.seed, "equal": experiment.sweep.equal}
    emit("detail", grid=grid, **card.details, **sets, **seconds, **trained)


def _checkpoint(experiment: Experiment, cell: Cell, device: str, run: Path, emit: Emit) -> tuple[Path, dict[str, Any]]:
    """The folder to sample from and what is known of its training; an interrupted training goes on where it stopped."""
    from pbbench.training.checkpoint import read_config
    from pbbench.training.train import train

    given = checkpoint_of(experiment, cell.patch_divider, cell.variant)
    if given is not None:
        config, kind = read_config(given), "shipped" if given.parent == FOLDER else "given"
        return given, {"images_seen": config["images_seen"], "trained_steps": config["step"], "checkpoint": kind}
    if SHIPPED in experiment.sweep.checkpoints.values() and not cell.variant:
        why = "none that comes with pbbench is of these settings"
        emit("note", text=f"trained here, for a budget that may be too short to rank dividers: {why}")
    plain = not cell.variant and cell.seed is None
    out = run / "checkpoints" / (f"d{cell.patch_divider}" if plain else cell.id)
    here = experiment.model_copy(update={"device": device})
    result = train(here, out, resume=out.exists(), progress=lambda state: emit("progress", doing="train", **state))
    if result.status == "nan_loss":
        saved = f"the last good checkpoint is in checkpoints/{out.name}" if result.checkpoint else "no checkpoint was saved yet"
        raise NanLossError(f"the training loss was not a number at step {result.steps}; {saved}")
    told = {"images_seen": result.images_seen, "trained_steps": result.steps, "loss": result.loss}
    return out, {**told, "train_seconds": result.seconds, "checkpoint": "trained"}
