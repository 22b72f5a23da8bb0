"""Everything about one step in one report: cold, warm with its spread, ledger, what fills the peak, and energy.

The step runs in this order: once cold, ``warmup`` − 1 times unread, ``repeats`` times warm, and once more under the tracer,
untimed. Cold is the first run that this call makes: for the cost of a process's very first step call it in a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from pbbench.errors import InputError
from pbbench.memory.meters.ledger import Ledger, ledger_of
from pbbench.memory.meters.outcome import Ok, Outcome, OutOfMemory, outcome_of
from pbbench.memory.meters.phases import Meter, Reading
from pbbench.memory.meters.track import Summary, Tracked
from pbbench.memory.tracer.live import LiveTrace, trace

UNATTRIBUTED = "unattributed"
_STEP, _ALL = "step", "all repeats"


@dataclass(frozen=True)
class Report:
    """What ``measure`` found. After out of memory it holds what was read until then."""

    outcome: Outcome
    cold: Reading
    warm: Summary | None
    ledger: Ledger
    """Of the last warm run, or of the run that had no memory left."""
    live: LiveTrace | None
    """The tracer's reading of one further run: its categories sum to its peak."""
    attribution: dict[str, int] | None
    """What fills the peak. On CUDA the parts sum to the warm median of peak_allocated_bytes, "unattributed" being what the
    tracer does not see (workspaces inside operators, tensors that nobody named); elsewhere to the live peak."""
    energy_joules: float | None
    """The whole GPU's energy per run: that of all warm repeats together, over their number."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Field that is None → why."""

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it; the events of the trace are left out."""
        told = asdict(self) | {"outcome": {"status": self.outcome.status, **asdict(self.outcome)}}
        if self.live is not None:
            told["live"]["events"] = None
        told["cold"]["outcome"] = self.cold.outcome.status if self.cold.outcome else None
        if self.warm is not None:
            told["warm"]["cold"] = None  # it stands above
        return told


def measure(
    step: Callable[[], Any],
    *,
    device: torch.device | str,
    repeats: int = 5,
    warmup: int = 1,
    modules: Mapping[str, nn.Module] | nn.Module | None = None,
    optimizer: Any = None,
    inputs: Any = (),
    ema: Any = None,
    cuda: Any = torch.cuda,
    nvml: Any = None,
) -> Report:
    """Run ``step`` again and again and say what it takes. It must be a step that can be repeated.

    modules, optimizer, inputs, ema: what exists before the step, for the attribution (see ``trace``). Running out of
    memory is an outcome of the report; any other exception of the step passes through. cuda, nvml: stand-ins, for tests.
    """
    if repeats < 1 or warmup < 1:
        raise InputError(f"repeats = {repeats}, warmup = {warmup}: each is at least 1 (the first warm-up run is the cold one)")
    with Meter(device, cuda=cuda, nvml=nvml) as meter:
        tracked = Tracked(meter, set())
        reasons: dict[str, str] = {}
        live: LiveTrace | None = None
        whole = Reading(_ALL)
        try:
            with tracked.phase(_STEP):
                step()
            for _ in range(warmup - 1):
                step()
            with tracked.phase(_ALL) as whole:
                for _ in range(repeats):
                    with tracked.phase(_STEP):
                        step()
            outcome: Outcome = Ok()
            live = trace(step, modules=modules, optimizer=optimizer, inputs=inputs, ema=ema, device=device)
        except Exception as error:
            outcome = outcome_of(error, cuda)
            if not isinstance(outcome, OutOfMemory) or not tracked.readings:
                raise
            reasons |= dict.fromkeys(("live", "attribution"), "the step ran out of memory")
    runs = [reading for reading in tracked.readings if reading.name == _STEP]
    summary = tracked.summary(_STEP) if len(runs) > 1 else None
    if summary is None:
        reasons["warm"] = "the first run ran out of memory"
    energy = None
    if whole.energy_joules is not None and isinstance(whole.outcome, Ok):
        energy = whole.energy_joules / repeats
    else:
        reasons["energy_joules"] = whole.reasons.get("energy_joules", "the step ran out of memory")
    parts = _attribution(live, summary) if live is not None else None
    return Report(outcome, runs[0], summary, ledger_of(runs[-1]), live, parts, energy, reasons)


def _attribution(live: LiveTrace, warm: Summary | None) -> dict[str, int]:
    allocated = warm.warm["peak_allocated_bytes"] if warm is not None else None
    if allocated is None:
        return dict(live.by_category)
    return {**live.by_category, UNATTRIBUTED: int(allocated.median) - live.peak_bytes}
