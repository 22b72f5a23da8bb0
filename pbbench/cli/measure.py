"""The commands that measure, predict and compare: sweep, predict, report, compare, doctor."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pbbench.cli.options import memory_size, whole_numbers
from pbbench.cli.overrides import (
    BatchSizes,
    Device,
    Dividers,
    ExperimentFile,
    Json,
    PatchBatch,
    Preset,
    Settings,
    divider_section,
    laid_over,
)
from pbbench.errors import InputError
from pbbench.experiment.presets import load_experiment
from pbbench.experiment.settings import PatchBatchSize


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

    from pbbench.records.environment import probe
    from pbbench.report import terminal_table
    from pbbench.sweep.grid import plan
    from pbbench.sweep.live import LiveView
    from pbbench.sweep.planning.fit import fit_to_memory
    from pbbench.sweep.run import Shard, run_sweep

    if executor not in ("local", "slurm"):
        raise InputError(f"--executor {executor!r} is not known; choose local or slurm")
    if shard and out is None:
        raise InputError("--shard: name the folder that all shards share with --out")
    part = Shard.parse(shard) if shard else None
    axes = _axes(dividers, patch_batch_size, batch_size)
    overrides = laid_over(
        set_, sweep={**axes, "quality": False if memory_only else None}, model=divider_section(axes["dividers"])
    )
    if resume and out is None:
        out = _newest_run()
    if resume and out and (out / "experiment.toml").exists() and not (overrides or experiment or preset):
        experiment = out / "experiment.toml"
    # The machine that submits to Slurm need not have a GPU; each job looks at its own.
    found = None if executor == "local" else device or "cuda"
    if dry_run:  # nothing runs, so a GPU may be planned for where there is none
        found = found or device or ("cuda" if preset == "gpu" else None)
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
        from pbbench.sweep.planning.predictions import forecast_table

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

    from pbbench.sweep.grid import plan
    from pbbench.sweep.planning import predictions
    from pbbench.sweep.planning.calibration import UNCALIBRATED, calibrate
    from pbbench.sweep.planning.fit import fit_to_memory
    from pbbench.sweep.planning.forecast import forecast

    axes = _axes(dividers, patch_batch_size, batch_size)
    preset = preset or (None if experiment else "gpu")
    limit = memory_size("--memory-limit", memory_limit)
    overrides = laid_over(set_, sweep={**axes, "quality": False}, model=divider_section(axes["dividers"]))
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


def report(run: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's folder.")]) -> None:
    """Write a run's report again: tables, figures, HTML, LaTeX."""
    from rich.console import Console

    from pbbench.report import terminal_table, write_report

    write_report(run)
    Console().print(terminal_table(run))
    typer.echo(f"report: {run / 'report.html'}", err=True)


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

    from pbbench.report.compare.output import to_json, to_page, to_terminal
    from pbbench.report.compare.runs import compare as compare_runs

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


def doctor(device: Device = None, json_: Json = False) -> None:
    """Say what this machine can measure and what not, and why; exit code 1 where a sweep cannot run."""
    from rich.console import Console

    from pbbench.doctor.examine import as_json, as_table, can_run, examine

    checks = examine(device or "auto")
    if json_:
        typer.echo(json.dumps(as_json(checks), indent=1))
    else:
        Console().print(as_table(checks))
    raise typer.Exit(0 if can_run(checks) else 1)


def _axes(dividers: list[str] | None, patches: list[str] | None, batches: list[str] | None) -> dict[str, Any]:
    return {
        "dividers": whole_numbers("--dividers", dividers),
        "patch_batch_sizes": _patch_batch_sizes(patches),
        "batch_sizes": whole_numbers("--batch-size", batches),
    }


def _patch_batch_sizes(values: list[str] | None) -> list[PatchBatchSize]:
    """ "index", "all" and numbers stay; anything else is refused when the experiment is checked."""
    return [int(v) if v.isdecimal() else v for v in values or ()]  # type: ignore[misc]
