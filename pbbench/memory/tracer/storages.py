"""The book of live tensor storages: what is alive, the largest it has been, and what that maximum consisted of.

Each storage is watched through a weak reference, whose callback runs when the last tensor on it is gone. A peak does not
copy the book: it notes its place in the order of events, and storages that were alive there and die later are kept with it.
So a storage may be relabelled after the peak (backward's result turns out to be a parameter's gradient), and the peak's
parts follow, and still sum to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

CATEGORIES = ("parameter", "gradient", "optimizer", "ema", "input", "activation", "other")
ROUND = 512
"""The CUDA caching allocator's smallest unit. Every storage is rounded up to it, on every device."""


@dataclass(slots=True, eq=False)
class Allocation:
    """The life of one storage. ``born`` and ``died`` are places in the order of events; born 0: before the first."""

    nbytes: int
    category: str
    module: str
    operator: str
    phase: str
    born: int
    died: int | None = None


@dataclass(slots=True, eq=False)
class Event:
    """A storage comes (``delta`` = its bytes) or goes (minus its bytes). Running sums of ``delta`` are the live total."""

    delta: int
    allocation: Allocation
    phase: str = ""
    """The phase in which that happened; empty for what was there before the first."""


@dataclass(slots=True, eq=False)
class Peak:
    """A maximum of the live total. ``cause`` is the allocation that made it, None where it was the level at the start."""

    nbytes: int = 0
    order: int = 0
    cause: Allocation | None = None
    died_since: list[Allocation] = field(default_factory=list)


class _Watch(weakref.ref):
    """A weak reference to a storage that knows its key in the book and its allocation."""

    __slots__ = ("allocation", "key")
    allocation: Allocation
    key: int


class Book:
    """Counts storages by identity, so views and in-place results count once. Bytes are rounded up to 512 each."""

    def __init__(self, *, record_events: bool = False) -> None:
        self.live_bytes = 0
        self.start_bytes = 0
        self.total = Peak()
        self.phases: dict[str, Peak] = {}
        self.phase = ""
        self._order = 0
        self._watches: dict[int, _Watch] = {}
        self._events: list[Event] | None = [] if record_events else None
        self._found: list[Allocation] = []

    def knows(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._watches

    def allocation_of(self, storage: torch.UntypedStorage) -> Allocation | None:
        watch = self._watches.get(storage._cdata)
        return watch.allocation if watch is not None else None

    def found(self, storage: torch.UntypedStorage, category: str) -> None:
        """A storage from before the first event. It was there all along, so it counts in every peak already taken."""
        allocation = Allocation(rounded(storage.nbytes()), category, "", "", "", 0)
        self._found.append(allocation)
        self._watch(storage, allocation)
        self.start_bytes += allocation.nbytes
        for peak in (self.total, *self.phases.values()):
            peak.nbytes += allocation.nbytes

    def allocated(self, storage: torch.UntypedStorage, nbytes: int, category: str, module: str, operator: str) -> None:
        self._order += 1
        allocation = Allocation(rounded(nbytes), category, module, operator, self.phase, self._order)
        self._watch(storage, allocation)
        if self._events is not None:
            self._events.append(Event(allocation.nbytes, allocation, self.phase))
        for peak in (self.total, self.phases[self.phase]):
            if self.live_bytes > peak.nbytes:
                self._mark(peak, allocation)

    def resized(self, storage: torch.UntypedStorage, nbytes: int, operator: str) -> None:
        """A known storage's new size. Growing takes a new block and then frees the old one: both live for a moment."""
        old = self._watches[storage._cdata].allocation
        self.allocated(storage, nbytes, old.category, old.module, operator)
        self._release(old)

    @contextmanager
    def resizing_watched(self) -> Iterator[None]:
        """``UntypedStorage.resize_`` is no operator, so it is stood in for meanwhile."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            result = original(storage, size)
            allocation = self.allocation_of(storage)
            if allocation is not None and allocation.nbytes != rounded(size):
                self.resized(storage, size, "UntypedStorage.resize_")
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def enter_phase(self, name: str) -> None:
        self.phase = name
        peak = self.phases.setdefault(name, Peak())
        if self.live_bytes > peak.nbytes:
            self._mark(peak, None)

    def by_category(self, peak: Peak) -> dict[str, int]:
        """The peak's bytes per category; they sum to ``peak.nbytes``."""
        sums = dict.fromkeys(CATEGORIES, 0)
        for allocation in self.members(peak):
            sums[allocation.category] += allocation.nbytes
        return sums

    def members(self, peak: Peak) -> Iterator[Allocation]:
        """The storages that were alive at the peak."""
        for watch in self._watches.values():
            if watch.allocation.born <= peak.order:
                yield watch.allocation
        yield from peak.died_since

    def events(self) -> list[Event] | None:
        """All events in order, what was there before first; None where they were not to be recorded."""
        if self._events is None:
            return None
        return [Event(allocation.nbytes, allocation) for allocation in self._found] + self._events

    def close(self) -> None:
        """Stop watching; the callbacks of storages that die later do nothing."""
        self._watches.clear()

    def _watch(self, storage: torch.UntypedStorage, allocation: Allocation) -> None:
        watch = _Watch(storage, self._died)
        watch.allocation, watch.key = allocation, storage._cdata
        self._watches[watch.key] = watch
        self.live_bytes += allocation.nbytes

    def _died(self, watch: _Watch) -> None:
        if self._watches.get(watch.key) is watch:
            del self._watches[watch.key]
            self._release(watch.allocation)

    def _release(self, allocation: Allocation) -> None:
        self._order += 1
        allocation.died = self._order
        self.live_bytes -= allocation.nbytes
        if self._events is not None:
            self._events.append(Event(-allocation.nbytes, allocation, self.phase))
        for peak in (self.total, *self.phases.values()):
            if allocation.born <= peak.order:
                peak.died_since.append(allocation)

    def _mark(self, peak: Peak, cause: Allocation | None) -> None:
        peak.nbytes, peak.order, peak.cause = self.live_bytes, self._order, cause
        peak.died_since = []


def rounded(nbytes: int) -> int:
    return (nbytes + ROUND - 1) // ROUND * ROUND
