"""The live bytes of a step that is never computed: the step runs on fake tensors, which have shapes and no data.

``make`` builds the modules, the optimizer and the inputs and returns the step, exactly as a real run would, and is called
under ``FakeTensorMode``. The device is "cpu" throughout: fake CUDA backward does not run without a GPU, and plain meta
tensors take other attention paths. The result equals the live tracer's on the same step run for real on a CPU, to the byte;
on CUDA, operators with another kernel (attention, cuDNN) may keep other buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pbbench.memory.tensors import LiveTrace, trace


@dataclass
class Step:
    """A step to trace and what exists before it. Inputs and EMA may be any nesting of tensors and modules."""

    run: Callable[[], Any]
    modules: Mapping[str, nn.Module] | nn.Module
    optimizer: Any = None
    inputs: Any = ()
    ema: Any = None

    def trace(self, *, record_events: bool = False) -> LiveTrace:
        """Run the step once under the tracer."""
        return trace(
            self.run,
            modules=self.modules,
            optimizer=self.optimizer,
            inputs=self.inputs,
            ema=self.ema,
            record_events=record_events,
        )


def predict(make: Callable[[], Step], *, warm: bool | None = None, record_events: bool = False) -> LiveTrace:
    """Trace the step that ``make`` builds, on fake tensors.

    warm: run the step once before, so that the optimizer's state and what else the first step leaves behind exist (its own
    peak, the cold one, is traced with False). None: warm where there is an optimizer; a step without one is the same twice.
    Raises what ``make`` or the step raises: reading values (``.item()``, ``if tensor:``) is not possible on fake tensors.
    """
    with FakeTensorMode():
        step = make()
        if warm or (warm is None and step.optimizer is not None):
            step.run()
        return step.trace(record_events=record_events)
