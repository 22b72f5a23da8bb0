"""Several works timed in turns, so that a machine that slows down slows all of them: only their ratios mean something."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Key = TypeVar("Key")


def in_turns(works: Mapping[Key, Callable[[], Any]], seconds: float, fewest: int) -> dict[Key, list[float]]:
    """Seconds of each call. Rounds over all works until ``seconds`` are over, at least ``fewest`` counted ones.

    The first round warms up and is not counted; each round goes in the other direction, so that no work always follows the
    same one's caches.
    """
    times: dict[Key, list[float]] = {key: [] for key in works}
    started, rounds = time.monotonic(), 0
    while rounds <= fewest or (time.monotonic() - started) * (rounds + 1) / rounds < seconds:
        for key in works if rounds % 2 else reversed(list(works)):
            begun = time.perf_counter()
            works[key]()
            took = time.perf_counter() - begun
            if rounds > 0:
                times[key].append(took)
        rounds += 1
    return times
