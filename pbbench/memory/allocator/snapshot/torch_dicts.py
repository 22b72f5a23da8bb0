"""The dict of ``torch.cuda.memory._snapshot()`` read as plain data: what the allocator did, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pbbench.errors import InputError
from pbbench.memory.allocator.layout import Segment, SegmentBlock

ACTIONS = {"alloc", "free_requested", "free_completed", "segment_alloc", "segment_map", "segment_free", "segment_unmap", "oom"}
"""Of a snapshot's trace. Others (snapshot, annotate) change nothing in the allocator."""


class TraceEvent(NamedTuple):
    """An entry of the allocator's trace. ``size``: of alloc the bytes asked for; ``address`` 0 for oom, which has none."""

    action: str
    address: int
    size: int
    stream: int


def events_of(snapshot: Mapping[str, Any], device: int = 0) -> list[TraceEvent]:
    """The allocator's actions on a device, from the dict of ``torch.cuda.memory._snapshot()``, in order."""
    events = []
    try:
        for entry in snapshot["device_traces"][device]:
            if entry["action"] in ACTIONS:
                _refuse_memory_pool(entry.get("pool_id"))
                events.append(TraceEvent(entry["action"], entry.get("addr", 0), entry["size"], entry["stream"]))
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"this is no CUDA memory snapshot with a trace of device {device} ({error!r})") from error
    return events


def segments_of(snapshot: Mapping[str, Any], device: int = 0) -> list[Segment]:
    """What the allocator holds on a device, from the dict of ``torch.cuda.memory._snapshot()``, by address."""
    segments = []
    try:
        for entry in snapshot["segments"]:
            if entry["device"] != device:
                continue
            _refuse_memory_pool(entry.get("segment_pool_id"))
            blocks, offset = [], 0
            for block in entry["blocks"]:
                allocated, active = block["state"] == "active_allocated", block["state"] != "inactive"
                requested = block["requested_size"] if active else 0  # torch leaves the last user's figure in a free block
                blocks.append(SegmentBlock(offset, block["size"], requested, allocated, active))
                offset += block["size"]
            small, expandable = entry["segment_type"] == "small", entry["is_expandable"]
            segments.append(Segment(entry["address"], offset, entry["stream"], small, expandable, tuple(blocks)))
    except (KeyError, TypeError) as error:
        raise InputError(f"this is no CUDA memory snapshot ({error!r})") from error
    return sorted(segments, key=lambda segment: segment.address)


def _refuse_memory_pool(pool: Any) -> None:
    if pool is not None and tuple(pool) != (0, 0):
        raise InputError(
            f"memory pools (CUDA graphs, torch.cuda.MemPool) are not modelled; this snapshot has pool {tuple(pool)}"
        )
