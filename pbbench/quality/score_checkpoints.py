"""``pbbench score``: how good checkpoints are, one or all that a training run kept: the curve of quality against images seen.

Each is scored as a sweep scores (``scorecard``): its own experiment says the data, the sampler and the metrics, options may
change them. The features of real images are computed once for all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from pbbench.errors import InputError
from pbbench.model.diffusion import Diffusion
from pbbench.model.placement import cast_weights
from pbbench.quality.scorecard import real_images, scorecard
from pbbench.records.quality_names import DISTANCE_WORDS, quality_label
from pbbench.training.checkpoint import checkpoints_of, find_checkpoint, load_model, read_config
from pbbench.training.generate import generate, sample_settings


def checkpoints_in(folder: Path, every: bool) -> list[Path]:
    """The checkpoint, or of a run the latest, or ``every`` one it kept. Raises InputError where there is none."""
    kept = checkpoints_of(folder) if every and folder.is_dir() else []
    return kept or [find_checkpoint(folder)]


def score_checkpoints(
    folders: Iterable[Path],
    overrides: Sequence[dict[str, Any]],
    device: torch.device,
    *,
    which: Literal["ema", "model"] = "ema",
    every: bool = False,
    cache: Path | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A dict a checkpoint: checkpoint, patch_divider, weights ("ema" or "model", the raw ones), step, images_seen, sampler,
    num_inference_steps, seed, the columns of a row of quality, ``intervals`` and ``reasons``. ``cache`` keeps features of real
    images; None: a folder that is gone afterwards. Raises InputError where a checkpoint cannot be read or its data are not
    there.
    """
    paths = [path for folder in folders for path in checkpoints_in(folder, every)]
    if not paths:
        raise InputError("no checkpoint to score; name at least one folder")
    with tempfile.TemporaryDirectory() as temporary:
        return [_score(path, overrides, device, which, cache or Path(temporary), told) for path in paths]


def _score(
    path: Path,
    overrides: Sequence[dict[str, Any]],
    device: torch.device,
    which: Literal["ema", "model"],
    cache: Path,
    told: Callable[[str], None],
) -> dict[str, Any]:
    config = read_config(path)
    model, experiment = load_model(path, device, which)
    experiment = sample_settings(experiment, overrides)
    sampling, diffusion, real = experiment.sampling, Diffusion(experiment.diffusion, device), real_images(experiment)
    told(f"{path}: {experiment.quality.num_images:,} samples")
    cast_weights(model, sampling.mixed_precision)
    samples = generate(model, diffusion, sampling, experiment.quality.num_images, device)
    model, _ = load_model(path, device, which)  # uncast, for the held-out loss
    dividers = {1, model.config.patch_divider}
    card = scorecard(samples, real, model, diffusion, experiment, dividers=dividers, cache=cache, device=device)
    metrics = card.details["metrics"]
    return {
        "checkpoint": str(path),
        "patch_divider": model.config.patch_divider,
        "weights": which,
        "step": config["step"],
        "images_seen": config["images_seen"],
        "sampler": sampling.sampler,
        "num_inference_steps": sampling.num_inference_steps,
        "num_images": experiment.quality.num_images,
        "seed": sampling.seed,
        **dict.fromkeys(("seam_score", "seam_excess")),  # null at d = 1
        **card.columns,
        "held_out_standard_error": card.details["held_out"].get("standard_error"),
        "intervals": {name: metrics[f"{name}_interval"] for name in card.columns if metrics.get(f"{name}_interval")},
        "reasons": card.reasons,
    }


def lines(scores: Sequence[dict[str, Any]]) -> list[str]:
    """A table for a terminal, one line a checkpoint, and the names of its figures."""
    distance = next((name for name in DISTANCE_WORDS if any(score.get(name) is not None for score in scores)), None)
    shown = {"d": "patch_divider", "step": "step", "images": "images_seen", "distance": distance, "floor": "distance_floor"}
    shown |= {"seams": "seam_score", "excess": "seam_excess", "loss": "held_out_loss"}
    table = [list(shown)]
    table += [[_text(score.get(column) if column else None) for column in shown.values()] for score in scores]
    widths = [max(len(row[i]) for row in table) for i in range(len(shown))]
    told = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in table]
    named = quality_label(distance, [scores[0]["num_images"]]) if distance else "no distance could be computed"
    words = {"ema": "averaged weights", "model": "raw weights"}[scores[0]["weights"]]
    explained = f"distance: {named}; {words}; floor: of as many real images"
    return [*told, f"{explained}; excess: grey levels; loss: held-out denoising loss"]


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
