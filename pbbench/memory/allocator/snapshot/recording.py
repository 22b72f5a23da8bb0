"""A step's recording: made on a GPU, kept as JSON. torch is imported only to make one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbbench.errors import InputError
from pbbench.memory.allocator.layout import Segment, SegmentBlock
from pbbench.memory.allocator.snapshot.torch_dicts import TraceEvent, events_of, segments_of

if TYPE_CHECKING:
    import torch

FORMAT = "pbbench allocator recording 1"
STATISTICS = {
    f"{when}_{name}_bytes": f"{name}_bytes.all.{key}"
    for when, key in (("peak", "peak"), ("closing", "current"))
    for name in ("requested", "allocated", "active", "reserved")
} | {"inactive_split_bytes": "inactive_split_bytes.all.current"}
"""Figure → key of torch.cuda.memory_stats."""


@dataclass(frozen=True)
class Recording:
    """A step's trace, what the allocator held before and after it, and ``STATISTICS`` (peaks: those of the step)."""

    events: list[TraceEvent]
    before: list[Segment]
    after: list[Segment]
    statistics: dict[str, int]
    settings: str
    torch_version: str


def record(step: Callable[[], Any], device: torch.device | str = "cuda", cuda: Any = None) -> Recording:
    """Run ``step`` with an emptied cache and torch's memory history on; its exceptions pass through.

    A history of one's own that is being recorded meanwhile is lost. ``cuda``: torch.cuda, or what stands in for it in tests.
    """
    import torch

    from pbbench.memory.meters.cuda import CudaPeaks

    cuda = cuda or torch.cuda
    device = torch.device(device)
    index = cuda.current_device() if device.index is None else device.index
    device = torch.device("cuda", index)
    cuda.synchronize(device)
    cuda.empty_cache()
    before = segments_of(cuda.memory._snapshot(), index)
    peaks = CudaPeaks(device, cuda)
    peaks.begin()
    try:
        cuda.memory._record_memory_history(enabled="all", context=None, clear_history=True)
        step()
        cuda.synchronize(device)
        stats = cuda.memory_stats(device)
        snapshot = cuda.memory._snapshot()
    finally:
        cuda.memory._record_memory_history(enabled=None)
        peaks.end()
    return Recording(
        events=events_of(snapshot, index),
        before=before,
        after=segments_of(snapshot, index),
        statistics={name: stats[key] for name, key in STATISTICS.items()},
        settings=snapshot["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"],
        torch_version=torch.__version__,
    )


def save(recording: Recording, path: Path) -> None:
    """As compact JSON."""
    path.write_text(json.dumps({"format": FORMAT, **asdict(recording)}, separators=(",", ":")) + "\n", encoding="utf-8")


def load(path: Path) -> Recording:
    """What ``save`` wrote. Raises InputError where the file is not such a recording."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            raise ValueError("another format")
        if set(data["statistics"]) != set(STATISTICS):
            raise ValueError("its statistics are not those of this version")
        data["events"] = [TraceEvent(*event) for event in data["events"]]
        for name in ("before", "after"):
            segments = [{**entry, "blocks": tuple(SegmentBlock(*block) for block in entry["blocks"])} for entry in data[name]]
            data[name] = [Segment(**entry) for entry in segments]
        return Recording(**data)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{path} is not an allocator recording ({error}); write one with pbbench.memory.allocator.snapshot.save"
        raise InputError(message) from error
