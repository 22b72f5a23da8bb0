"""torch's CUDA caching allocator, replayed: from allocations and frees in order to allocated and reserved bytes.

A port of the rules of the native backend (``c10/cuda/CUDACachingAllocator.cpp``) that needs neither torch nor a GPU. What the
caching allocator asks of the driver and what it hands out follows from the requests alone, with two exceptions: where the
driver puts a segment (which only breaks ties between blocks of one size; here addresses ascend), and how much memory is free
on the device (``capacity_bytes`` says it). Not modelled: memory pools (those of CUDA graphs, too).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from pbbench.errors import InputError
from pbbench.memory.allocator.blocks import Block
from pbbench.memory.allocator.layout import Segment
from pbbench.memory.allocator.segments import Memory
from pbbench.memory.allocator.settings import AllocatorSettings

DEFAULT_SETTINGS = AllocatorSettings()


@dataclass(eq=False)
class AllocatorOutOfMemory(Exception):  # noqa: N818 (it says what happened, as torch's OutOfMemoryError does)
    """A request did not fit into ``capacity_bytes``, not even with the cache given back. Bytes at that moment."""

    requested: int
    free: int
    allocated: int
    reserved: int
    retries: int

    def __str__(self) -> str:
        return (
            f"out of memory: {self.requested} bytes requested, {self.free} free, {self.reserved} reserved, "
            f"{self.allocated} of them allocated"
        )


class CachingAllocator(Memory):
    """Blocks go by their address. ``*_bytes`` are the current figures, ``peak_*_bytes`` the largest since ``reset_peaks``.

    requested: what was asked for; allocated: the blocks handed out for it; active: with the blocks that were freed and that
    another stream may still use; reserved: all that was taken from the driver.
    """

    def __init__(self, settings: AllocatorSettings = DEFAULT_SETTINGS, capacity_bytes: int | None = None) -> None:
        super().__init__(settings, capacity_bytes)
        self.requested_bytes = self.allocated_bytes = self.active_bytes = 0
        self.peak_requested_bytes = self.peak_allocated_bytes = self.peak_active_bytes = 0
        self._active: dict[int, Block] = {}
        self._fullest = (0, 0)  # the largest reservation, and the most that was allocated while it stood

    def allocate(self, requested_bytes: int, stream: int = 0, *, segment_address: int | None = None) -> int:
        """The address of a block of at least ``requested_bytes`` > 0.

        ``segment_address``: where a segment lies if this needs a new one (a recording knows). Raises AllocatorOutOfMemory.
        """
        if requested_bytes <= 0:
            raise ValueError(f"cannot allocate {requested_bytes} bytes")
        size = self.settings.rounded(requested_bytes)
        pool = self.pool(stream, small=size <= self.settings.small_request_bytes)
        block = self.best_fit(pool, size) or self.new_block(pool, size, segment_address)
        if block is None:
            self._note_peaks()  # an expandable segment may have grown on the way to the failure
            assert self.capacity_bytes is not None, "there is always room where there is no limit"
            free = self.capacity_bytes - self.reserved_bytes
            raise AllocatorOutOfMemory(requested_bytes, free, self.allocated_bytes, self.reserved_bytes, self.num_alloc_retries)
        if self.settings.splits(block.size, size, small=pool.small):
            pool.put(block.split(size))
        block.free, block.allocated, block.requested = False, True, requested_bytes
        self._active[block.address] = block
        self.requested_bytes += requested_bytes
        self.allocated_bytes += block.size
        self.active_bytes += block.size
        self._note_peaks()
        return block.address

    def free(self, handle: int) -> None:
        """Give a block back that only its own stream has used: it can serve the next request."""
        self.request_free(handle)
        self.complete_free(handle)

    def request_free(self, handle: int) -> None:
        """The first half of ``free``: no longer allocated, but active until other streams have finished with it."""
        block = self._active[handle]
        if not block.allocated:
            raise KeyError(handle)
        block.allocated = False
        self.allocated_bytes -= block.size

    def complete_free(self, handle: int) -> None:
        """The second half of ``free``: the block joins the free ones and merges with its free neighbours."""
        if self._active[handle].allocated:
            raise KeyError(handle)
        block = self._active.pop(handle)
        self.active_bytes -= block.size
        self.requested_bytes -= block.requested
        block.free = True
        block.pool.settle(block)

    def restore(self, segments: Iterable[Segment]) -> list[int]:
        """Start from these segments (``segments`` of another one) instead of from nothing; the addresses of active blocks.

        Peaks start at what they hold.
        """
        for block in self.take_over(segments):
            self._active[block.address] = block
            self.requested_bytes += block.requested
            self.active_bytes += block.size
            self.allocated_bytes += block.size if block.allocated else 0
        self.reset_peaks()
        return list(self._active)

    def reset_peaks(self) -> None:
        self.peak_requested_bytes = self.peak_allocated_bytes = self.peak_active_bytes = 0
        self.peak_reserved_bytes = self.reserved_bytes
        self._fullest = (0, 0)
        self._note_peaks()

    @property
    def num_segments(self) -> int:
        return len(self.segments())

    @property
    def inactive_split_bytes(self) -> int:
        """Free blocks whose segment is partly in use, so that it cannot be given back (torch leaves expandable ones out)."""
        free = (block for pool in self.pools.values() for block in pool.blocks())
        return sum(block.size for block in free if block.is_split() and not block.expandable)

    @property
    def fragmentation(self) -> float:
        """The part of the largest reservation that was never handed out while it stood: 1 − allocated / reserved."""
        reserved, allocated = self._fullest
        return 1 - allocated / reserved if reserved else 0.0

    def figures(self, names: Iterable[str]) -> dict[str, Any]:
        """Figures by the names that ``Replay`` and torch's statistics give them: closing_* is what there is now."""
        return {name: getattr(self, name.removeprefix("closing_")) for name in names}

    def _note_peaks(self) -> None:
        if self.requested_bytes > self.peak_requested_bytes:
            self.peak_requested_bytes = self.requested_bytes
        if self.active_bytes > self.peak_active_bytes:
            self.peak_active_bytes = self.active_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        if (self.reserved_bytes, self.allocated_bytes) > self._fullest:
            self._fullest = (self.reserved_bytes, self.allocated_bytes)


@dataclass(frozen=True)
class Replay:
    """What a replay came to. ``inactive_split_bytes`` and ``fragmentation`` are explained at CachingAllocator."""

    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_active_bytes: int
    peak_reserved_bytes: int
    closing_requested_bytes: int
    closing_allocated_bytes: int
    closing_active_bytes: int
    closing_reserved_bytes: int
    inactive_split_bytes: int
    num_segments: int
    num_alloc_retries: int
    fragmentation: float


def replay(
    events: Iterable[tuple[Hashable, int]],
    settings: AllocatorSettings = DEFAULT_SETTINGS,
    capacity_bytes: int | None = None,
    peaks_from: int = 0,
) -> Replay:
    """Replay (key, delta) in order: delta > 0 allocates so many bytes under the key, delta < 0 frees all the key's; 0: nothing.

    The peaks are those from event number ``peaks_from`` on; the events before it (a warm-up) leave what they reserved.
    Raises AllocatorOutOfMemory, and InputError where a key is freed that holds nothing or allocated while it holds something.
    """
    allocator = CachingAllocator(settings, capacity_bytes)
    held: dict[Hashable, int] = {}
    number = -1
    for number, (key, delta) in enumerate(events):
        if number == peaks_from:
            allocator.reset_peaks()
        if delta and (key in held) == (delta > 0):
            what = "allocates {!r}, which is held already" if delta > 0 else "frees {!r}, which is not held"
            raise InputError(f"event {number} {what.format(key)}; every allocated key is freed at most once")
        if delta > 0:
            held[key] = allocator.allocate(delta)
        elif delta < 0:
            allocator.free(held.pop(key))
    if number < peaks_from:
        allocator.reset_peaks()
    return Replay(**allocator.figures(field.name for field in fields(Replay)))
