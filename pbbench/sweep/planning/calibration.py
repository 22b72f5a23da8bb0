"""What CUDA takes beside the tensors, learnt from a sweep that ran on a GPU: workspaces, and the driver's context.

Both depend on the GPU, the driver and the versions of the libraries, so without such a sweep they are unknown, not 0. The
**workspace** of a step is how much more torch allocated than was predicted; the **context** is what NVML says the process holds
beyond what torch reserved. Both are medians over the sweep's warm rows and ledgers. No torch.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbbench.errors import InputError
from pbbench.experiment.sizes import format_bytes
from pbbench.records.cells import read_cells

WHY = "differs by GPU and library version; give a sweep that ran on such a GPU: --calibration DIR"


@dataclass(frozen=True)
class Calibration:
    """Bytes to add to a prediction of reserved memory; None where unknown."""

    workspace_bytes: int | None = None
    context_bytes: int | None = None
    source: str | None = None
    """The GPU, torch's version and the run the figures come from."""

    @property
    def known_bytes(self) -> int:
        """What is known of them, to add; unknown parts are named by ``describe``."""
        return (self.workspace_bytes or 0) + (self.context_bytes or 0)

    def as_dict(self, reserved_bytes: int) -> dict[str, Any]:
        """For JSON, beside the reserved bytes predicted: the terms, the process's bytes, and why one is null."""
        terms = {"workspace_bytes": self.workspace_bytes, "context_bytes": self.context_bytes}
        whole = None if None in terms.values() else reserved_bytes + self.known_bytes
        terms["predicted_process_bytes"] = whole
        return terms | {"calibration": self.source, "reasons": {name: WHY for name, value in terms.items() if value is None}}

    def describe(self) -> str:
        """A sentence for a table's caption."""
        if self.source is None:
            return "Workspaces of CUDA's libraries and the context come on top: unknown without a sweep on such a GPU."
        terms = {"workspaces": self.workspace_bytes, "context": self.context_bytes}
        known = [f"{name} {format_bytes(value)}" for name, value in terms.items() if value is not None]
        unknown = [name for name, value in terms.items() if value is None]
        text = f"On top: {', '.join(known)} ({self.source})." if known else f"Nothing on top is known from {self.source}."
        return text + (f" Unknown: {', '.join(unknown)}." if unknown else "")


UNCALIBRATED = Calibration()


def calibrate(run: Path) -> Calibration:
    """The terms a sweep's folder shows. Raises InputError where it was not measured on a GPU."""
    cells = read_cells(run)
    try:
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"--calibration: {run / 'environment.json'} is missing or broken") from None
    if not isinstance(environment, dict) or not environment.get("gpu"):
        raise InputError(f"--calibration: {run} was not measured on a GPU")
    warm = [row for cell in cells for row in cell.rows if row.temperature == "warm" and row.status == "ok"]
    beyond = [
        row.peak_allocated_bytes - row.predicted_allocated_bytes
        for row in warm
        if row.peak_allocated_bytes is not None and row.predicted_allocated_bytes is not None
    ]
    contexts = []
    for cell in cells:
        for ledger in (cell.details.get("ledger") or {}).values():
            closing = ledger.get("closing") or {}
            if closing.get("process") is not None and closing.get("reserved") is not None:
                contexts.append(closing["process"] - closing["reserved"])
    return Calibration(
        workspace_bytes=max(0, round(statistics.median(beyond))) if beyond else None,
        context_bytes=round(statistics.median(contexts)) if contexts else None,
        source=f"{environment['gpu']}, torch {environment.get('torch')}, {run}",
    )
