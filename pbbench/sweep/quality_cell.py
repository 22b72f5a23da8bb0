"""A quality cell: train one divider to its budget (or load a checkpoint), sample, score, and say what was scored.

Quality is one row with phase ``quality``. The Frechet distance is FID only with the published Inception weights and enough
images; without the weights a fixed-seed random extractor stands in, under its own name, and the row says why.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment
from pbbench.records.rows import COLUMNS
from pbbench.sweep.cell_rows import Emit, NanLossError, base_row
from pbbench.sweep.grid import Cell

GRID_IMAGES = 36


def train_and_score(experiment: Experiment, cell: Cell, device_name: str, run: Path, emit: Emit) -> None:
    """Raises what training, sampling or scoring raise; NanLossError where training's loss stops being a number."""
    import torch

    from pbbench.data.images import training_and_held_out
    from pbbench.model.diffusion import Diffusion
    from pbbench.model.sampling import num_inference_steps
    from pbbench.training.checkpoint import load_model
    from pbbench.training.generate import generate, save_images, write_grid

    device = torch.device(device_name)
    emit("phase", phase="train")
    checkpoint, trained = _checkpoint(experiment, cell, device_name, run, emit)
    model, its_experiment = load_model(checkpoint, device)
    if its_experiment.model != experiment.model:
        raise InputError(f"the checkpoint {checkpoint} is of another network than the sweep's divider {cell.patch_divider}")
    diffusion = Diffusion(experiment.diffusion, device)
    data, held_out = training_and_held_out(experiment)
    if data.skipped:
        emit("note", text=data.notice())
    reference = data.subset(0, min(experiment.quality.num_reference_images or len(data), len(data)))

    emit("phase", phase="sample")
    settings, count = experiment.sampling, experiment.quality.num_images
    started = time.perf_counter()
    samples = generate(model, diffusion, settings, count, device, lambda state: emit("progress", doing="sample", **state))
    seconds = {"sample_seconds": time.perf_counter() - started}
    grid = f"samples/{cell.id}.png"
    write_grid(run / grid, torch.stack(samples[:GRID_IMAGES]))
    if experiment.quality.save_samples:
        save_images(samples, run / "samples" / cell.id)
    if experiment.quality.reference_grid:
        write_grid(run / "samples" / "reference.png", reference.batch(range(min(GRID_IMAGES, len(reference)))))

    emit("phase", phase="score")
    started = time.perf_counter()
    scores, reasons = _score(samples, reference, experiment, cell, device_name, run)
    loss = _held_out(model, diffusion, held_out, experiment, cell, device, reasons)
    seconds["score_seconds"] = time.perf_counter() - started
    described = {
        "num_images": count,
        "images_seen": trained["images_seen"],
        "sampler": settings.sampler,
        "num_inference_steps": num_inference_steps(settings, experiment.diffusion.num_train_timesteps),
        "seed": settings.seed,
        "held_out_loss": loss["mean"],
        "reasons": reasons,
    }
    columns = {name: value for name, value in scores.items() if name in COLUMNS}
    emit("row", row={**base_row(experiment, cell, device_name), "phase": "quality", **columns, **described})
    sets = {"reference": reference.description, "num_reference_images": len(reference)}
    sets["skipped"] = [f"{unreadable.name}: {unreadable.reason}" for unreadable in data.skipped]
    sets["num_held_out"] = len(held_out) if held_out else 0
    trained |= {"training_seed": experiment.seed, "equal": experiment.sweep.equal}
    emit("detail", grid=grid, metrics=scores, held_out=loss, **sets, **seconds, **trained)


def _checkpoint(experiment: Experiment, cell: Cell, device: str, run: Path, emit: Emit) -> tuple[Path, dict[str, Any]]:
    """The folder to sample from and what is known of its training; an interrupted training goes on where it stopped."""
    from pbbench.training.checkpoint import read_config
    from pbbench.training.train import train

    given = None if cell.variant else experiment.sweep.checkpoints.get(str(cell.patch_divider))
    if given is not None:
        config = read_config(Path(given))
        return Path(given), {"images_seen": config["images_seen"], "trained_steps": config["step"], "checkpoint": "given"}
    plain = not cell.variant and cell.seed is None
    out = run / "checkpoints" / (f"d{cell.patch_divider}" if plain else cell.id)
    here = experiment.model_copy(update={"device": device})
    result = train(here, out, resume=out.exists(), progress=lambda state: emit("progress", doing="train", **state))
    if result.status == "nan_loss":
        saved = f"the last good checkpoint is in checkpoints/{out.name}" if result.checkpoint else "no checkpoint was saved yet"
        raise NanLossError(f"the training loss was not a number at step {result.steps}; {saved}")
    told = {"images_seen": result.images_seen, "trained_steps": result.steps, "loss": result.loss}
    return out, {**told, "train_seconds": result.seconds, "checkpoint": "trained"}


def _score(
    samples: Any, reference: Any, experiment: Experiment, cell: Cell, device: str, run: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Scores under their honest names, the seam score, and why the others are null."""
    from pbbench.quality.fid import MissingWeightsError, resolve_inception_weights, score
    from pbbench.quality.seams import seam_score, seam_score_interval

    quality = experiment.quality
    reasons: dict[str, str] = {}
    try:
        weights = resolve_inception_weights(quality.inception_weights)
    except MissingWeightsError as error:
        weights = None
        named = ("frechet_inception_distance", "kernel_inception_distance_mean", "patch_frechet_inception_distance")
        reasons |= dict.fromkeys(named, f"no Inception weights: {error}")
    scores = score(
        samples,
        reference,
        metrics=quality.metrics,
        extractor="inception" if weights else "random",
        weights=weights,
        kid_subset_size=quality.kid_subset_size,
        batch_size=quality.batch_size,
        device=device,
        seed=experiment.sampling.seed,
        cache=run / "checkpoints" / "statistics",
    )
    try:
        scores["seam_score"] = seam_score(samples, reference, cell.patch_divider)
        scores["seam_score_interval"] = seam_score_interval(
            samples, reference, cell.patch_divider, seed=experiment.sampling.seed
        )
        if scores["seam_score"] is None:
            reasons["seam_score"] = "undefined without patch borders (d = 1)"
    except InputError as error:  # flat samples, or patches of one pixel
        reasons["seam_score"] = str(error)
    reasons |= {name: why for name, why in scores["reasons"].items() if name in COLUMNS}
    if scores.get("frechet_inception_distance") is None:
        reasons.setdefault("frechet_inception_distance", "; ".join(scores["notes"]) or "not asked for")
    return scores, reasons


def _held_out(
    model: Any, diffusion: Any, images: Any, experiment: Experiment, cell: Cell, device: Any, reasons: dict[str, str]
) -> dict[str, Any]:
    """The held-out denoising loss, per band of timesteps; null with a reason where no images are held out."""
    from pbbench.quality.held_out import held_out_loss

    if images is None:
        reasons["held_out_loss"] = "no images are held out (data.num_held_out is 0, or the set is small)"
        return {"mean": None, "bands": []}
    batch, patches = cell.batch_size, cell.patch_batch_size
    return held_out_loss(
        model, diffusion, images, seed=experiment.data_seed, batch_size=batch, patch_batch_size=patches, device=device
    )
