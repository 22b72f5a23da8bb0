"""Group normalisation, scale and shift, SiLU, and what is added after it, as one operator; its backward as another.

    x̂ = (x − mean) · rstd over each row's groups       gain = weight · (scale + 1)      offset = bias · (scale + 1) + shift
    z = x̂ · gain + offset                              y = SiLU(z) + residual

Shapes: R rows, C channels, hw pixels, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("pbbench::norm_silu", mutates_args=())
def norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU(norm(x) · (scale + 1) + shift) + residual.

    x, residual: R C h w; weight, bias: C; scale, shift: R × C, with any row stride (halves of the modulation's output are taken
    as they are), or None both. The parameters' dtypes are free. Returns y like x, and mean and rstd, R × G in float32.
    """
    raise NotImplementedError


@norm_silu.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@torch.library.custom_op("pbbench::norm_silu_again", mutates_args=())
def norm_silu_again(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
) -> Tensor:
    """What ``norm_silu`` gave without a residual, to the bit, from the statistics that it gave."""
    raise NotImplementedError


@norm_silu_again.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pbbench::norm_silu_backward", mutates_args=())
def norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all that ``norm_silu`` read but the residual, whose gradient is dy.

    Returns dx like x, dweight, dbias like theirs, and dmodulation: R × 2·C, dscale beside dshift in the dtype of scale
    (chunk(2, 1) gives the two), or no elements where there was no scale.
    """
    raise NotImplementedError


@norm_silu_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmodulation = weight.new_empty(0) if scale is None else scale.new_empty(x.shape[0], 2 * x.shape[1])
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), dmodulation
