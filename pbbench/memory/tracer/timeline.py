"""Live bytes over one step as data for a figure: a curve per category, short enough to store, with the true peak in it.

The horizontal axis counts allocations and frees, not time. A storage has its final category throughout its life: what becomes
a parameter's gradient is one from its first byte.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from pbbench.memory.tracer.live import LiveTrace
from pbbench.memory.tracer.storages import CATEGORIES, Event

POINTS = 240
TOP_MODULES = 8


def timeline(live: LiveTrace, *, points: int = POINTS) -> dict[str, Any]:
    """The step's curve at no more than ``points`` places, as JSON can hold it; everything is in bytes or counts events.

    num_events: allocations and frees of the step; index: the places, event numbers from 0 (the start) on, each the highest or
    lowest of its stretch; live_bytes: category → one integer where it never changes, else one per place; they sum to the live
    total. peak_bytes, peak_index, peak_module, peak_operator, peak_phase; top_modules: the largest [module, activation bytes]
    at the peak; phases: [name, first event] of each stretch of forward, backward and optimizer.
    Raises ValueError where the trace has no events.
    """
    before, during = live.before_and_during()
    level = dict.fromkeys(CATEGORIES, 0)
    _move(level, before)
    totals = list(accumulate((event.delta for event in during), initial=live.start_bytes))
    index = _places(totals, points)
    curves = _curves(during, level, index)
    peak = max(range(len(totals)), key=totals.__getitem__)
    assert totals[peak] == live.peak_bytes
    return {
        "num_events": len(during),
        "index": index,
        "live_bytes": {name: curve[0] if len(set(curve)) == 1 else curve for name, curve in curves.items() if any(curve)},
        "peak_bytes": live.peak_bytes,
        "peak_index": peak,
        "peak_module": live.peak_module,
        "peak_operator": live.peak_operator,
        "peak_phase": live.peak_phase,
        "top_modules": [[name, nbytes] for name, nbytes in live.by_module[:TOP_MODULES]],
        "phases": _phases(during) if live.phases else [],
    }


def _places(totals: list[int], points: int) -> list[int]:
    """The first and last place, and of every stretch of equal length its highest and its lowest."""
    if len(totals) <= points:
        return list(range(len(totals)))
    stretches = max(1, (points - 2) // 2)
    chosen = {0, len(totals) - 1}
    for i in range(stretches):
        own = range(i * len(totals) // stretches, (i + 1) * len(totals) // stretches)
        chosen |= {max(own, key=totals.__getitem__), min(own, key=totals.__getitem__)}
    return sorted(chosen)


def _curves(during: list[Event], level: dict[str, int], index: list[int]) -> dict[str, list[int]]:
    """Each category's bytes at the places; ``level`` is the start's."""
    curves: dict[str, list[int]] = {name: [] for name in level}
    place = 0
    for target in index:
        _move(level, during[place:target])
        place = target
        for name, curve in curves.items():
            curve.append(level[name])
    return curves


def _move(level: dict[str, int], events: list[Event]) -> None:
    for event in events:
        level[event.allocation.category] += event.delta


def _phases(during: list[Event]) -> list[list[Any]]:
    """Where each stretch of a phase begins: at its first allocation."""
    found: list[list[Any]] = []
    for number, event in enumerate(during):
        if event.delta > 0 and (not found or found[-1][0] != event.allocation.phase):
            found.append([event.allocation.phase, number])
    return found
