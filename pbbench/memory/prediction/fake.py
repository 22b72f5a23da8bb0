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
from torch.utils._python_dispatch import TorchDispatchMode

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


_aten = torch.ops.aten
_REDUCED_WHERE_IT_STANDS = {
    _aten.mse_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.binary_cross_entropy.default,
    _aten.soft_margin_loss.default,
}

_GRADIENT_TYPED_AS_INPUT = {
    _aten.native_group_norm_backward.default,
    _aten.mse_loss_backward.default,
    _aten.smooth_l1_loss_backward.default,
}


class _AsKernelsDo(TorchDispatchMode):
    """Gives fake results the storage that real kernels give them, where torch's fake versions differ.

    Some losses write the elementwise loss into the result's storage and, when they reduce it, shrink only its shape (torch's
    Loss.cpp and Loss.cu): the scalar keeps an image-sized storage. Where types are mixed, some backward kernels return the
    gradient in the type of the input (their second argument) and layer norm keeps its statistics in that of the weight; the
    fake ones promote, or do not.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _REDUCED_WHERE_IT_STANDS and result.dim() == 0:
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            return torch.empty(shape, dtype=result.dtype, device=result.device).as_strided((), ())
        if func in _GRADIENT_TYPED_AS_INPUT:
            if isinstance(result, torch.Tensor):
                return result.to(args[1].dtype)
            return (result[0] if result[0] is None else result[0].to(args[1].dtype), *result[1:])
        if func is _aten.native_layer_norm.default and args[2] is not None:
            return (result[0], result[1].to(args[2].dtype), result[2].to(args[2].dtype))
        return result


def predict(make: Callable[[], Step], *, warm: bool = True, record_events: bool = False) -> LiveTrace:
    """Trace the step that ``make`` builds, on fake tensors.

    warm: as the step is when it repeats, with the optimizer's state and all else that a first step leaves behind. False: the
    first step. Raises what ``make`` or the step raises; a step that reads values (``.item()``, ``if tensor:``) cannot be
    predicted.
    """
    with FakeTensorMode(), _AsKernelsDo():
        step = make()
        if warm and step.optimizer is not None:
            _make_state(step.optimizer)
        live = step.trace(record_events=record_events)
        if warm and live.end_bytes != live.start_bytes:
            live = step.trace(record_events=record_events)
        return live


def _make_state(optimizer: Any) -> None:
    """An optimizer makes its state in its first step: let it step on zeros, which costs less than the real first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.grad is None]
    if optimizer.state:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
