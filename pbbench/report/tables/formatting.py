"""Numbers as people read them: three digits, bytes in one unit per column, fractions as percentages, a dash for unknown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

UNKNOWN = "–"


def byte_unit(values: Iterable[float]) -> tuple[str, int]:
    """The unit for a column or an axis, by its largest value: (name, bytes)."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=2.0**21)
    return next(((name, size) for name, size in (("GiB", 2**30), ("MiB", 2**20)) if largest >= 2 * size), ("KiB", 2**10))


def in_unit(value: float, unit: str, size: int) -> str:
    """Bytes in a unit from ``byte_unit``, without its name; what is too little to show is not 0."""
    if math.isnan(value):
        return UNKNOWN
    if value == 0:
        return "0"
    digits = 2 if unit == "GiB" else 0 if value >= 100 * size else 1
    return f"{value / size:,.{digits}f}" if value >= 0.5 * size / 10**digits else f"<{10**-digits:.{digits}f}"


def number(value: Any, digits: int = 3) -> str:
    """About so many digits, thousands separated, never in exponent form unless tiny; a dash for unknown."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}".replace("-", "−")


def whole(value: Any) -> str:
    """A count, thousands separated; a dash for unknown."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:,.0f}"


def percent(value: float, signed: bool = True) -> str:
    """A fraction as a percentage, signed unless told otherwise; a dash for unknown."""
    if math.isnan(value):
        return UNKNOWN
    digits = 0 if abs(value) >= 0.0995 or value == 0 else 1
    text = f"{100 * value:+.{digits}f}%" if signed else f"{100 * value:.{digits}f}%"
    return "0%" if text.strip("+-0.%") == "" else text.replace("-", "−")


def with_range(show: Callable[[Any], str], value: Any, low: Any = None, high: Any = None) -> str:
    """A figure with its least and most, which are left out where they are not known or round to the same."""
    ends = show(low), show(high)
    return show(value) if ends[0] == ends[1] else f"{show(value)} ({ends[0]}–{ends[1]})"


def least_to_most(show: Callable[[Any], str], values: Iterable[Any]) -> str:
    """ "1.2 to 3.4", or the one figure that both are shown as."""
    known = list(values)
    return " to ".join(dict.fromkeys((show(min(known)), show(max(known)))))


def spaced(name: str) -> str:
    """A status or a phase as words."""
    return name.replace("_", " ")
