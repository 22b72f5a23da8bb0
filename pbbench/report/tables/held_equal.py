"""What was held equal between the trainings of a run, in words; from the cells themselves, so that no table goes without it."""

from __future__ import annotations

from collections.abc import Iterable

from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import CellResult
from pbbench.report.tables.configurations import finite, memory_given, step_values
from pbbench.report.tables.formatting import least_to_most, number, whole
from pbbench.report.tables.scores import trainings


def held_equal(cells: Iterable[CellResult]) -> str | None:
    """One sentence; None where nothing was trained and scored, and no memory was given."""
    cells = list(cells)
    well = [c for c in cells if c.kind == "quality" and c.status == "ok"]
    given = memory_given(cells)
    if given is not None:
        return _equal_memory(cells, well, given)
    seen = sorted({r.images_seen for c in well for r in c.rows if r.images_seen is not None})
    if not seen:
        return None
    images = least_to_most(whole, seen)
    if any(c.details.get("equal") == "seconds" for c in well):
        return (
            f"Held equal between trainings: the time ({_seconds(well)} each, checkpoints included); they saw {images} images."
        )
    if len(seen) == 1:
        return f"Held equal between trainings: {images} images seen each (with repetition)."
    return f"Not held equal: the trainings saw {images} images."


def _seconds(trained: Iterable[CellResult]) -> str:
    return least_to_most(number, finite(c.details.get("train_seconds") for c in trained)) + " s"


def _equal_memory(cells: list[CellResult], trained: list[CellResult], given: int) -> str:
    """The memory given and what was used of it, by the meter whose prediction was held against it; what the trainings took."""
    meters = ("peak_reserved_bytes", "peak_live_bytes")
    peaks = next((found for meter in meters if (found := step_values(cells, "train_step", meter))), [])
    used = least_to_most(format_bytes, peaks) if peaks else "none"
    memory = f"{format_bytes(given)} given to a training step; measured peaks {used}"
    seen = {r.images_seen for c in trained for r in c.rows if r.images_seen is not None}
    if not seen:
        return f"Held equal between training steps: the memory ({memory})."
    return (
        f"Held equal between trainings: the memory ({memory}) and the images ({least_to_most(whole, seen)} seen each, in the "
        f"same optimizer batches); they took {_seconds(trained)}."
    )


def trained_from(cells: Iterable[CellResult]) -> str:
    """How many trainings stand behind a figure: once, or so many times from which seeds."""
    counts = sorted({len(named.get("num_images", [])) for named in trainings(cells).values()} - {0})
    if counts in ([], [1]):
        return "once"
    seeds = sorted({c.axes["seed"] for c in cells if c.kind == "quality" and c.axes.get("seed") is not None})
    times = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{times} times" + (f", from seeds {', '.join(map(str, seeds))}" if seeds else "")
