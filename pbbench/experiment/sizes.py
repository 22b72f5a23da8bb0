"""Amounts of memory as people write them."""

from __future__ import annotations

import math
import re

from pbbench.errors import InputError

_UNITS = {"": 1, "b": 1} | {f"{k}{b}": n**i for b, n in (("b", 1000), ("ib", 1024)) for i, k in enumerate("kmgt", start=1)}


def byte_count(text: str) -> int:
    """ "8GiB", "500 MB" or a number of bytes, as bytes. Raises InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    count = int(float(match[1]) * _UNITS[match[2].lower()]) if match and match[2].lower() in _UNITS else 0
    if count < 1:
        raise InputError(f"{text!r} is not an amount of memory, such as 8GiB")
    return count


def format_bytes(count: int | float | None) -> str:
    """Bytes for people: KiB, MiB or GiB with about three digits; a dash for unknown."""
    if count is None or (isinstance(count, float) and math.isnan(count)):
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            value = count / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{int(count)} B"
