"""The commands about one model and its images: train, sample, fid, convert, data prepare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pbbench.cli.options import whole_numbers
from pbbench.cli.overrides import (
    Device,
    ExperimentFile,
    Json,
    Preset,
    Settings,
    divider_section,
    laid_over,
)
from pbbench.errors import InputError
from pbbench.experiment.presets import load_experiment
from pbbench.processes import is_main_process


def train(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Checkpoints, samples and logs go here.")],
    divider: Annotated[
        str | None, typer.Option("--divider", metavar="D", help="Patch divider.  [default: the experiment's]")
    ] = None,
    experiment: ExperimentFile = None,
    preset: Preset = None,
    set_: Settings = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
) -> None:
    """Train one divider (alone, or under accelerate launch or torchrun)."""
    divided = whole_numbers("--divider", [divider] if divider else None)
    settings = load_experiment(experiment, preset, laid_over(set_, model=divider_section(divided)))
    from pbbench.records.environment import resolve_device
    from pbbench.training.train import train as train_model

    settings = settings.model_copy(update={"device": resolve_device(device or settings.device)})
    result = train_model(settings, out, resume=resume, show_bar=True)
    if is_main_process():
        typer.echo(str(result.checkpoint) if result.checkpoint else "no checkpoint was saved")
        if result.status != "ok":
            typer.echo(f"pbbench: the loss was not a number at step {result.steps}; training stopped", err=True)
    raise typer.Exit(0 if result.status == "ok" else 1)


def sample(
    checkpoint: Annotated[Path, typer.Option("--checkpoint", metavar="DIR", help="A checkpoint, or a training run's folder.")],
    num_images: Annotated[str, typer.Option("--num-images", metavar="N", help="Images to draw.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="An empty or new folder for the PNG files.")],
    sampler: Annotated[
        str | None, typer.Option("--sampler", metavar="ddpm|ddim|dpm++", help="[default: the experiment's]")
    ] = None,
    steps: Annotated[str | None, typer.Option("--steps", metavar="N", help="Network calls per image.")] = None,
    seed: Annotated[str | None, typer.Option("--seed", metavar="N", help="Noise comes from (seed, image index, step).")] = None,
    set_: Settings = None,
    device: Device = None,
) -> None:
    """Draw images from a checkpoint's averaged weights (alone, or under torchrun)."""
    from pbbench.records.environment import resolve_device
    from pbbench.training.generate import sample_to_folder

    count = whole_numbers("--num-images", [num_images])[0]
    sampling = {
        "sampler": sampler,
        "num_inference_steps": next(iter(whole_numbers("--steps", [steps] if steps else None)), None),
        "seed": seed,
    }
    overrides = laid_over(set_, sampling=sampling)
    written = sample_to_folder(checkpoint, count, out, overrides, resolve_device(device or "auto"))
    if is_main_process():
        typer.echo(str(written))


def fid(
    samples: Annotated[str, typer.Option("--samples", metavar="PATH", help="Folder, zip, checkpoint folder, or synthetic.")],
    reference: Annotated[
        str, typer.Option("--reference", metavar="PATH", help="Folder, zip, checkpoint folder, or synthetic.")
    ],
    metrics: Annotated[
        list[str] | None, typer.Option("--metrics", metavar="fid|kid|prc|patch...", help="[default: fid kid prc]")
    ] = None,
    inception_weights: Annotated[
        Path | None,
        typer.Option(
            "--inception-weights",
            metavar="FILE",
            envvar="PBBENCH_INCEPTION_WEIGHTS",
            help="torch-fidelity's Inception weights.",
        ),
    ] = None,
    num_images: Annotated[
        str | None,
        typer.Option("--num-images", metavar="N", help="Images of a checkpoint or of synthetic; of the others at most."),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="S",
            help="Size that images are brought to.  [default: the checkpoint's, else the first image's]",
        ),
    ] = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """FID, KID, precision and recall between two sets of images (alone, or under torchrun)."""
    from pbbench.quality.score_sets import METRICS, lines, score_sets
    from pbbench.records.environment import resolve_device

    count, size = (
        whole_numbers("--num-images", [num_images] if num_images else None),
        whole_numbers("--image-size", [image_size] if image_size else None),
    )
    scores = score_sets(
        samples,
        reference,
        metrics=metrics or METRICS,
        weights=str(inception_weights) if inception_weights else None,
        num_images=count[0] if count else None,
        image_size=size[0] if size else None,
        device=resolve_device(device or "auto"),
    )
    if is_main_process():
        typer.echo(json.dumps(scores, indent=1) if json_ else "\n".join(lines(scores)))


def score(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Checkpoints, or training runs' folders.")],
    every: Annotated[bool, typer.Option("--every", help="Every checkpoint that a run kept, not the latest alone.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The trained weights themselves instead of their average.")] = False,
    set_: Settings = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Score checkpoints: distances beside their floor, seams, held-out loss."""
    import torch

    from pbbench.quality.score_checkpoints import lines, score_checkpoints
    from pbbench.records.environment import resolve_device

    found = score_checkpoints(
        checkpoints,
        laid_over(set_),
        torch.device(resolve_device(device or "auto")),
        which="model" if raw else "ema",
        every=every,
        told=lambda line: typer.echo(line, err=True),
    )
    typer.echo(json.dumps(found, indent=1) if json_ else "\n".join(lines(found)))


def convert(
    config: Annotated[Path, typer.Option("--config", metavar="C.json", help="The reference's configuration.")],
    checkpoint: Annotated[Path, typer.Option("--checkpoint", metavar="FILE", help="The reference's model-last.pt.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new checkpoint folder.")],
) -> None:
    """Turn a checkpoint of the reference code into one of pbbench."""
    from pbbench.training.convert import convert_reference

    typer.echo(str(convert_reference(config, checkpoint, out)))


def prepare(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, zip, LMDB folder (LSUN), or synthetic.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or one to go on with; then: data.source=OUT.")],
    size: Annotated[str, typer.Option("--size", metavar="S", help="128, or height x width as 96x128.")],
    num_images: Annotated[
        str | None, typer.Option("--num-images", metavar="N", help="Readable images to take.  [default: all; synthetic 10,000]")
    ] = None,
    num_workers: Annotated[
        str | None, typer.Option("--num-workers", metavar="N", help="Threads that decode.  [default: one per core, to 16]")
    ] = None,
) -> None:
    """Resize a set of images once into arrays that load by memory map; running again goes on, or checks what is there."""
    from pbbench.data.entries import notice
    from pbbench.data.prepare import prepare as prepare_images

    sides = whole_numbers("--size", size.split("x"))
    if len(sides) > 2:
        raise InputError(f"--size: {size!r} is neither a number nor height x width, as 128 or 96x128")
    count, threads = (
        next(iter(whole_numbers(name, [text] if text is not None else None)), None)
        for name, text in (("--num-images", num_images), ("--num-workers", num_workers))
    )
    prepared = prepare_images(
        source, out, (sides[0], sides[-1]), count, threads, tell=lambda line: typer.echo(f"pbbench: {line}", err=True)
    )
    typer.echo(notice(prepared.describe(prepared.num_images), prepared.broken), err=True)
    typer.echo(str(out))
