"""torch's CUDA caching allocator, replayed: from allocations and frees in order to allocated and reserved bytes.

A port of the rules of the native backend (``c10/cuda/CUDACachingAllocator.cpp``) that needs neither torch nor a GPU. What the
caching allocator asks of the driver and what it hands out follows from the requests alone, with two exceptions: where the
driver puts a segment (which only breaks ties between blocks of one size; here addresses ascend), and how much memory is free
on the device (``capacity_bytes`` says it). Not modelled: memory pools (those of CUDA graphs, too).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from pbbench.errors import InputError
from pbbench.memory.allocator.blocks import Block
from pbbench.memory.allocator.segments import Memory, Segment
from pbbench.memory.allocator.settings import AllocatorSettings

DEFAULT_SETTINGS = AllocatorSettings()


class AllocatorOutOfMemory(Exception):  # noqa: N818 (it says what happened, as torch's OutOfMemoryError does)
    """A request did not fit into ``capacity_bytes``, not even with the cache given back. Bytes at that moment."""

    def __init__(self, requested: int, free: int, allocated: int, reserved: int, retries: int) -> None:
        super().__init__(
            f"out of memory: {requested} bytes requested, {free} free, {reserved} reserved, {allocated} of them allocated"
        )
        self.requested = requested
        self.free = free
        self.allocated = allocated
        self.reserved = reserved
        self.retries = retries


class CachingAllocator:
    """Blocks go by their address. ``*_bytes`` are the current figures, ``peak_*_bytes`` the largest since ``reset_peaks``.

    requested: what was asked for; allocated: the blocks handed out for it; active: with the blocks that were freed and that
    another stream may still use; reserved: all that was taken from the driver.
    """

    def __init__(self, settings: AllocatorSettings = DEFAULT_SETTINGS, capacity_bytes: int | None = None) -> None:
        self.settings = settings
        self.requested_bytes = self.allocated_bytes = self.active_bytes = 0
        self.peak_requested_bytes = self.peak_allocated_bytes = self.peak_active_bytes = 0
        self._memory = Memory(settings, capacity_bytes)
        self._active: dict[int, Block] = {}
        self._fullest = (0, 0)  # the largest reservation, and the most that was allocated while it stood

    @property
    def reserved_bytes(self) -> int:
        return self._memory.reserved_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        return self._memory.peak_reserved_bytes

    @property
    def num_alloc_retries(self) -> int:
        """How often a request was tried again after the whole cache had been given back."""
        return self._memory.num_retries

    def allocate(self, requested_bytes: int, stream: int = 0, *, segment_address: int | None = None) -> int:
        """The address of a block of at least ``requested_bytes`` > 0.

        ``segment_address``: where a segment lies if this needs a new one (a recording knows). Raises AllocatorOutOfMemory.
        """
        if requested_bytes <= 0:
            raise ValueError(f"cannot allocate {requested_bytes} bytes")
        memory = self._memory
        size = self.settings.rounded(requested_bytes)
        pool = memory.pool(stream, small=size <= self.settings.small_request_bytes)
        block = memory.best_fit(pool, size) or memory.new_block(pool, size, segment_address)
        if block is None:
            self._note_peaks()  # an expandable segment may have grown on the way to the failure
            free = memory.free_bytes()
            raise AllocatorOutOfMemory(requested_bytes, free, self.allocated_bytes, self.reserved_bytes, memory.num_retries)
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

    def empty_cache(self) -> None:
        """Give all segments without an active block back, and of expandable ones all pages without."""
        self._memory.empty_cache()

    def give_back(self, address: int, size: int) -> bool:
        """Give back what a recording says was given back there; False where that is not free here."""
        return self._memory.give_back(address, size)

    def segments(self) -> list[Segment]:
        """What is reserved, by address; of an expandable segment each range with memory behind it, as in torch's snapshots."""
        return self._memory.segments()

    def restore(self, segments: Iterable[Segment]) -> None:
        """Start from these segments (``segments`` of another one) instead of from nothing; peaks start at what they hold."""
        for block in self._memory.restore(segments):
            self._active[block.address] = block
            self.requested_bytes += block.requested
            self.active_bytes += block.size
            self.allocated_bytes += block.size if block.allocated else 0
        self.reset_peaks()

    def reset_peaks(self) -> None:
        self.peak_requested_bytes = self.peak_allocated_bytes = self.peak_active_bytes = 0
        self._memory.peak_reserved_bytes = self.reserved_bytes
        self._fullest = (0, 0)
        self._note_peaks()

    @property
    def inactive_split_bytes(self) -> int:
        """Free blocks whose segment is partly in use, so that it cannot be given back (torch leaves expandable ones out)."""
        free = (block for pool in self._memory.pools.values() for block in pool.blocks())
        return sum(block.size for block in free if block.is_split() and not block.expandable)

    @property
    def fragmentation(self) -> float:
        """The part of the largest reservation that was never handed out while it stood: 1 − allocated / reserved."""
        reserved, allocated = self._fullest
        return 1 - allocated / reserved if reserved else 0.0

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
    return Replay(
        peak_requested_bytes=allocator.peak_requested_bytes,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_active_bytes=allocator.peak_active_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        closing_requested_bytes=allocator.requested_bytes,
        closing_allocated_bytes=allocator.allocated_bytes,
        closing_active_bytes=allocator.active_bytes,
        closing_reserved_bytes=allocator.reserved_bytes,
        inactive_split_bytes=allocator.inactive_split_bytes,
        num_segments=len(allocator.segments()),
        num_alloc_retries=allocator.num_alloc_retries,
        fragmentation=allocator.fragmentation,
    )
