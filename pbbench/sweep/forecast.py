"""Peaks without a GPU: the sampling and the training step of a cell, run on fake tensors, with their live bytes counted.

These are live tensor bytes (each storage rounded up to 512 bytes): what max_memory_allocated counts, less the buffers that
CUDA's own kernels ask for. What the caching allocator reserves and what the driver's context takes is not in them.

A chunked step is traced without the chunks that only repeat others (``repeated_chunks_skipped``): the peak is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pbbench.config import Experiment
from pbbench.records import CATEGORIES, format_bytes
from pbbench.sweep.grid import Cell

if TYPE_CHECKING:
    from rich.table import Table

    from pbbench.memory.tensors import LiveTrace


@dataclass(frozen=True)
class Forecast:
    """The warm peaks of a cell's two steps."""

    cell: Cell
    sample_step: LiveTrace
    train_step: LiveTrace

    def as_dict(self) -> dict[str, Any]:
        """JSON: bytes are integers; the categories of each step sum to its peak."""
        steps = {"sample_step": self.sample_step, "train_step": self.train_step}
        return {"meter": "live tensor bytes on fake tensors", "cell": self.cell.id, **self.cell.axes()} | {
            name: {"peak_live_bytes": live.peak_bytes, **{f"{key}_bytes": live.by_category[key] for key in CATEGORIES}}
            for name, live in steps.items()
        }


@contextmanager
def repeated_chunks_skipped(batch_size: int) -> Iterator[None]:
    """In this context a step of ``batch_size`` images runs only the chunks of patches that can differ in memory.

    They are one of each kind, and in training the last, which runs first and finds no gradients: chunks have equal kinds where
    they have equally many rows and either both are a view of the images (a single patch index) or both a copy (they straddle
    indices). Nothing of a finished chunk survives, so every other chunk repeats one of these. The step's results are
    meaningless.
    """
    import pbbench.model.unet as sampling_loop
    import pbbench.training.train as training_loop
    from pbbench.model.patching import row_chunks

    def kind(rows: slice) -> tuple[int, bool]:
        return rows.stop - rows.start, rows.start // batch_size == (rows.stop - 1) // batch_size

    def sampled(num_rows: int, patch_batch_size: int | None) -> list[slice]:
        return list({kind(rows): rows for rows in row_chunks(num_rows, patch_batch_size)}.values())

    def trained(num_rows: int, patch_batch_size: int | None) -> list[slice]:
        *others, last = row_chunks(num_rows, patch_batch_size)
        return [*{kind(rows): rows for rows in others}.values(), last]

    sampling_loop.row_chunks, training_loop.row_chunks = sampled, trained
    try:
        yield
    finally:
        sampling_loop.row_chunks = training_loop.row_chunks = row_chunks


def forecast(experiment: Experiment, cell: Cell, *, every_chunk: bool = False) -> Forecast:
    """Trace a cell's steps on fake tensors: nothing is computed and no memory of any size is taken.

    every_chunk: also those that repeat others; slower, with the same peaks.
    """
    import torch

    from pbbench.memory.predict import predict
    from pbbench.sweep.workload import sampling_workload, training_workload

    resolved, device = experiment.with_divider(cell.patch_divider), torch.device("cpu")
    with nullcontext() if every_chunk else repeated_chunks_skipped(cell.batch_size):
        return Forecast(
            cell,
            predict(lambda: sampling_workload(resolved, cell, device)),
            predict(lambda: training_workload(resolved, cell, device)),
        )


def forecast_table(experiment: Experiment, cells: list[Cell]) -> Table:
    """One line per cell; quality cells are listed with what they will do."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    height, width = experiment.model.size
    title = f"Predicted peaks: {height} × {width} images, dim {experiment.model.dim}, widths × {experiment.model.dim_mults}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, caption_justify="left")
    table.add_column("cell", no_wrap=True)
    for name in ("sampling\npeak", "its\nactivations", "training\npeak", "its\nactivations"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        if cell.kind == "measure":
            found = forecast(experiment, cell)
            peaks = [(live.peak_bytes, live.by_category["activation"]) for live in (found.sample_step, found.train_step)]
            table.add_row(cell.id, *(format_bytes(count) for pair in peaks for count in pair))
        else:
            table.add_row(cell.id, "–", "–", "–", "–")
    table.caption = (
        "d: divider, p: patches a pass, b: batch size, then the precision. Live tensor bytes, each storage rounded up to 512; "
        "the allocator's reserve, workspaces and the CUDA context come on top."
    )
    if any(cell.kind == "quality" for cell in cells):
        budget = f"{experiment.training.num_steps:,} steps of {experiment.training.batch_size} images"
        table.caption += f" A quality cell trains {budget} and scores {experiment.quality.num_images:,} samples."
    return table
