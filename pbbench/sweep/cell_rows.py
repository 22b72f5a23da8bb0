"""What every row of a cell shares, and how a failure becomes a row; for worker, scoring and parent. No torch."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from pbbench.errors import one_line
from pbbench.experiment.experiment import Experiment
from pbbench.sweep.grid import Cell

Emit = Callable[..., None]


def base_row(experiment: Experiment, cell: Cell, device: str) -> dict[str, Any]:
    """The columns that every row of a cell shares."""
    model = experiment.model
    return {
        "cell": cell.id,
        "variant": cell.variant,
        "repeat": cell.repeat,
        "device": device,
        "image_size": f"{model.size[0]}×{model.size[1]}",
        "dim": model.dim,
        "dim_mults": ",".join(map(str, model.dim_mults)),
        "patch_divider": cell.patch_divider,
        "patch_batch_size": cell.patch_batch_size,
        "batch_size": cell.batch_size,
        "gradient_accumulation_steps": experiment.training.gradient_accumulation_steps,
        "mixed_precision": cell.mixed_precision,
        "seed": experiment.seed,
    }


METERS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes", "peak_device_bytes", "peak_rss_bytes")


def columns_of(reading: Any, images: int | None = None) -> dict[str, Any]:
    """A meter's reading as columns of a row; ``images``: how many the phase handled, None where it handled none."""
    reasons = dict(reading.reasons)
    columns = {name: getattr(reading, name) for name in METERS}
    unknown = reasons.pop("energy_joules", None)
    if images is not None and unknown is None:
        columns["joules_per_image"] = reading.energy_joules / images
    elif images is not None:
        reasons["joules_per_image"] = unknown
    return {**columns, "reasons": reasons}


class NanLossError(Exception):
    """Training's loss is no longer a number; the message says at which step."""


def failure(error: BaseException, phase: str) -> tuple[str, dict[str, Any]]:
    """(status, what happened) of an exception."""
    from pbbench.memory.meters.outcome import describe_out_of_memory

    told = {"phase": phase, "type": type(error).__name__, "message": one_line(error)[:600]}
    if isinstance(error, NanLossError):
        return "nan_loss", told
    memory = describe_out_of_memory(error)
    if memory is not None:
        return "out_of_memory", told | memory
    return "crashed", told | {"traceback": traceback.format_exc(limit=-6)}


def unmeasured(status: str, told: dict[str, Any]) -> dict[str, Any]:
    why = f"{status}: {told['message'][:200]}"
    measured = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_live_bytes", "seconds_per_step", "images_per_second")
    return {"reasons": dict.fromkeys(measured, why)}


def with_reasons(columns: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both sets of columns, with the reasons of both."""
    return {**columns, **more, "reasons": {**columns.get("reasons", {}), **more.get("reasons", {})}}


def with_reason(columns: dict[str, Any], name: str, why: str) -> dict[str, Any]:
    return {**columns, "reasons": {**columns.get("reasons", {}), name: why}}
