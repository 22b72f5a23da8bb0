"""A traced step, repeated on the replayed caching allocator: what CUDA would allocate and reserve for it.

The tracer says which storages come and go in one warm step; the allocator's rules (``allocator.py``) say what that takes of a
GPU. What the allocator holds depends on its past, so the past is replayed too: what exists before the first step, in the order
it is made; the first step, in which the optimizer makes its state; a second step, whose peaks are the warm ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pbbench.memory.allocator.caching import AllocatorSettings, CachingAllocator
from pbbench.memory.tracer.live import LiveTrace
from pbbench.memory.tracer.storages import Allocation, Event

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
    if live.events is None:
        raise ValueError("the trace has no events; trace with record_events=True")
    run = _Run(CachingAllocator(settings or AllocatorSettings(), capacity_bytes))
    before, step = _split(live.events)
    state = [event for event in before if event.allocation.category == "optimizer"]
    for event in before:
        if event.allocation.category != "optimizer":
            run.take(event)
    run.allocator.reset_peaks()
    for event in _with_state(step, state):
        run.take(event)
    cold = run.peak()
    phases: dict[str, AllocatorPeak] = {}
    for _ in range(WARM_STEPS):
        run.allocator.reset_peaks()
        phases = run.step(step)
    warm = AllocatorPeak(*(max(getattr(peak, name) for peak in phases.values()) for name in _PEAKS)) if phases else cold
    return SteadyState(
        warm=warm,
        cold=cold,
        phases=phases if len(phases) > 1 else {},
        num_segments=len(run.allocator.segments()),
        fragmentation=1 - warm.allocated_bytes / warm.reserved_bytes if warm.reserved_bytes else 0.0,
    )


_PEAKS = ("allocated_bytes", "reserved_bytes")


class _Run:
    """An allocator and the blocks of the storages that are alive."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self._blocks: dict[int, int] = {}
        self._survivors: dict[int, list[int]] = {}  # bytes → blocks that outlived the step that took them

    def take(self, event: Event) -> None:
        """One allocation or free. A storage of the start that an earlier repeat has freed stands for the one, of the same
        size, that the repeat left in its place."""
        allocation = event.allocation
        if event.delta > 0:
            self._blocks[id(allocation)] = self.allocator.allocate(allocation.nbytes)
        elif id(allocation) in self._blocks:
            self.allocator.free(self._blocks.pop(id(allocation)))
        elif self._survivors.get(allocation.nbytes):
            self.allocator.free(self._survivors[allocation.nbytes].pop())

    def step(self, events: list[Event]) -> dict[str, AllocatorPeak]:
        """One repeat; the peaks of its phases."""
        for allocation in {id(e.allocation): e.allocation for e in events if e.delta > 0}.values():
            left = self._blocks.pop(id(allocation), None)
            if left is not None:
                self._survivors.setdefault(allocation.nbytes, []).append(left)
        peaks: dict[str, AllocatorPeak] = {}
        phase = ""
        for event in events:
            if event.phase != phase:
                self._close(phase, peaks)
                phase = event.phase
            self.take(event)
        self._close(phase, peaks)
        return peaks

    def _close(self, phase: str, peaks: dict[str, AllocatorPeak]) -> None:
        if phase:
            now, earlier = self.peak(), peaks.get(phase, AllocatorPeak(0, 0))
            peaks[phase] = AllocatorPeak(*(max(getattr(now, name), getattr(earlier, name)) for name in _PEAKS))
        self.allocator.reset_peaks()

    def peak(self) -> AllocatorPeak:
        return AllocatorPeak(self.allocator.peak_allocated_bytes, self.allocator.peak_reserved_bytes)


def _split(events: list[Event]) -> tuple[list[Event], list[Event]]:
    """What was there before the step, and the step's own events."""
    before = [event for event in events if event.delta > 0 and event.allocation.born == 0]
    return before, [event for event in events if event.delta < 0 or event.allocation.born > 0]


def _with_state(step: list[Event], state: list[Event]) -> Iterator[Event]:
    """The first step: the optimizer makes its state when it begins."""
    made = False
    for event in step:
        if not made and event.phase == "optimizer":
            yield from state
            made = True
        yield event
    if not made:
        yield from state


def operators(live: LiveTrace) -> list[str]:
    """The operators that made storage in the step, by name."""
    if live.events is None:
        raise ValueError("the trace has no events; trace with record_events=True")
    return sorted({_operator(event.allocation) for event in live.events} - {""})


def _operator(allocation: Allocation) -> str:
    return allocation.operator.removeprefix("aten.").partition(".")[0]
