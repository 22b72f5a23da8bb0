"""When one run is slower or faster than another: other times than noise explains, by a stated rule."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

FEWEST_STEPS = 3
"""Single steps that a run must have timed before its speed is judged."""
QUARTILE_STEPS = 5
LEAST_CHANGE = 0.03
"""One process against another differs by about this much on a quiet machine, however steady the steps within each are."""
RULE = (
    "Times are medians of single steps; slower or faster only where they differ by more than both runs' interquartile ranges "
    "together (whole ranges below five steps) and by 3%, and no repeat of one run lies among the other's."
)
ONCE = (
    "Each configuration ran in one process in each run: what else the machine did during one of them can pass for a change of "
    "speed. Repeats (sweep.repeats) tell the two apart."
)


def judge_speed(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> str:
    """slower, faster or same by ``RULE``, from the seconds of single steps, process by process. Quartiles of fewer than five
    steps say little: there the whole ranges count."""
    pooled = [[seconds for steps in run for seconds in steps] for run in (a, b)]
    (before, after), noise = map(statistics.median, pooled), sum(map(_spread, pooled))
    medians = [[statistics.median(steps) for steps in run] for run in (a, b)]
    overlap = max(map(min, medians)) <= min(map(max, medians))
    if overlap or abs(after - before) <= max(noise, LEAST_CHANGE * before):
        return "same"
    return "slower" if after > before else "faster"


def _spread(times: Sequence[float]) -> float:
    if len(times) < QUARTILE_STEPS:
        return max(times) - min(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low
