"""Peaks without a GPU: the sampling and the training step of a cell, run on fake tensors and replayed on the allocator's rules.

A prediction has two halves. **Live**: the bytes of the tensors alive in the step, equal to the tracer's on a CPU to the byte.
**Allocated, reserved**: what torch's CUDA caching allocator makes of the same allocations (``memory.steady``). Not in them is
what CUDA's libraries take: workspaces and the driver's context differ by GPU and version, so they are unknown until a sweep
on such a GPU has shown them (``sweep.calibration``).

The step is the one a GPU would take (fused operators, channels_last, weights cast for good or together); that of a CPU where
the experiment is set to run on one (``device = "cpu"``).

A chunked step is traced without the chunks that only repeat others (``repeated_chunks_skipped``), and of several micro-batches
two, the first, which finds no gradients, and one that does: the peak is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pbbench.experiment.experiment import Experiment
from pbbench.records.rows import CATEGORIES
from pbbench.sweep.grid import Cell, resolve
from pbbench.sweep.planning.calibration import UNCALIBRATED, Calibration

if TYPE_CHECKING:
    from pbbench.memory.allocator.caching import AllocatorSettings
    from pbbench.memory.prediction.steady import SteadyState
    from pbbench.memory.tracer.live import LiveTrace

STEPS = ("sample_step", "train_step")
DIFFER_ON_CUDA = {
    "convolution": "cuDNN's workspace",
    "convolution_backward": "cuDNN's workspace",
    "mm": "cuBLAS's workspace, once per process",
    "addmm": "cuBLAS's workspace, once per process",
    "bmm": "cuBLAS's workspace, once per process",
    "baddbmm": "cuBLAS's workspace, once per process",
    "_scaled_dot_product_flash_attention_for_cpu": "another kernel: other statistics and random states are kept",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "another kernel, with scratch space",
    "native_group_norm_backward": "scratch space for the sums",
    "sum": "scratch space where a sum is split over blocks",
    "_to_copy": "autocast casts other operators' inputs on CUDA",
}
"""Operators whose buffers are not the same in CUDA's kernels as in a CPU's, and why."""


@dataclass(frozen=True)
class StepForecast:
    """One step: its live bytes, and the allocator's."""

    live: LiveTrace
    steady: SteadyState
    operators: list[str]

    def columns(self) -> dict[str, int]:
        """The prediction as columns of a row."""
        warm = self.steady.warm
        return {"predicted_allocated_bytes": warm.allocated_bytes, "predicted_reserved_bytes": warm.reserved_bytes}

    def as_dict(self, calibration: Calibration) -> dict[str, Any]:
        """JSON: bytes are integers; the categories sum to the live peak. What is unknown is null, with its reason."""
        phases = {
            name: {
                "peak_live_bytes": peak.peak_bytes,
                **{f"{key}_bytes": peak.by_category[key] for key in CATEGORIES},
                **{f"predicted_{key}": value for key, value in asdict(self.steady.phases[name]).items()},
            }
            for name, peak in self.live.phases.items()
        }
        return {
            "peak_live_bytes": self.live.peak_bytes,
            **{f"{key}_bytes": self.live.by_category[key] for key in CATEGORIES},
            **self.columns(),
            "cold": {f"predicted_{key}": value for key, value in asdict(self.steady.cold).items()},
            "segments": self.steady.num_segments,
            "fragmentation": round(self.steady.fragmentation, 4),
            **calibration.as_dict(self.steady.warm.reserved_bytes),
            "phases": phases,
            "differ_on_cuda": {name: DIFFER_ON_CUDA[name] for name in self.operators if name in DIFFER_ON_CUDA},
        }


@dataclass(frozen=True)
class Forecast:
    """The warm peaks of a cell's two steps."""

    cell: Cell
    sample_step: StepForecast
    train_step: StepForecast

    def as_dict(self, calibration: Calibration = UNCALIBRATED) -> dict[str, Any]:
        """JSON: the cell and both steps."""
        meter = "live tensor bytes on fake tensors; allocated and reserved: the CUDA caching allocator's rules, replayed"
        return {"meter": meter, "cell": self.cell.id, **self.cell.axes()} | {
            name: getattr(self, name).as_dict(calibration) for name in STEPS
        }


@contextmanager
def repeated_chunks_skipped(batch_size: int) -> Iterator[None]:
    """In this context a step of ``batch_size`` images runs only the chunks of patches that can differ in memory.

    They are one of each number of rows, and in training the last, which runs first and finds no gradients. Of equally long
    chunks one that straddles patch indices stands for all: its part of the target is a copy, else a view, and nothing else
    differs. Nothing of a finished chunk survives, so every other chunk repeats one of these, or needs less. The step's results
    are meaningless.
    """
    import pbbench.model.unet as sampling_loop
    import pbbench.training.train as training_loop
    from pbbench.model.patching import row_chunks

    def straddles(rows: slice) -> bool:
        return rows.start // batch_size != (rows.stop - 1) // batch_size

    def distinct(chunks: list[slice]) -> list[slice]:
        return list({rows.stop - rows.start: rows for rows in sorted(chunks, key=straddles)}.values())

    def sampled(num_rows: int, patch_batch_size: int | None) -> list[slice]:
        return distinct(row_chunks(num_rows, patch_batch_size))

    def trained(num_rows: int, patch_batch_size: int | None) -> list[slice]:
        *others, last = row_chunks(num_rows, patch_batch_size)
        return [*distinct(others), last]

    sampling_loop.row_chunks, training_loop.row_chunks = sampled, trained
    try:
        yield
    finally:
        sampling_loop.row_chunks = training_loop.row_chunks = row_chunks


def path_of(experiment: Experiment) -> AbstractContextManager[None]:
    """Within it fake tensors take the operators of the machine that ``experiment`` is for."""
    from pbbench.model import kernels

    return kernels.nowhere() if experiment.device == "cpu" else kernels.everywhere()


def forecast(
    experiment: Experiment, cell: Cell, *, every_chunk: bool = False, settings: AllocatorSettings | None = None
) -> Forecast:
    """Predict both steps of a cell: nothing is computed and no memory of any size is taken.

    every_chunk: also those that repeat others, and every micro-batch; slower, with the same peaks. settings: the allocator's.
    """
    return Forecast(
        cell,
        *(forecast_step(experiment, cell, name, every_chunk=every_chunk, settings=settings) for name in STEPS),
    )


def forecast_step(
    experiment: Experiment, cell: Cell, step: str, *, every_chunk: bool = False, settings: AllocatorSettings | None = None
) -> StepForecast:
    """Predict one step of a cell, "sample_step" or "train_step"."""
    import torch

    from pbbench.memory.prediction.fake import predict
    from pbbench.memory.prediction.steady import operators, steady_state
    from pbbench.sweep import workload

    resolved, device = resolve(experiment, cell), torch.device("cpu")
    build: Callable[..., Any] = {"sample_step": workload.sampling_workload, "train_step": workload.training_workload}[step]
    if resolved.training.gradient_accumulation_steps > 2 and not every_chunk:
        two = resolved.training.model_copy(update={"gradient_accumulation_steps": 2})
        resolved = resolved.model_copy(update={"training": two})
    with path_of(resolved), nullcontext() if every_chunk else repeated_chunks_skipped(cell.batch_size):
        live = predict(lambda: build(resolved, cell, device), record_events=True)
    return StepForecast(live, steady_state(live, settings), operators(live))
