"""``pbbench fid``: scores of two sets of images, each a folder, a zip, the built-in scenes or a checkpoint's samples.

Files are read in the order of their paths and KID's subsets are drawn from torch-fidelity's own seed, so that the figures are
those of its command line on the same folders to the last digit: the order decides which images a subset holds, and how the
sums are rounded. The processes of a torchrun share the images out by whole batches of the extractor (``quality.features``), so
the digits are those of one process, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pbbench.errors import InputError
from pbbench.experiment.settings import QualityConfig
from pbbench.processes import joined_processes
from pbbench.quality.image_sets import native_size, open_set
from pbbench.records.quality_names import DISTANCE_WORDS, quality_label

METRICS = ("fid", "kid", "prc")
"""What is computed where nothing is asked for; "patch" takes four more passes of the extractor an image."""
KNOWN = (*METRICS, "patch")
SEED = 2020
"""The default of torch-fidelity's command line (tests compare them)."""


def score_sets(
    samples: str,
    reference: str,
    *,
    metrics: Sequence[str],
    weights: str | None,
    num_images: int | None,
    image_size: int | None,
    device: str,
) -> dict[str, Any]:
    """Scores by torch-fidelity under their honest names, with the number of images of each set.

    Raises InputError where a set is absent or empty, a metric is unknown, or the Inception weights cannot be had: that first,
    so that a missing download is told in seconds and not after the images are read. To be called by every process of a
    torchrun; the first returns the scores, the others {}.
    """
    unknown = [name for name in metrics if name not in KNOWN]
    if unknown:
        raise InputError(f"--metrics: {unknown[0]!r} is not known; choose from {', '.join(KNOWN)}")
    for name in (samples, reference):
        if name != "synthetic" and not Path(name).exists():
            raise InputError(f"{name} does not exist; give a folder of images, a zip, a checkpoint folder, or synthetic")
    from pbbench.quality.fid import resolve_inception_weights, score

    settings = QualityConfig()
    with joined_processes() as processes:
        with processes.first_here_first():  # it may have to be downloaded
            found = resolve_inception_weights(weights)
        size = (image_size, image_size) if image_size else None
        size = size or native_size(samples) or native_size(reference)
        if size is None:
            raise InputError("give --image-size: synthetic images have no size of their own")
        (first, first_name), (second, second_name) = (
            open_set(name, size, num_images, device, processes, settings.batch_size) for name in (samples, reference)
        )
        scores = score(
            first,
            second,
            metrics=tuple(dict.fromkeys(metrics)),
            weights=found,
            kid_subset_size=settings.kid_subset_size,
            batch_size=settings.batch_size,
            device=processes.device(device),
            seed=SEED,
            processes=processes,
        )
    told = {"image_size": f"{size[0]}×{size[1]}", "samples": first_name, "reference": second_name}
    return {**scores, **told} if scores else {}


def lines(scores: dict[str, Any]) -> list[str]:
    """The scores for a terminal: figures under the names they are cited by, with their intervals, then what they rest on."""
    shown: list[tuple[str, str]] = []
    for name, value in scores.items():
        if name.endswith("_interval") or name in ("reasons", "notes"):
            continue
        label = quality_label(name, [scores["num_images"]]) if name in DISTANCE_WORDS else name.replace("_", " ")
        text = f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value)
        reason = scores["reasons"].get(name)
        interval = scores.get(f"{name}_interval")
        told = f"({reason})" if reason else f"(95% interval {interval[0]:.6g} to {interval[1]:.6g})" if interval else ""
        shown.append((label, f"{text}  {told}".rstrip()))
    width = max(len(label) for label, _ in shown)
    return [f"{label:<{width}}  {text}" for label, text in shown] + [f"note: {note}" for note in scores["notes"]]
