"""What was held equal between the trainings of a run, in words; from the cells themselves, so that no table goes without it."""

from __future__ import annotations

from collections.abc import Iterable

from pbbench.records import CellResult
from pbbench.report import tables
from pbbench.report.sheet import number, whole


def held_equal(cells: Iterable[CellResult]) -> str | None:
    """One sentence; None where nothing was trained and scored."""
    well = [c for c in cells if c.kind == "quality" and c.status == "ok"]
    seen = sorted({r.images_seen for c in well for r in c.rows if r.images_seen is not None})
    if not seen:
        return None
    images = whole(seen[0]) if len(seen) == 1 else f"{whole(seen[0])} to {whole(seen[-1])}"
    if any(c.details.get("equal") == "seconds" for c in well):
        seconds = tables.finite(c.details.get("train_seconds") for c in well)
        ends = dict.fromkeys(number(pick(seconds)) for pick in (min, max))
        took = " to ".join(ends)
        return f"Held equal between trainings: the time ({took} s each, checkpoints included); they saw {images} images."
    if len(seen) == 1:
        return f"Held equal between trainings: {images} images seen each (with repetition)."
    return f"Not held equal: the trainings saw {images} images."


def trained_from(cells: Iterable[CellResult]) -> str:
    """How many trainings stand behind a figure: once, or so many times from which seeds."""
    counts = sorted({len(named.get("num_images", [])) for named in tables.trainings(cells).values()} - {0})
    if counts in ([], [1]):
        return "once"
    seeds = sorted({c.axes["seed"] for c in cells if c.kind == "quality" and c.axes.get("seed") is not None})
    times = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{times} times" + (f", from seeds {', '.join(map(str, seeds))}" if seeds else "")
