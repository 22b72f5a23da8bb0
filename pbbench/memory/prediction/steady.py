"""A traced step, repeated on the replayed caching allocator: what CUDA would allocate and reserve for it.

The tracer says which storages come and go in one warm step; the replayed allocator says what that takes of a GPU. What it
holds depends on its past, so the past is replayed too: what exists before the first step, in the order it is made; the first
step, in which the optimizer makes its state; a second step, whose peaks are the warm ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from pbbench.memory.allocator.caching import AllocatorSettings, CachingAllocator
from pbbench.memory.tracer.live import LiveTrace
from pbbench.memory.tracer.storages import Event

WARM_STEPS = 2
"""The second repeat finds every block where the first one left it; more change nothing."""


@dataclass(frozen=True)
class AllocatorPeak:
    """The most that was handed out, and the most that was held of the GPU, in bytes."""

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class SteadyState:
    """What the allocator would show for a step that is repeated."""

    warm: AllocatorPeak
    cold: AllocatorPeak
    """The first step, with the making of the optimizer's state."""
    phases: dict[str, AllocatorPeak]
    """Warm peaks of forward, backward and optimizer; empty where all was forward. Reserved is never given back by itself, so a
    phase holds at least what earlier ones took."""
    num_segments: int
    fragmentation: float
    """The part of the reserved bytes at the end of a warm step's peak that no tensor uses: 1 − allocated / reserved."""


def steady_state(live: LiveTrace, settings: AllocatorSettings | None = None, capacity_bytes: int | None = None) -> SteadyState:
    """Replay ``live`` (traced warm, with ``record_events``). Raises AllocatorOutOfMemory above ``capacity_bytes``."""
    before, step = live.before_and_during()
    state = [event for event in before if event.allocation.category == "optimizer"]
    run = _Run(settings or AllocatorSettings(), capacity_bytes)
    run.take(event for event in before if event.allocation.category != "optimizer")
    run.reset_peaks()
    begins = next((i for i, event in enumerate(step) if event.phase == "optimizer"), len(step))
    run.take((*step[:begins], *state, *step[begins:]))  # the first step: the optimizer makes its state when it begins
    cold = run.peak()
    phases: dict[str, AllocatorPeak] = {}
    for _ in range(WARM_STEPS):
        phases = run.repeat(step)
    warm = _largest(phases.values()) if phases else cold
    return SteadyState(
        warm=warm,
        cold=cold,
        phases=phases if len(phases) > 1 else {},
        num_segments=run.num_segments,
        fragmentation=1 - warm.allocated_bytes / warm.reserved_bytes if warm.reserved_bytes else 0.0,
    )


def operators(live: LiveTrace) -> list[str]:
    """The operators that made storage in the step, by name."""
    before, during = live.before_and_during()
    made = {event.allocation.operator.removeprefix("aten.").partition(".")[0] for event in (*before, *during)}
    return sorted(made - {""})


class _Run(CachingAllocator):
    """An allocator that knows the blocks of the storages that are alive."""

    def __init__(self, settings: AllocatorSettings, capacity_bytes: int | None) -> None:
        super().__init__(settings, capacity_bytes)
        self._blocks: dict[int, int] = {}
        self._survivors: dict[int, list[int]] = {}  # bytes → blocks that outlived the step that took them

    def peak(self) -> AllocatorPeak:
        return AllocatorPeak(self.peak_allocated_bytes, self.peak_reserved_bytes)

    def take(self, events: Iterable[Event]) -> None:
        """Allocations and frees. A storage of the start that an earlier repeat has freed stands for the one, of the same
        size, that the repeat left in its place."""
        for event in events:
            allocation = event.allocation
            if event.delta > 0:
                self._blocks[id(allocation)] = self.allocate(allocation.nbytes)
            elif id(allocation) in self._blocks:
                self.free(self._blocks.pop(id(allocation)))
            elif self._survivors.get(allocation.nbytes):
                self.free(self._survivors[allocation.nbytes].pop())

    def repeat(self, step: list[Event]) -> dict[str, AllocatorPeak]:
        """The step once more; the peaks of its phases."""
        for allocation in {id(e.allocation): e.allocation for e in step if e.delta > 0}.values():
            left = self._blocks.pop(id(allocation), None)
            if left is not None:
                self._survivors.setdefault(allocation.nbytes, []).append(left)
        peaks: dict[str, AllocatorPeak] = {}
        for phase, stretch in groupby(step, key=lambda event: event.phase):
            self.reset_peaks()
            self.take(stretch)
            peaks[phase] = _largest([self.peak(), peaks.get(phase, AllocatorPeak(0, 0))])
        return peaks


def _largest(peaks: Iterable[AllocatorPeak]) -> AllocatorPeak:
    allocated, reserved = zip(*((peak.allocated_bytes, peak.reserved_bytes) for peak in peaks), strict=True)
    return AllocatorPeak(max(allocated), max(reserved))
