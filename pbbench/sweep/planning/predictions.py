"""Predictions as people and programs read them: the peaks of planned cells, and what fits under a limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment
from pbbench.experiment.settings import Precision
from pbbench.experiment.sizes import format_bytes
from pbbench.sweep.grid import Cell, images_a_step, quality_experiment, trainings
from pbbench.sweep.planning.calibration import UNCALIBRATED, Calibration
from pbbench.sweep.planning.duration import WORDS, Durations, clock
from pbbench.sweep.planning.fit import beyond_memory, in_words
from pbbench.sweep.planning.forecast import forecast
from pbbench.sweep.planning.search import Fit, Search

STEPS = {"train": "train_step", "sample": "sample_step"}
PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")


def forecast_table(experiment: Experiment, cells: Sequence[Cell], calibration: Calibration = UNCALIBRATED) -> Table:
    """One line per cell; quality cells are listed with what they will do."""
    table = _table("Predicted peaks in MiB", experiment)
    table.padding = (0, 0, 0, 1)  # so that no figure is cut at 80 columns
    table.add_column("cell", no_wrap=True)
    for step in ("sample", "train"):
        for name in ("live", "activ.", "reserved"):
            table.add_column(f"{step}\n{name}", justify="right", no_wrap=True)
    table.add_column("about\nm:s", justify="right", no_wrap=True)
    durations, whole = Durations(experiment), 0.0
    for cell in cells:
        seconds = durations.of(cell) if beyond_memory(experiment, cell, experiment.device) is None else 0.0
        whole += seconds
        if cell.kind == "measure" and beyond_memory(experiment, cell, experiment.device) is None:
            found = forecast(experiment, cell)
            counts: list[int] = []
            for predicted in (found.sample_step, found.train_step):
                live = predicted.live
                counts += [live.peak_bytes, live.by_category["activation"], predicted.steady.warm.reserved_bytes]
            table.add_row(cell.id, *map(_mib, counts), clock(seconds))
        else:
            table.add_row(cell.id, *["–"] * 6, clock(seconds) if seconds else "–")
    table.caption = (
        "d: divider, p: patches a pass, b: batch size, then the precision. Live: tensor bytes. "
        f"Reserved: what CUDA's caching allocator would hold. {calibration.describe()} "
        f"About {clock(whole)} in all on {WORDS[durations.kind]}."
    )
    given = experiment.sweep.equal_memory
    if given is not None:
        table.caption += f" Each training step is given {format_bytes(given)}."
        for place, fit in experiment.sweep.fitted.items():
            variant, _, divider = place.rpartition("/")
            table.caption += f" {f'{variant}, ' * bool(variant)}d={divider}: {in_words(fit, given)}."
    if any(cell.kind == "quality" for cell in cells):
        trained = quality_experiment(experiment)
        loaded = not trainings(experiment, list(cells))
        budget = f"{trained.training.num_steps:,} steps of {images_a_step(trained.training)} images"
        if experiment.sweep.equal_seconds is not None:
            budget = f"for {experiment.sweep.equal_seconds:g} seconds"
        doing = "loads a trained network" if loaded else f"trains {budget}"
        table.caption += f" A quality cell {doing} and scores {trained.quality.num_images:,} samples."
        if trained is not experiment:
            size = "×".join(map(str, trained.model.size))
            network = f"dim {trained.model.dim}, {size} pixels ({experiment.sweep.quality_from})"
            table.caption += f" They are of another network: {network}."
    return table


def search(
    experiment: Experiment, limit_bytes: int, step: str, precisions: Sequence[str], calibration: Calibration = UNCALIBRATED
) -> dict[str, Any]:
    """What fits under a limit, per divider of ``experiment.sweep``: the largest batch; for the experiment's batch (the first
    of ``sweep.batch_sizes``, else the training's) the fastest setting; of these the fastest of all. JSON. Raises InputError.
    """
    if step not in STEPS:
        raise InputError(f"--step: {step!r} is not known; choose train or sample")
    strangers = [name for name in precisions if name not in PRECISIONS]
    if strangers:
        raise InputError(f"--precisions: {strangers[0]!r} is not known; choose from {', '.join(PRECISIONS)}")
    section: Any = experiment.training if step == "train" else experiment.sampling
    chosen: tuple[Precision, ...] = tuple(name for name in PRECISIONS if name in precisions) or (section.mixed_precision,)
    batch = experiment.sweep.batch_sizes[0] if experiment.sweep.batch_sizes else section.batch_size
    for divider in experiment.sweep.dividers:
        experiment.with_divider(divider)
    seeking = Search(experiment, STEPS[step], limit_bytes, calibration)
    lines: list[dict[str, Any]] = []
    for divider in experiment.sweep.dividers:
        fastest, most = seeking.fastest(divider, batch, chosen), seeking.largest_batch(divider)
        lines.append({"patch_divider": divider, "fastest": _dict(fastest), "largest_batch": _dict(most)})
    fitting = [line["fastest"] for line in lines if line["fastest"]]
    return {
        "step": STEPS[step],
        "memory_limit_bytes": limit_bytes,
        "batch_size": batch,
        "precisions": list(chosen),
        "calibration": calibration.describe(),
        "dividers": lines,
        "fastest_divider": min(fitting, key=lambda fit: fit["relative_cost"])["patch_divider"] if fitting else None,
    }


def _dict(fit: Fit | None) -> dict[str, Any] | None:
    return fit.as_dict() if fit else None


def search_table(experiment: Experiment, found: dict[str, Any]) -> Table:
    """The search's result for people."""
    limit, batch = format_bytes(found["memory_limit_bytes"]), found["batch_size"]
    doing = {"train_step": "Training", "sample_step": "Sampling"}[found["step"]]
    table = _table(f"{doing} within {limit}", experiment)
    table.add_column("d", justify="right")
    for name in ("patches\na pass", "recom-\npute", "auto-\ncast", "needs", "margin", "largest\nbatch", "needs"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in found["dividers"]:
        fast, most = line["fastest"], line["largest_batch"]
        mark = " *" if line["patch_divider"] == found["fastest_divider"] and len(found["dividers"]) > 1 else ""
        texts = ["–"] * 5
        if fast:
            texts = [str(fast["patch_batch_size"]), fast["recompute"], fast["mixed_precision"]]
            texts += [format_bytes(fast["with_known_terms_bytes"]), format_bytes(fast["margin_bytes"])]
        ends = [f"{most['batch_size']:,}", format_bytes(most["with_known_terms_bytes"])] if most else ["none", "–"]
        table.add_row(f"{line['patch_divider']}{mark}", *texts, *ends)
    section: Any = experiment.training if found["step"] == "train_step" else experiment.sampling
    table.caption = (
        f"Left: the fastest setting for batch {batch}, by an estimate of the time that only ranks (pbbench sweep measures); "
        "–: none fits. Needs: predicted reserved bytes of a warm step. Largest batch: with patch_batch_size = "
        f"{section.patch_batch_size}, as the experiment has it. "
        + ("* least estimated time. " if len(found["dividers"]) > 1 else "")
        + found["calibration"]
    )
    return table


def _mib(nbytes: int) -> str:
    mib = nbytes / 2**20
    return f"{mib:,.0f}" if mib >= 100 else f"{mib:.1f}"


def _table(what: str, experiment: Experiment) -> Table:
    height, width = experiment.model.size
    title = f"{what}: {height} × {width} images, dim {experiment.model.dim}, widths × {experiment.model.dim_mults}"
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, caption_justify="left")
