"""How weights and maps lie where the fused operators run (``kernels.usable``): in channels_last, and under autocast cast in few
launches.

cuDNN computes in NHWC. Given NCHW it turns maps and weights around and back at every call, in workspaces as large as input,
output and weights together (128 → 128 channels, 3 × 3, 32 × 128²: 516 MiB in float32 on an H200, 4 in channels_last). So the
network's input is made in that layout, and every map follows. On a CPU channels_last is slower, and nothing here does anything.

Autocast casts every weight at every use where no gradient is wanted, and once a pass, one by one, where it is: 182 and 328
launches of the paper's network. To sample, weights are cast for good (``cast_weights``: the values are those that autocast
would make); to train, the small ones in one go (``small_weights_cast``), the others, whose gradients would be held too long
together, by autocast. The paper's network in 16 bits is 242 MiB: instead of 484 when sampling; beside them in training, as with
autocast alone, and up to 8 MiB more (d = 8, by patch index), because the small ones' gradients are cast together, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pbbench.experiment.settings import Precision
from pbbench.model import kernels

SMALL = 2**20
"""Elements of a weight that is cast with the others: of the paper's network 134 of 160, 13 of 127 million elements."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Network = TypeVar("Network", bound=nn.Module)


def arranged(network: Network) -> Network:
    """Its weights in the layout that is quickest where they are; returns itself. Values and names stay."""
    if kernels.usable(next(network.parameters())):
        _replace(network, lambda weight: weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight)
    return network


def nhwc(weight: Tensor) -> bool:
    """Does a convolution with this weight compute in channels_last, so that its map best lies so?"""
    return kernels.usable(weight) and weight.is_contiguous(memory_format=torch.channels_last)


def cast_weights(network: Network, mixed_precision: Precision) -> Network:
    """Its weights of convolutions and linear layers in the 16 bits that sampling computes in, in place; returns itself. Norms
    stay float32."""
    if mixed_precision != "no" and kernels.usable(next(network.parameters())):
        _replace(network, lambda weight: weight.to(DTYPES[mixed_precision]))
    return network


def _replace(network: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Weights of convolutions and linear layers by changed ones, one at a time, before anything holds on to them. (Module.to
    cannot do it on fake tensors.)"""
    for module, name in _weights(network):
        parameter = module._parameters[name]
        assert parameter is not None
        module._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)


@contextmanager
def small_weights_cast(network: nn.Module) -> Iterator[None]:
    """Within it the small weights are 16-bit tensors whose gradients reach the float32 ones; under autocast and with gradients
    only, and not where a layer runs again in backward, which happens outside of it."""
    kind = next(network.parameters()).device.type
    if not (torch.is_autocast_enabled(kind) and torch.is_grad_enabled() and kernels.usable(next(network.parameters()))):
        yield
        return
    if any(getattr(module, "recompute", False) for module in network.modules()):
        yield
        return
    places = [(m, name) for m, name in _weights(network) if (p := m._parameters[name]) is not None and p.numel() < SMALL]
    whole = [module._parameters[name] for module, name in places]
    cast = _CastTogether.apply(torch.get_autocast_dtype(kind), *whole) if whole else ()
    try:
        for (module, name), weight in zip(places, cast, strict=True):
            module._parameters[name] = weight
        yield
    finally:
        for (module, name), parameter in zip(places, whole, strict=True):
            module._parameters[name] = parameter


class _CastTogether(torch.autograd.Function):
    """float32 tensors → the same in 16 bits, one launch for many; so their gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_together(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        wide = iter(_together([gradient for gradient in gradients if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(wide) for gradient in gradients)


def _together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast


def _weights(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where the weights of convolutions and linear layers are: (module, name of the parameter)."""
    for module in network.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            yield from ((module, name) for name, parameter in module._parameters.items() if parameter is not None)
