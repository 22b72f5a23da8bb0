"""A recording replayed, and where the two part."""

from __future__ import annotations

from dataclasses import dataclass

from pbbench.memory.allocator.caching import CachingAllocator
from pbbench.memory.allocator.settings import AllocatorSettings
from pbbench.memory.allocator.snapshot.recording import Recording
from pbbench.memory.allocator.snapshot.torch_dicts import TraceEvent


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


def compare(recording: Recording) -> Comparison:
    """Replay a recording and hold against it where each block lay, what came from the driver, the closing layout, the bytes.

    Raises InputError where the allocator's settings are not modelled.
    """
    allocator = CachingAllocator(AllocatorSettings.parse(recording.settings, recording.torch_version))
    held = allocator.restore(recording.before)
    differences = _replay(recording.events, allocator, {address: address for address in held})
    after = allocator.segments()
    if after != recording.after:
        where = next((one for one, two in zip(recording.after, after, strict=False) if one != two), None)
        place = f"the one at {where.address:#x}" if where else "their number"
        differences.append(f"the segments at the end differ, first {place}")
    replayed = allocator.figures(recording.statistics)
    figures = {name: (recorded, replayed[name]) for name, recorded in recording.statistics.items()}
    figures["num_segments"] = (len(recording.after), len(after))
    return Comparison(figures, differences[:10])


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
