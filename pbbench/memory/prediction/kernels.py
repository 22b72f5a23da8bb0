"""Where torch's fake operators store results otherwise than its kernels do, and what makes up for it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class AsKernelsDo(TorchDispatchMode):
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
