"""The rule of the gate: a step does not pass that ended worse, or whose peak grew by more than the limit.

The limit (``--max-increase``) is held against one meter per step: CUDA's allocated bytes, warm, or live tensor bytes where
either run has no CUDA reading. Bytes are compared as integers with an exact fraction, so that an increase of just the limit
passes and one byte more does not. Without a limit only endings are held against a run.
"""

from __future__ import annotations

import re
from fractions import Fraction

from pbbench.errors import InputError
from pbbench.report.compare.steps import GATED, StepChange


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


def failure(step: StepChange, limit: Fraction | None, shown: str | None) -> str | None:
    """Why this step does not pass, in a line headed by the cell; None where it does. ``shown``: the limit as it was given."""
    name = f"{step.cell} {step.phase}"
    if step.worse:
        return f"{name}: {step.status[0]} in A, {step.status[1]} in B"
    if limit is None:
        return None
    if step.gated is None:
        known = [meter for meter in GATED if step.peaks[meter][0] is not None]
        return f"{name}: A has {known[0]}, B does not: nothing shows that it did not grow" if known else None
    a, b = step.peaks[step.gated]
    if a is None or b is None or not too_much(a, b, limit):
        return None
    grown = f", {100 * (b - a) / a:+.3g}%" if a else ""
    return f"{name}: {step.gated} {a:,} → {b:,} bytes ({b - a:+,}{grown}; the limit is {shown})"
