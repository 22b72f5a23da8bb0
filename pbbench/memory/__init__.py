"""Memory meters for anyone's PyTorch code; nothing here knows of patches, models or sweeps.

    from pbbench import memory

    with memory.track(device="cuda") as tracked:     # every meter the device has, phase by phase
        with tracked.phase("train_step"):
            step()
    memory.measure(step, device="cuda")              # cold, warm, ledger, attribution and energy of one step
    memory.trace(step, modules=model)                # live tensor bytes and what they are
    memory.predict(make)                             # the same on fake tensors: nothing is computed, no GPU is needed

``allocator.replay`` turns allocations and frees into what torch's caching allocator would reserve for them; ``snapshot`` holds
that against a trace recorded on a GPU. Importing this package imports no torch; the first use of one of the names above does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbbench.memory.allocator import snapshot
    from pbbench.memory.meters.track import track
    from pbbench.memory.prediction.fake import Step, predict
    from pbbench.memory.step_report import measure
    from pbbench.memory.tracer.live import trace

__all__ = ["Step", "measure", "predict", "snapshot", "trace", "track"]

_MODULES = {
    "Step": "prediction.fake",
    "measure": "step_report",
    "predict": "prediction.fake",
    "snapshot": "allocator.snapshot",
    "trace": "tracer.live",
    "track": "meters.track",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return module if name == "snapshot" else getattr(module, name)
