"""Any code, phase by phase: cold and warm, how each ended, the closing ledger, and the spread over repeats.

    with track(device="cuda") as tracked:
        for _ in range(3):
            with tracked.phase("train_step"):
                step()
    print(tracked.ledger("train_step"), tracked.summary("train_step"))
    tracked.attempt("larger", lambda: model(large)).status         # out_of_memory, and nothing is raised

The first run of a name in the process that ends well is cold (it creates contexts, loads kernels, tunes); later ones are
warm. What a phase read stands in its ``phases.Reading``; what could not be read is None, with a reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pbbench.errors import InputError
from pbbench.memory.meters.ledger import Ledger, ledger_of
from pbbench.memory.meters.outcome import Ok, Outcome
from pbbench.memory.meters.phases import BYTES, COLUMNS, Meter, Reading

_HAVE_RUN: set[tuple[str, str]] = set()
"""(device, name) of every phase that has ended well in this process."""


@dataclass(frozen=True)
class Spread:
    """A figure over the repeats. Of bytes the median is one of the readings, so that it stays whole."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class Summary:
    """All runs of one name that ended well."""

    name: str
    cold: Reading | None
    """The first run in the process; None where it was not tracked here, or failed."""
    repeats: int
    """Warm runs, over which the spreads are."""
    warm: dict[str, Spread | None]
    """Field of ``Reading`` (the peaks, seconds, energy_joules) → its spread; None where any of the runs has no reading."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Field that is None → why."""

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.repeats} warm runs{'' if self.cold else ', no cold one'}"]
        for name, spread in self.warm.items():
            first = getattr(self.cold, name) if self.cold else None
            digits = "," if name in BYTES else ",.6g"
            told = "unknown"
            if spread is not None:
                told = f"{spread.median:{digits}} ({spread.min:{digits}} to {spread.max:{digits}})"
            lines.append(f"  {name:<22} {told}" + (f"; cold {first:{digits}}" if first is not None else ""))
        return "\n".join(lines)


class Tracked:
    """What ``track`` yields. Phases may nest, and an inner phase leaves the outer one's peaks as they are."""

    def __init__(self, meter: Meter, have_run: set[tuple[str, str]]) -> None:
        self.meter = meter
        self.readings: list[Reading] = []
        """Every phase that has ended, also those that failed, in the order of their ends."""
        self._have_run = have_run

    @property
    def outcome(self) -> Outcome | None:
        """How the phase that ended last ended: ok, out_of_memory or failed; None before any has."""
        return self.readings[-1].outcome if self.readings else None

    @contextmanager
    def phase(self, name: str) -> Iterator[Reading]:
        """Measure the block. The reading is complete when the block has ended, also by an exception, which passes through."""
        key = (str(self.meter.device), name)
        reading: Reading | None = None
        try:
            with self.meter.phase(name) as reading:
                reading.temperature = "warm" if key in self._have_run else "cold"
                yield reading
        finally:
            if reading is not None:
                self.readings.append(reading)
                if isinstance(reading.outcome, Ok):
                    self._have_run.add(key)

    def attempt(self, name: str, step: Callable[[], Any]) -> Outcome:
        """Run ``step`` as a phase; an exception becomes the outcome that is returned. (Ctrl-C and exits pass through.)"""
        before = len(self.readings)
        try:
            with self.phase(name):
                step()
        except Exception:
            if len(self.readings) == before or isinstance(self.outcome, Ok):
                raise  # it was not the step that failed
        assert self.outcome is not None
        return self.outcome

    def ledger(self, name: str) -> Ledger:
        """The closing ledger of the last run of ``name`` that ended well, else of the last."""
        runs = self._runs(name)
        return ledger_of(next((r for r in reversed(runs) if isinstance(r.outcome, Ok)), runs[-1]))

    def summary(self, name: str) -> Summary:
        """The cold reading of ``name`` and the spread of its warm ones."""
        good = [r for r in self._runs(name) if isinstance(r.outcome, Ok)]
        warm = [r for r in good if r.temperature == "warm"]
        spreads: dict[str, Spread | None] = {}
        reasons: dict[str, str] = {}
        for column in COLUMNS:
            values = [getattr(r, column) for r in warm]
            spreads[column] = None if None in values or not values else spread(values)
            if spreads[column] is None:
                told = (r.reasons.get(column) for r in warm if getattr(r, column) is None)
                reasons[column] = next(told, None) or "no warm run has ended well"
        return Summary(name, next((r for r in good if r.temperature == "cold"), None), len(warm), spreads, reasons)

    def _runs(self, name: str) -> list[Reading]:
        runs = [r for r in self.readings if r.name == name]
        if not runs:
            names = ", ".join(dict.fromkeys(r.name for r in self.readings)) or "none"
            raise InputError(f"no phase {name!r} has ended; those that have: {names}")
        return runs


@contextmanager
def track(device: torch.device | str = "cuda", *, cuda: Any = torch.cuda, nvml: Any = None) -> Iterator[Tracked]:
    """Open the meters of ``device`` (a CUDA device or "cpu") for the phases of a block.

    cuda, nvml: stand-ins for torch.cuda and pynvml, for tests. Raises InputError where the device is a GPU that is not there.
    """
    if torch.device(device).type == "cuda" and not cuda.is_available():
        raise InputError(f"device {device}: torch.cuda finds no GPU here; use device='cpu'")
    with Meter(device, cuda=cuda, nvml=nvml) as meter:
        yield Tracked(meter, _HAVE_RUN)


def spread(values: Sequence[float]) -> Spread:
    """Least, median and largest; of whole numbers the lower of two medians."""
    whole = all(isinstance(value, int) for value in values)
    middle = statistics.median_low(values) if whole else statistics.median(values)
    return Spread(min(values), middle, max(values))
