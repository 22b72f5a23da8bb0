"""Normalisation over the channels of each pixel, as one operator; its backward as another.

    n = (x − mean) · rstd, mean and biased variance over the C channels        y = n · scale + shift + residual

Backward takes mean and rstd again from x, which it has in registers anyway: x is all that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("pbbench::channel_norm", mutates_args=())
def channel_norm(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    """n · scale + shift + residual. x, residual: R C h w; scale, shift: 1 C 1 1, in any dtype. Returns y like x."""
    raise NotImplementedError


@channel_norm.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pbbench::channel_norm_", mutates_args={"x"})
def channel_norm_(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, eps: float) -> None:
    """The same in the place of x. The residual must not share its storage."""
    raise NotImplementedError


@channel_norm_.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, eps: float) -> None:
    return None


@torch.library.custom_op("pbbench::channel_norm_backward", mutates_args=())
def channel_norm_backward(dy: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dscale and dshift like scale. The residual's gradient is dy."""
    raise NotImplementedError


@channel_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
