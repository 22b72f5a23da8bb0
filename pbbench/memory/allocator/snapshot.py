"""What torch's CUDA allocator did during a step, recorded on a GPU and replayed anywhere, compared to the byte.

    recording = snapshot.record(lambda: train_step(batch))     # on a machine with a GPU
    snapshot.save(recording, path)
    print(snapshot.compare(snapshot.load(path)).report())      # anywhere

The replay is given what the step asked for (and, because a replay cannot know them, where the driver put segments and when
the cache was given back); where every block lies, what is allocated and reserved, it must find out itself.
Recordings are JSON. The pickles that ``torch.cuda.memory._dump_snapshot`` writes are not read: a pickle can run code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pbbench.errors import InputError
from pbbench.memory.allocator.caching import CachingAllocator
from pbbench.memory.allocator.segments import Segment, SegmentBlock
from pbbench.memory.allocator.settings import AllocatorSettings
from pbbench.memory.meters.cuda import CudaPeaks

FORMAT = "pbbench allocator recording 1"
ACTIONS = (
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_map",
    "segment_free",
    "segment_unmap",
    "oom",
)
"""Of a snapshot's trace. Others (snapshot, annotate) change nothing in the allocator."""
STATISTICS = {
    f"{when}_{name}_bytes": f"{name}_bytes.all.{key}"
    for when, key in (("peak", "peak"), ("closing", "current"))
    for name in ("requested", "allocated", "active", "reserved")
} | {"inactive_split_bytes": "inactive_split_bytes.all.current"}
"""Figure → key of torch.cuda.memory_stats."""


class TraceEvent(NamedTuple):
    """An entry of the allocator's trace. ``size``: of alloc the bytes asked for; ``address`` 0 for oom, which has none."""

    action: str
    address: int
    size: int
    stream: int


@dataclass(frozen=True)
class Recording:
    """A step's trace, what the allocator held before and after it, and ``STATISTICS`` (peaks: those of the step)."""

    events: list[TraceEvent]
    before: list[Segment]
    after: list[Segment]
    statistics: dict[str, int]
    settings: str
    torch_version: str


@dataclass(frozen=True)
class Comparison:
    """Recorded and replayed bytes by name, and where the two part (the first few places; empty where they never do)."""

    figures: dict[str, tuple[int, int]]
    differences: list[str]

    @property
    def equal(self) -> bool:
        return not self.differences and all(recorded == replayed for recorded, replayed in self.figures.values())

    def report(self) -> str:
        lines = [f"{name}: recorded {one}, replayed {two}, {two - one:+d}" for name, (one, two) in self.figures.items()]
        return "\n".join([*lines, *self.differences])


def events_of(snapshot: Mapping[str, Any], device: int = 0) -> list[TraceEvent]:
    """The allocator's actions on a device, from the dict of ``torch.cuda.memory._snapshot()``, in order."""
    try:
        trace = snapshot["device_traces"][device]
        events = []
        for entry in trace:
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


def record(step: Callable[[], Any], device: torch.device | str = "cuda", cuda: Any = torch.cuda) -> Recording:
    """Run ``step`` with an emptied cache and torch's memory history on; its exceptions pass through.

    A history of one's own that is being recorded meanwhile is lost. ``cuda``: torch.cuda, or what stands in for it in tests.
    """
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


def compare(recording: Recording) -> Comparison:
    """Replay a recording and hold against it where each block lay, what came from the driver, the closing layout, the bytes.

    Raises InputError where the allocator's settings are not modelled.
    """
    allocator = CachingAllocator(AllocatorSettings.parse(recording.settings, recording.torch_version))
    allocator.restore(recording.before)
    active = [segment.address + block.offset for segment in recording.before for block in segment.blocks if block.active]
    differences = _replay(recording.events, allocator, dict(zip(active, active, strict=True)))
    after = allocator.segments()
    if after != recording.after:
        where = next((one for one, two in zip(recording.after, after, strict=False) if one != two), None)
        place = f"the one at {where.address:#x}" if where else "their number"
        differences.append(f"the segments at the end differ, first {place}")
    replayed = {name: getattr(allocator, name.removeprefix("closing_")) for name in recording.statistics}
    figures = {name: (recorded, replayed[name]) for name, recorded in recording.statistics.items()}
    figures["num_segments"] = (len(recording.after), len(after))
    return Comparison(figures, differences[:10])


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


def _replay(events: list[TraceEvent], allocator: CachingAllocator, held: dict[int, int]) -> list[str]:
    """Feed the events to the allocator. ``held``: recorded → replayed address of active blocks. Where the two part."""
    differences = []
    taken = 0  # bytes that the driver gave, by the record, for the allocation that follows
    segment_address: int | None = None
    for number, (action, address, size, stream) in enumerate(events):
        problem = ""
        if action in ("segment_alloc", "segment_map"):
            segment_address = address if segment_address is None else segment_address
            taken += size
        elif action == "alloc":
            reserved = allocator.reserved_bytes
            held[address] = allocator.allocate(size, stream, segment_address=segment_address)
            grown = allocator.reserved_bytes - reserved
            if grown != taken:
                problem = f"the record took {taken} bytes from the driver for it, the replay {grown}"
            elif held[address] != address:
                problem = f"the record put it at {address:#x}, the replay at {held[address]:#x}"
            taken, segment_address = 0, None
        elif action in ("segment_free", "segment_unmap"):
            if not allocator.give_back(address, size):
                problem = "the replay has no such free segment or pages"
        elif action == "oom":  # what was mapped in vain stays reserved, and is not for the next allocation
            taken, segment_address = 0, None
        elif address not in held:
            problem = "it was allocated before the record began"
        else:
            try:
                if action == "free_requested":
                    allocator.request_free(held[address])
                else:
                    allocator.complete_free(held.pop(address))
            except KeyError:
                problem = "the record leaves out that its free was asked for, or says it twice"
        if problem:
            differences.append(f"event {number}, {action} of {size} bytes at {address:#x}: {problem}")
    return differences


def _refuse_memory_pool(pool: Any) -> None:
    if pool is not None and tuple(pool) != (0, 0):
        raise InputError(
            f"memory pools (CUDA graphs, torch.cuda.MemPool) are not modelled; this snapshot has pool {tuple(pool)}"
        )
