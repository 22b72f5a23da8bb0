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
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbbench.memory.measure import measure
    from pbbench.memory.predict import Step, predict
    from pbbench.memory.tensors import trace
    from pbbench.memory.track import track

__all__ = ["Step", "measure", "predict", "trace", "track"]

_FILES = {"Step": "predict", "measure": "measure", "predict": "predict", "trace": "tensors", "track": "track"}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


class _Package(ModuleType):
    """Python binds an imported submodule's name in its package. Where the submodule holds a function of its own name, the
    function is bound instead, so that ``memory.predict(make)`` works before and after ``from pbbench.memory.predict import``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _FILES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
