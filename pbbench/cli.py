"""The command line: parse, call one function, print. Heavy imports happen inside the command that needs them.

Results go to stdout (``--json``: JSON and nothing else), progress and notes to stderr. Exit codes: 0 done; 1 done, but
something in it failed or a gate was crossed; 2 bad input; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pbbench import __version__
from pbbench.config import load_experiment, parse_override
from pbbench.errors import InputError
from pbbench.options import ManyValues, memory_size, run_app, whole_numbers
from pbbench.settings import PatchBatchSize

app = typer.Typer(
    name="pbbench",
    help="What patch-wise diffusion costs and saves: memory, speed and image quality per patch divider.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Prepare sets of images for quick loading.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")

Dividers = Annotated[
    list[str] | None, typer.Option("--dividers", metavar="D...", help="Patch dividers d: the image becomes d × d patches.")
]
PatchBatch = Annotated[
    list[str] | None,
    typer.Option(
        "--patch-batch-size", metavar="P...", help="Patches per pass: a number, index (one patch index at a time), all."
    ),
]
BatchSizes = Annotated[list[str] | None, typer.Option("--batch-size", metavar="N...", help="Images per batch.")]
ExperimentFile = Annotated[Path | None, typer.Option("--experiment", metavar="FILE", help="Experiment file (TOML).")]
Preset = Annotated[str | None, typer.Option("--preset", metavar="NAME", help="A file of experiments/, by name.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set section.key=value over the experiment.")
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to run.  [default: the experiment's; auto]")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pbbench {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def _overrides(settings: list[str] | None, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """--set, then the options that have names of their own (those that were given)."""
    named = {name: {k: v for k, v in section.items() if v not in (None, [])} for name, section in sections.items()}
    return [
        *(parse_override(text) for text in settings or ()),
        *({name: section} for name, section in named.items() if section),
    ]


def _patch_batch_sizes(values: list[str] | None) -> list[PatchBatchSize]:
    """ "index", "all" and numbers stay; anything else is refused when the experiment is checked."""
    return [int(v) if v.isdecimal() else v for v in values or ()]  # type: ignore[misc]


def _axes(dividers: list[str] | None, patches: list[str] | None, batches: list[str] | None) -> dict[str, Any]:
    return {
        "dividers": whole_numbers("--dividers", dividers),
        "patch_batch_sizes": _patch_batch_sizes(patches),
        "batch_sizes": whole_numbers("--batch-size", batches),
    }


def _divider_section(dividers: list[int]) -> dict[str, Any]:
    """A sweep's experiment is checked at its first divider; ``sweep.grid.plan`` checks the others."""
    return {"patch_divider": dividers[0]} if dividers else {}


@app.command(cls=ManyValues)
def sweep(
    dividers: Dividers = None,
    patch_batch_size: PatchBatch = None,
    batch_size: BatchSizes = None,
    experiment: ExperimentFile = None,
    preset: Preset = None,
    set_: Settings = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run's folder.  [default: results/sweep-NAME-TIME]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted sweep (the newest, or --out).")] = False,
    any_environment: Annotated[
        bool, typer.Option("--any-environment", help="Resume also on another machine or version.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells with their predicted peaks, and nothing more.")
    ] = False,
    memory_only: Annotated[bool, typer.Option("--memory-only", help="Memory and speed only: no training, no scores.")] = False,
    executor: Annotated[
        str, typer.Option("--executor", metavar="local|slurm", help="Here, one cell per GPU, or as an array job of Slurm.")
    ] = "local",
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Only cells I, I+N, ... of the plan, for other schedulers.")
    ] = None,
) -> None:
    """Measure memory, speed and quality of each patch divider, and write the report."""
    from rich.console import Console

    from pbbench.environment import probe
    from pbbench.report import terminal_table
    from pbbench.sweep.fit import fit_to_memory
    from pbbench.sweep.grid import plan
    from pbbench.sweep.live import LiveView
    from pbbench.sweep.run import Shard, run_sweep

    if executor not in ("local", "slurm"):
        raise InputError(f"--executor {executor!r} is not known; choose local or slurm")
    if shard and out is None:
        raise InputError("--shard: name the folder that all shards share with --out")
    part = Shard.parse(shard) if shard else None
    axes = _axes(dividers, patch_batch_size, batch_size)
    overrides = _overrides(
        set_, sweep={**axes, "quality": False if memory_only else None}, model=_divider_section(axes["dividers"])
    )
    if resume and out is None:
        out = _newest_run()
    if resume and out and (out / "experiment.toml").exists() and not (overrides or experiment or preset):
        experiment = out / "experiment.toml"
    # The machine that submits to Slurm need not have a GPU; each job looks at its own.
    found = None if executor == "local" else device or "cuda"
    if experiment is None and preset is None:
        found = found or str(probe(device or "auto")["device"])
        preset = {"cpu": "cpu"}.get(found, "gpu")
    settings = load_experiment(experiment, preset, overrides)
    if executor == "slurm" and device is None and settings.device != "auto":
        found = settings.device
    found = found or str(probe(device or settings.device)["device"])
    settings = settings.model_copy(update={"device": found})
    console = Console(stderr=True)
    settings = fit_to_memory(settings, found, run=out, tell=lambda line: console.print(line, highlight=False, markup=False))
    cells = plan(settings)
    if dry_run:
        from pbbench.sweep.predictions import forecast_table

        Console().print(forecast_table(settings, cells))
        return
    out = out or Path("results") / f"sweep-{settings.name}-{datetime.now():%Y%m%d-%H%M%S}"
    with LiveView(console) as view:
        ended = run_sweep(
            settings,
            found,
            out,
            resume=resume,
            any_environment=any_environment,
            listener=view,
            executor="slurm" if executor == "slurm" else "local",
            shard=part,
        )
    if not ended.complete:
        console.print(f"this shard is done; the report follows with the last one, or by pbbench report {out}", highlight=False)
        raise typer.Exit(0 if ended.fine else 1)
    Console().print(terminal_table(out))
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if ended.fine else 1)


def _newest_run() -> Path:
    runs = sorted(Path("results").glob("sweep-*/experiment.toml"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError("--resume: there is no results/sweep-* folder here; name the run's folder with --out")
    return runs[-1].parent


@app.command(cls=ManyValues)
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
    settings = load_experiment(experiment, preset, _overrides(set_, model=_divider_section(divided)))
    from pbbench.environment import resolve_device
    from pbbench.training.train import train as train_model

    settings = settings.model_copy(update={"device": resolve_device(device or settings.device)})
    result = train_model(settings, out, resume=resume, show_bar=True)
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks
        typer.echo(str(result.checkpoint) if result.checkpoint else "no checkpoint was saved")
        if result.status != "ok":
            typer.echo(f"pbbench: the loss was not a number at step {result.steps}; training stopped", err=True)
    raise typer.Exit(0 if result.status == "ok" else 1)


@app.command(cls=ManyValues)
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
    """Draw images from a checkpoint's averaged weights."""
    from pbbench.environment import resolve_device
    from pbbench.training.generate import sample_to_folder

    count = whole_numbers("--num-images", [num_images])[0]
    sampling = {
        "sampler": sampler,
        "num_inference_steps": next(iter(whole_numbers("--steps", [steps] if steps else None)), None),
        "seed": seed,
    }
    overrides = _overrides(set_, sampling=sampling)
    written = sample_to_folder(checkpoint, count, out, overrides, resolve_device(device or "auto"))
    if os.environ.get("RANK", "0") == "0":
        typer.echo(str(written))


@app.command(cls=ManyValues)
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
    """FID, KID, precision and recall between two sets of images."""
    from pbbench.environment import resolve_device
    from pbbench.sweep.score_sets import METRICS, lines, score_sets

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
    if json_:
        typer.echo(json.dumps(scores, indent=1))
        return
    for line in lines(scores):
        typer.echo(line)


@app.command(cls=ManyValues)
def predict(
    dividers: Dividers = None,
    patch_batch_size: PatchBatch = None,
    batch_size: BatchSizes = None,
    experiment: ExperimentFile = None,
    preset: Preset = None,
    set_: Settings = None,
    memory_limit: Annotated[
        str | None,
        typer.Option("--memory-limit", metavar="SIZE", help="Search what fits: the largest batch and the fastest setting."),
    ] = None,
    step: Annotated[
        str, typer.Option("--step", metavar="train|sample", help="The step that --memory-limit is about.")
    ] = "train",
    precisions: Annotated[
        list[str] | None,
        typer.Option("--precisions", metavar="no|bf16|fp16...", help="Precisions to choose from.  [default: the experiment's]"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="DIR", help="A sweep on a GPU: its workspaces and context are added."),
    ] = None,
    json_: Json = False,
) -> None:
    """Peak memory of a CUDA run, predicted without a GPU (default: the paper's network)."""
    from rich.console import Console

    from pbbench.sweep import predictions
    from pbbench.sweep.calibration import UNCALIBRATED, calibrate
    from pbbench.sweep.fit import fit_to_memory
    from pbbench.sweep.forecast import forecast
    from pbbench.sweep.grid import plan

    axes = _axes(dividers, patch_batch_size, batch_size)
    preset = preset or (None if experiment else "gpu")
    limit = memory_size("--memory-limit", memory_limit)
    overrides = _overrides(set_, sweep={**axes, "quality": False}, model=_divider_section(axes["dividers"]))
    settings = load_experiment(experiment, preset, overrides)
    terms = calibrate(calibration) if calibration else UNCALIBRATED
    shown: Any
    if limit is None:
        settings = fit_to_memory(settings, "cpu" if settings.device == "cpu" else "cuda", calibration=terms)
    if limit is not None:
        found = predictions.search(settings, limit, step, precisions or (), terms)
        shown = found if json_ else predictions.search_table(settings, found)
    elif json_:
        shown = [forecast(settings, cell).as_dict(terms) for cell in plan(settings)]
    else:
        shown = predictions.forecast_table(settings, plan(settings), terms)
    if json_:
        typer.echo(json.dumps(shown, indent=1))
    else:
        Console().print(shown)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's folder.")]) -> None:
    """Write a run's report again: tables, figures, HTML, LaTeX."""
    from rich.console import Console

    from pbbench.report import terminal_table, write_report

    write_report(run)
    Console().print(terminal_table(run))
    typer.echo(f"report: {run / 'report.html'}", err=True)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="DIR_A", help="The sweep to compare with.")],
    run_b: Annotated[Path, typer.Argument(metavar="DIR_B", help="The sweep to judge.")],
    max_increase: Annotated[
        str | None,
        typer.Option("--max-increase", metavar="1%", help="Exit with 1 where a warm peak of B is higher by more (1% or 0.01)."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    json_: Json = False,
) -> None:
    """Compare two sweeps cell by cell: memory, speed, quality."""
    from rich.console import Console

    from pbbench.report.compare import compare as compare_runs
    from pbbench.report.compare_text import to_json, to_page, to_terminal

    if markdown and json_:
        raise InputError("--markdown and --json exclude each other")
    found = compare_runs(run_a, run_b, max_increase)
    if json_:
        typer.echo(json.dumps(to_json(found), indent=1))
    elif markdown:
        typer.echo(to_page(found), nl=False)
    else:
        for part in to_terminal(found):
            Console().print(part, highlight=False, markup=False)
    for line in found.failures:
        typer.echo(f"pbbench: {line}", err=True)
    raise typer.Exit(1 if found.failures else 0)


@app.command()
def convert(
    config: Annotated[Path, typer.Option("--config", metavar="C.json", help="The reference's configuration.")],
    checkpoint: Annotated[Path, typer.Option("--checkpoint", metavar="FILE", help="The reference's model-last.pt.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new checkpoint folder.")],
) -> None:
    """Turn a checkpoint of the reference code into one of pbbench."""
    from pbbench.training.convert import convert_reference

    typer.echo(str(convert_reference(config, checkpoint, out)))


@app.command()
def doctor(device: Device = None, json_: Json = False) -> None:
    """Say what this machine can measure and what not, and why; exit code 1 where a sweep cannot run."""
    from rich.console import Console

    from pbbench.doctor import as_json, as_table, can_run, examine

    checks = examine(device or "auto")
    if json_:
        typer.echo(json.dumps(as_json(checks), indent=1))
    else:
        Console().print(as_table(checks))
    raise typer.Exit(0 if can_run(checks) else 1)


@data.command(cls=ManyValues)
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
    from pbbench.training.entries import notice
    from pbbench.training.prepare import prepare as prepare_images

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


def main() -> None:
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
