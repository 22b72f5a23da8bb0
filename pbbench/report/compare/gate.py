"""When a change counts: more bytes than a limit allows, exactly; and other times than noise explains, by a stated rule."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from fractions import Fraction

from pbbench.errors import InputError

FEWEST_STEPS = 3
"""Single steps that a run must have timed before its speed is judged."""
QUARTILE_STEPS = 5
LEAST_CHANGE = 0.03
"""One process against another differs by about this much on a quiet machine, however steady the steps within each are."""


def parse_increase(text: str) -> Fraction:
    """ "1%" or "0.01" as an exact fraction. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text.strip())
    if not match:
        raise InputError(f"--max-increase: {text!r} is neither a percentage nor a fraction; for example 1% or 0.01")
    value = Fraction(match[1]) / (100 if match[2] else 1)
    if value >= 1 and not match[2]:
        raise InputError(f"--max-increase: {text} could mean a percentage or a multiple; write {text}% or a fraction below 1")
    return value


def too_much(a: int, b: int, limit: Fraction) -> bool:
    """Whether b lies more than ``limit`` above a: in whole numbers, so that the limit itself is not too much."""
    return (b - a) * limit.denominator > a * limit.numerator


def judge_speed(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> str:
    """slower, faster or same, from the seconds of single steps, process by process.

    The medians of all steps must differ by more than the interquartile ranges of both runs together, and by 3%; and the
    medians of a run's processes must all lie on one side of the other's. Quartiles of fewer than five steps say little: there
    the whole ranges count.
    """
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
