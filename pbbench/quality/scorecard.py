"""All that is said of one trained model's images: distances beside their floor, seams at the lines of every divider, held-out
loss.

**Floor**: the same distances between as many other real images and the same reference. No model can be expected below it, and a
distance is large or small against it alone; a stand-in extractor's figures mean nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pbbench.data.images import ImageSet, training_and_held_out
from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment
from pbbench.model.diffusion import Diffusion
from pbbench.model.unet import PatchUNet
from pbbench.quality.batches import Images
from pbbench.quality.fid import MissingWeightsError, resolve_inception_weights, score
from pbbench.quality.held_out import held_out_loss
from pbbench.quality.seams import seam_figures
from pbbench.records.rows import COLUMNS

NEED_WEIGHTS = ("frechet_inception_distance", "kernel_inception_distance_mean", "patch_frechet_inception_distance")


@dataclass(frozen=True)
class RealImages:
    """What an experiment's samples are held against, decided by its data alone: the same for every divider."""

    training: ImageSet
    reference: ImageSet
    """The first ``quality.num_reference_images`` of the training images."""
    floor: ImageSet | None
    """As many real images as there are samples, none of them among the reference."""
    held_out: ImageSet | None


def real_images(experiment: Experiment) -> RealImages:
    """Opens ``experiment.data``. For the floor the held-out images serve, where there are enough of them, else training images
    that are not among the reference."""
    training, held_out = training_and_held_out(experiment)
    wanted, first = experiment.quality.num_images, min(experiment.quality.num_reference_images, len(training))
    floor = None
    if held_out is not None and len(held_out) >= wanted:
        floor = held_out.subset(0, wanted)
    elif len(training) - first >= wanted:
        floor = training.subset(first, first + wanted)
    return RealImages(training, training.subset(0, first), floor, held_out)


@dataclass
class Scorecard:
    columns: dict[str, Any] = field(default_factory=dict)
    """Of the row."""
    reasons: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """metrics: all that ``score`` says, with ``floor`` (the same for real images) and what ``left_out`` has of seams and loss;
    seams: divider → figures at its lines; held_out: the loss by band."""


def scorecard(
    samples: Images,
    real: RealImages,
    model: PatchUNet,
    diffusion: Diffusion,
    experiment: Experiment,
    *,
    dividers: Iterable[int],
    cache: Path,
    device: torch.device,
    patch_batch_size: int | None = None,
) -> Scorecard:
    """Score ``samples`` of ``model``; seams also at the lines of other ``dividers``, which no patch of the model has. ``cache``
    keeps the features of real images. Raises what ``score`` raises, but for absent Inception weights: a stand-in takes their
    place under its own name."""
    card = Scorecard()
    metrics = _distances(samples, real, experiment, cache, device, card.reasons)
    card.details["metrics"] = metrics
    seed, own = experiment.sampling.seed, model.config.patch_divider

    seams: dict[str, Any] = {}
    for d in sorted({*dividers, own} - {1}):
        try:
            seams[str(d)] = seam_figures(samples, real.reference, d, seed=seed)
        except InputError as error:  # flat samples, or patches of one pixel
            seams[str(d)] = {"reason": str(error)}
    at_own = seams.get(str(own), {"reason": "undefined without patch borders (d = 1)"})
    if "reason" in at_own:
        card.reasons |= dict.fromkeys(("seam_score", "seam_excess"), at_own["reason"])
    else:
        metrics |= {name: value for name, value in at_own.items() if name != "left_out"}
        metrics["left_out"] |= at_own["left_out"]
    card.details["seams"] = seams

    loss: dict[str, Any] = {"mean": None, "bands": []}
    if real.held_out is None:
        card.reasons["held_out_loss"] = "no images are held out (data.num_held_out is 0, or the set is small)"
    else:
        loss = held_out_loss(
            model,
            diffusion,
            real.held_out,
            seed=experiment.data_seed,
            batch_size=experiment.training.batch_size,
            patch_batch_size=patch_batch_size,
            device=device,
        )
        left_out = loss.pop("left_out")
        metrics["left_out"] |= {"held_out_loss": left_out} if left_out else {}
    card.details["held_out"] = loss
    card.columns = {name: value for name, value in metrics.items() if name in COLUMNS and name != "reasons"}
    card.columns["held_out_loss"] = loss["mean"]
    card.columns["distance_floor"], why = _first_floor(metrics)
    card.reasons |= {"distance_floor": why} if why else {}
    return card


def _distances(
    samples: Images, real: RealImages, experiment: Experiment, cache: Path, device: torch.device, reasons: dict[str, str]
) -> dict[str, Any]:
    """What ``score`` says of the samples, and under ``floor`` of real images, None where there are not enough; ``reasons``
    takes what is null."""
    quality, weights = experiment.quality, None
    try:
        weights = resolve_inception_weights(quality.inception_weights)
    except MissingWeightsError as error:
        reasons |= dict.fromkeys(NEED_WEIGHTS, f"no Inception weights: {error}")

    def against_reference(images: Images) -> dict[str, Any]:
        return score(
            images,
            real.reference,
            metrics=quality.metrics,
            extractor="inception" if weights else "random",
            weights=weights,
            kid_subset_size=quality.kid_subset_size,
            batch_size=quality.batch_size,
            device=device,
            seed=experiment.sampling.seed,
            cache=cache,
        )

    found = against_reference(samples)
    reasons |= {name: why for name, why in found["reasons"].items() if name in COLUMNS}
    if found.get("frechet_inception_distance") is None:
        reasons.setdefault("frechet_inception_distance", "; ".join(found["notes"]) or "not asked for")
    floor = None if real.floor is None else against_reference(real.floor)
    return found | {"floor": floor}


def _first_floor(metrics: dict[str, Any]) -> tuple[float | None, str]:
    """(the floor of the first distance that has one, why there is none)."""
    if metrics["floor"] is None:
        return None, "too few real images that are not among the reference (data.num_held_out, quality.num_reference_images)"
    known = [v for name, v in metrics["floor"].items() if name.endswith("distance") and metrics.get(name) is not None and v]
    return (known[0], "") if known else (None, "no distance was asked for, or none could be computed")
