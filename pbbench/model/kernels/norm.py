"""Group normalisation, scale and shift, SiLU, and what is added after it, as one operator; its backward as another.

    x̂ = (x − mean) · rstd over each row's groups       gain = weight · (scale + 1)      offset = bias · (scale + 1) + shift
    z = x̂ · gain + offset                              y = SiLU(z) + residual

Shapes: R rows, C channels, hw pixels, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pbbench.model.kernels import tiles
from pbbench.model.kernels.tiles import Lies, Tiles, ceil_div, evenly_spaced, launch, result


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
    from pbbench.model.kernels.programs import norm as programs

    (y, y_lies), (x, x_lies) = evenly_spaced(result(x)), evenly_spaced(x)
    more, more_lies = (None, Lies(0, 0, 0)) if residual is None else evenly_spaced(residual)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    cut = _cut(x, x_lies, groups, maps=1)
    scale, shift, *steps = _modulation(scale, shift)
    maps, affine = (x, y, more, weight.contiguous(), bias.contiguous(), scale, shift), (*x_lies, *y_lies, *more_lies, *steps)
    sizes, tile = (groups, x.shape[1] // groups, x[0, 0].numel()), {"CHANNELS": cut.channels, "PIXELS": cut.pixels}
    total = mean.numel() * cut.parts
    if cut.parts == 1:
        launch(programs.forward, total, x, *maps, mean, rstd, *affine, *sizes, eps, elements=cut.elements, **tile)
        return y, mean, rstd
    parts = (cut.parts, cut.spans, cut.span)
    part_mean, part_m2 = mean.new_empty(2, total).unbind()
    launch(programs.statistics, total, x, x, part_mean, part_m2, *x_lies, *sizes, *parts, elements=cut.elements, **tile)
    tile["PARTS"] = tiles.PARTS
    statistics = (mean, rstd, part_mean, part_m2)
    launch(programs.apply, total, x, *maps, *statistics, *affine, *sizes, *parts, eps, elements=cut.elements, **tile)
    return y, mean, rstd


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
    return result(x), mean, rstd


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
    """What ``norm_silu`` gave without a residual, from the statistics that it gave."""
    from pbbench.model.kernels.programs import norm as programs

    (y, y_lies), (x, x_lies) = evenly_spaced(result(x)), evenly_spaced(x)
    cut = _cut(x, x_lies, groups, maps=1)
    scale, shift, *steps = _modulation(scale, shift)
    launch(
        programs.apply, mean.numel() * cut.parts, x, x, y, None, weight.contiguous(), bias.contiguous(), scale, shift,
        mean, rstd, None, None, *x_lies, *y_lies, 0, 0, 0, *steps, groups, x.shape[1] // groups, x[0, 0].numel(),
        cut.parts, cut.spans, cut.span, 0.0,
        elements=cut.elements, CHANNELS=cut.channels, PIXELS=cut.pixels, PARTS=tiles.PARTS,
    )  # fmt: skip
    return y


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
    return result(x)


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
    from pbbench.model.kernels.programs import norm as programs

    (dx, dx_lies), (x, x_lies), (dy, dy_lies) = evenly_spaced(result(x)), evenly_spaced(x), evenly_spaced(dy)
    (R, C), hw = x.shape[:2], x[0, 0].numel()
    cut = _cut(x, x_lies, groups, maps=2)
    weight, bias = weight.contiguous(), bias.contiguous()
    scale, shift, *steps = _modulation(scale, shift)
    affine = (weight, bias, scale, shift, mean, rstd)
    sizes: tuple[int, ...] = (groups, C // groups, hw)
    args: tuple[Any, ...]
    tile = {"CHANNELS": cut.channels, "PIXELS": cut.pixels}
    dgain, doffset = mean.new_empty(2, R * cut.spans * C).unbind()
    total = mean.numel() * cut.parts
    maps: tuple[Any, ...] = (dy, x, dx, *affine)
    lies: tuple[int, ...] = (*dy_lies, *x_lies, *dx_lies)
    if cut.parts == 1:
        launch(programs.backward, total, x, *maps, dgain, doffset, *lies, *steps, *sizes, elements=2 * cut.elements, **tile)
    else:
        sizes = (*sizes, cut.parts, cut.spans, cut.span)
        part_sums = mean.new_empty(2, total).unbind()
        args = (dy, x, *affine, dgain, doffset, *part_sums, *dy_lies, *x_lies, *steps, *sizes)
        launch(programs.sums, total, x, *args, elements=2 * cut.elements, **tile)
        args = (*maps, *part_sums, *lies, *steps, *sizes)
        launch(programs.apply_backward, total, x, *args, elements=2 * cut.elements, **tile, PARTS=tiles.PARTS)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    dmodulation = weight.new_empty(0) if scale is None else scale.new_empty(R, 2 * C)
    sum_rows(dgain, doffset, weight, bias, scale, dweight, dbias, dmodulation, steps[0], R, cut.spans)
    return dx, dweight, dbias, dmodulation


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
    return result(x), torch.empty_like(weight), torch.empty_like(bias), dmodulation


def sum_rows(
    dgain: Tensor,
    doffset: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    dmodulation: Tensor | None,
    scale_step: int,
    rows: int,
    spans: int,
) -> None:
    """Fill dweight, dbias and dmodulation from d gain and d offset, rows × spans × C. Always in the same order."""
    from pbbench.model.kernels.programs import norm as programs

    C, at_once = dweight.numel(), 32 if spans > 1 else 1
    sizes = {"ROWS": 128 // at_once, "SPANS": at_once, "CHANNELS": 16}  # 16 float32 are two sectors
    gradients = (dweight, dbias, dmodulation)
    parameters = (dgain, doffset, weight, bias, scale)
    launch(
        programs.parameters, ceil_div(C, 16), dgain, *parameters, *gradients, scale_step, rows, spans, C, elements=4096, **sizes
    )


def _cut(x: Tensor, x_lies: Lies, groups: int, maps: int) -> Tiles:
    return tiles.whole_or_parts(x.shape[1] // groups, x[0, 0].numel(), x_lies.channel == 1, maps)


def _modulation(scale: Tensor | None, shift: Tensor | None) -> tuple[Any, ...]:
    """scale and shift with neighbouring channels side by side, and the steps from row to row."""
    if scale is None or shift is None:
        return None, None, 0, 0
    scale, shift = (value if value.stride(1) == 1 else value.contiguous() for value in (scale, shift))
    return scale, shift, scale.stride(0), shift.stride(0)
