"""The closing ledger: what lay between the meters at one synchronised instant, every difference by its name.

    requested ≤ allocated ≤ reserved ≤ process ≤ device
             rounding    cache     context and   other
                                   libraries     processes

The first three are torch's allocator, the last two the driver's (NVML). What is not known is None, and ``reasons`` says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pbbench.memory.meters.phases import Reading

_LEVELS = ("requested", "allocated", "reserved", "process", "device")
_GAPS = {  # difference → (the smaller, the larger, its name for people)
    "rounding": ("requested", "allocated", "rounding"),
    "cache": ("allocated", "reserved", "cache"),
    "context": ("reserved", "process", "context and libraries"),
    "others": ("process", "device", "other processes"),
}


@dataclass(frozen=True)
class Ledger:
    """Bytes held at the end of a phase, after everything queued on the device had finished."""

    requested: int | None
    """Bytes that live tensors asked for."""
    allocated: int | None
    """The blocks they were given."""
    reserved: int | None
    """All that torch's allocator holds of the device."""
    process: int | None
    """This process, as the driver sees it."""
    device: int | None
    """The whole device, other processes included."""
    rounding: int | None
    cache: int | None
    context: int | None
    """The process's memory that is not torch's allocator's: the CUDA context, kernels, libraries."""
    others: int | None
    outside_torch: int | None
    """device − reserved: context, libraries and other processes together, known also where the driver hides the process."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Field that is None → why; ``instant`` where the device could not be synchronised."""

    def __str__(self) -> str:
        lines = [f"{'requested':<26}{_text(self.requested)}"]
        for gap, (_, larger, name) in _GAPS.items():
            lines.append(f"  + {name:<22}{_text(getattr(self, gap))}")
            lines.append(f"{larger:<26}{_text(getattr(self, larger))}")
        told: dict[str, list[str]] = {}
        for name, why in self.reasons.items():
            told.setdefault(why, []).append(name)
        return "\n".join([*lines, *(f"{', '.join(names)}: {why}" for why, names in told.items())])


def ledger_of(reading: Reading) -> Ledger:
    """The ledger of one reading."""
    closing = reading.ledger.get("closing", {})
    held: dict[str, int | None] = {name: closing.get(name) for name in _LEVELS}
    reasons: dict[str, str] = {}
    for name in _LEVELS:
        if held[name] is None:
            column = f"peak_{'allocated' if name == 'requested' else name}_bytes"
            told = reading.closing_reasons.get(name) or reading.reasons.get(column)
            reasons[name] = told or "this allocator does not report it"
    gaps: dict[str, int | None] = {}
    for gap, (smaller, larger, _) in {**_GAPS, "outside_torch": ("reserved", "device", "")}.items():
        low, high = held[smaller], held[larger]
        gaps[gap] = None
        if low is None or high is None:
            reasons[gap] = reasons[smaller if low is None else larger]
        elif high < low:
            reasons[gap] = f"{larger} ({high} bytes) was read as less than {smaller} ({low} bytes): they do not count the same"
        else:
            gaps[gap] = high - low
    if "synchronise" in reading.ledger:
        reasons["instant"] = f"read without a synchronised device: {reading.ledger['synchronise']}"
    return Ledger(**held, **gaps, reasons=reasons)


def _text(count: int | None) -> str:
    return f"{'unknown':>20}" if count is None else f"{count:>18,} B"
