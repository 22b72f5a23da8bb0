"""The live bytes of a step that is never computed: the step runs on fake tensors, which have shapes and no data.

``make`` builds the modules, the optimizer and the inputs and returns the step, exactly as a real run would, and is called
under ``FakeTensorMode``. The device is "cpu" throughout: fake CUDA backward does not run without a GPU, and plain meta
tensors take other attention paths. The result equals the live tracer's on the same step run for real on a CPU, to the byte,
but for a few operators whose kernels keep scratch space in a result (oneDNN's LSTM, ``fold``). On CUDA these differ: what
attention and cuDNN save for backward, the operators that autocast casts, and optimizers that default to ``foreach`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pbbench.memory.prediction.kernels import AsKernelsDo
from pbbench.memory.tracer.live import LiveTrace, trace


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


def predict(make: Callable[[], Step], *, warm: bool = True, record_events: bool = False) -> LiveTrace:
    """Trace the step that ``make`` builds, on fake tensors.

    warm: as the step is when it repeats, with the optimizer's state and all else that a first step leaves behind. False: the
    first step. Raises what ``make`` or the step raises; a step that reads values (``.item()``, ``if tensor:``) cannot be
    predicted.
    """
    with FakeTensorMode(), AsKernelsDo():
        step = make()
        if warm and step.optimizer is not None:
            make_state(step.optimizer)
        live = step.trace(record_events=record_events)
        if warm and live.end_bytes != live.start_bytes:
            live = step.trace(record_events=record_events)
        return live


def make_state(optimizer: Any) -> None:
    """An optimizer makes its state in its first step: let it step on zeros, which costs less than the real first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.grad is None]
    if optimizer.state:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
