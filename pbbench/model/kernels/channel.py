"""Normalisation over the channels of each pixel, as one operator; its backward as another.

    n = (x − mean) · rstd, mean and biased variance over the C channels        y = n · scale + shift + residual

Backward takes mean and rstd again from x, which it has in registers anyway: x is all that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pbbench.model.kernels import tiles
from pbbench.model.kernels.norm import sum_rows
from pbbench.model.kernels.tiles import Lies, ceil_div, evenly_spaced, launch, lies, power_of_two, result


@torch.library.custom_op("pbbench::channel_norm", mutates_args=())
def channel_norm(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    """n · scale + shift + residual. x, residual: R C h w; scale, shift: 1 C 1 1, in any dtype. Returns y like x."""
    y = result(x)
    _forward(x, y, scale, shift, residual, eps)
    return y


@channel_norm.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    return result(x)


@torch.library.custom_op("pbbench::channel_norm_", mutates_args={"x"})
def channel_norm_(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, eps: float) -> None:
    """The same in the place of x. The residual must not share its storage."""
    if lies(x) is None:
        x.copy_(channel_norm(x, scale, shift, residual, eps))
    else:
        _forward(x, x, scale, shift, residual, eps)


@channel_norm_.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, eps: float) -> None:
    return None


@torch.library.custom_op("pbbench::channel_norm_backward", mutates_args=())
def channel_norm_backward(dy: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dscale and dshift like scale. The residual's gradient is dy."""
    from pbbench.model.kernels.programs import channel as programs

    (dx, dx_lies), (x, x_lies), (dy, dy_lies) = evenly_spaced(result(x)), evenly_spaced(x), evenly_spaced(dy)
    (R, C), hw, scale = x.shape[:2], x[0, 0].numel(), scale.contiguous()
    block, pixels = _tile(x, x_lies, maps=2)
    count = ceil_div(R * hw, pixels)
    each = ceil_div(count, tiles.PROGRAMS)  # tiles, so that the sums per channel are few, and always the same
    total = ceil_div(count, each)
    of_scale, of_shift = scale.new_empty(2, total * C, dtype=torch.float32).unbind()
    maps, steps, sizes = (dy, x, dx, scale, of_scale, of_shift), (*dy_lies, *x_lies, *dx_lies), (R, C, hw, each, eps)
    launch(programs.backward, total, x, *maps, *steps, *sizes, elements=2 * block * pixels, CHANNELS=block, PIXELS=pixels)
    dscale, dshift = torch.empty_like(scale), torch.empty_like(scale)
    sum_rows(of_scale, of_shift, scale, scale, None, dscale, dshift, None, 0, total, 1)
    return dx, dscale, dshift


@channel_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return result(x), torch.empty_like(scale), torch.empty_like(scale)


def _forward(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, eps: float) -> None:
    from pbbench.model.kernels.programs import channel as programs

    (x, x_lies), (y, y_lies) = evenly_spaced(x), evenly_spaced(y)
    more, more_lies = (None, Lies(0, 0, 0)) if residual is None else evenly_spaced(residual)
    R, C, hw = *x.shape[:2], x[0, 0].numel()
    block, pixels = _tile(x, x_lies, maps=1)
    maps, steps = (x, y, more, scale.contiguous(), shift.contiguous()), (*x_lies, *y_lies, *more_lies)
    total = ceil_div(R * hw, pixels)
    launch(programs.forward, total, x, *maps, *steps, R, C, hw, eps, elements=block * pixels, CHANNELS=block, PIXELS=pixels)


def _tile(x: Tensor, x_lies: Lies, maps: int) -> tuple[int, int]:
    """Channels, all of them, × pixels of a tile, where so many maps are read.

    Where the pixels of a channel are neighbours in memory, 8 of them at least: of fewer, only half a sector would be read.
    """
    channels, pixels = power_of_two(x.shape[1]), x[0, 0].numel()
    least = 8 if x_lies.channel != 1 and pixels % 8 == 0 else 1
    return channels, min(power_of_two(x.shape[0] * pixels), max(least, tiles.TILE // maps // channels))
