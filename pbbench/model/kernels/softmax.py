"""The two softmaxes of linear attention: k over all pixels, q over the channels of each head, times a factor.

Both take the map as the convolution made it, R K h w with K channels, also where it is a slice of a larger map's channels (the
rows are then further apart). Names that end in an underscore write the result in the place of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pbbench.model.kernels import tiles
from pbbench.model.kernels.tiles import ceil_div, evenly_spaced, launch, lies, power_of_two, result


@torch.library.custom_op("pbbench::softmax_pixels", mutates_args=())
def softmax_pixels(x: Tensor, contiguous: bool = False) -> Tensor:
    """Softmax over h·w of every channel of x, R K h w. Returns y like x, or contiguous."""
    y = _result(x, contiguous)
    _over_pixels(x, y)
    return y


@softmax_pixels.register_fake
def _(x: Tensor, contiguous: bool = False) -> Tensor:
    return _result(x, contiguous)


@torch.library.custom_op("pbbench::softmax_pixels_", mutates_args={"x"})
def softmax_pixels_(x: Tensor) -> None:
    if lies(x) is None:
        x.copy_(softmax_pixels(x))
    else:
        _over_pixels(x, x)


@softmax_pixels_.register_fake
def _(x: Tensor) -> None:
    return None


@torch.library.custom_op("pbbench::softmax_pixels_backward", mutates_args=())
def softmax_pixels_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dx = y · (dy − Σ y · dy), the sum over the pixels. Returns dx like y."""
    from pbbench.model.kernels.programs import softmax as programs

    (dx, dx_lies), (y, y_lies), (dy, dy_lies) = evenly_spaced(result(y)), evenly_spaced(y), evenly_spaced(dy)
    (R, C), hw = y.shape[:2], y[0, 0].numel()
    cut = tiles.lines_or_parts(C, hw, y_lies.channel == 1, maps=2)
    tile = {"elements": 2 * cut.elements, "CHANNELS": cut.channels, "PIXELS": cut.pixels}
    of_maps, of_result, sizes = (*dy_lies, *y_lies), dx_lies, (C, hw, cut.channel_parts)
    if cut.spans == 1:
        launch(programs.backward, R * cut.parts, y, dy, y, dx, *of_maps, *of_result, *sizes, **tile)
        return dx
    part_total = y.new_empty(R * cut.spans * C, dtype=torch.float32)
    parts = (cut.spans, cut.span)
    launch(programs.products, R * cut.parts, y, dy, y, part_total, *of_maps, *sizes, *parts, **tile)
    args = (dy, y, dx, part_total, *of_maps, *of_result, *sizes, *parts)
    launch(programs.apply_backward, R * cut.parts, y, *args, **tile, SPANS=tiles.SPANS)
    return dx


@softmax_pixels_backward.register_fake
def _(dy: Tensor, y: Tensor) -> Tensor:
    return result(y)


@torch.library.custom_op("pbbench::softmax_heads", mutates_args=())
def softmax_heads(x: Tensor, width: int, factor: float, contiguous: bool = False) -> Tensor:
    """Softmax over each ``width`` channels of a pixel, times ``factor``. x: R K h w, K divisible by width. Returns y like x, or
    contiguous."""
    y = _result(x, contiguous)
    _over_heads(x, y, width, factor)
    return y


@softmax_heads.register_fake
def _(x: Tensor, width: int, factor: float, contiguous: bool = False) -> Tensor:
    return _result(x, contiguous)


@torch.library.custom_op("pbbench::softmax_heads_", mutates_args={"x"})
def softmax_heads_(x: Tensor, width: int, factor: float) -> None:
    if lies(x) is None:
        x.copy_(softmax_heads(x, width, factor))
    else:
        _over_heads(x, x, width, factor)


@softmax_heads_.register_fake
def _(x: Tensor, width: int, factor: float) -> None:
    return None


@torch.library.custom_op("pbbench::softmax_heads_backward", mutates_args=())
def softmax_heads_backward(dy: Tensor, y: Tensor, width: int, factor: float) -> Tensor:
    """dx = y · (dy − Σ y · dy / factor), the sum over the head's channels; y with its factor. Returns dx like y."""
    from pbbench.model.kernels.programs import softmax as programs

    (dx, dx_lies), (y, y_lies), (dy, dy_lies) = evenly_spaced(result(y)), evenly_spaced(y), evenly_spaced(dy)
    block, pixels, total, sizes = _heads(y, width, maps=2)
    args = (dy, y, dx, *dy_lies, *y_lies, *dx_lies, *sizes, factor)
    launch(programs.heads_backward, total, y, *args, elements=2 * block * pixels, CHANNELS=block, PIXELS=pixels)
    return dx


@softmax_heads_backward.register_fake
def _(dy: Tensor, y: Tensor, width: int, factor: float) -> Tensor:
    return result(y)


def _result(x: Tensor, contiguous: bool) -> Tensor:
    return x.new_empty(x.shape) if contiguous else result(x)


def _over_pixels(x: Tensor, y: Tensor) -> None:
    from pbbench.model.kernels.programs import softmax as programs

    (x, x_lies), (y, y_lies) = evenly_spaced(x), evenly_spaced(y)
    (R, C), hw = x.shape[:2], x[0, 0].numel()
    cut = tiles.lines_or_parts(C, hw, x_lies.channel == 1, maps=1)
    tile = {"elements": cut.elements, "CHANNELS": cut.channels, "PIXELS": cut.pixels}
    sizes = (C, hw, cut.channel_parts)
    if cut.spans == 1:
        launch(programs.forward, R * cut.parts, x, x, y, *x_lies, *y_lies, *sizes, **tile)
        return
    parts = (cut.spans, cut.span)
    of_parts = x.new_empty(2, R * cut.spans * C, dtype=torch.float32).unbind()
    launch(programs.peaks, R * cut.parts, x, x, *of_parts, *x_lies, *sizes, *parts, **tile)
    args = (x, y, *of_parts, *x_lies, *y_lies, *sizes, *parts)
    launch(programs.apply, R * cut.parts, x, *args, **tile, SPANS=tiles.SPANS)


def _over_heads(x: Tensor, y: Tensor, width: int, factor: float) -> None:
    from pbbench.model.kernels.programs import softmax as programs

    (x, x_lies), (y, y_lies) = evenly_spaced(x), evenly_spaced(y)
    block, pixels, total, sizes = _heads(x, width, maps=1)
    args = (x, y, *x_lies, *y_lies, *sizes, factor)
    launch(programs.heads_forward, total, x, *args, elements=block * pixels, CHANNELS=block, PIXELS=pixels)


def _heads(x: Tensor, width: int, maps: int) -> tuple[int, int, int, tuple[int, int, int, int]]:
    """Channels and pixels of a tile, the number of programs, and rows, heads, width, pixels."""
    rows, heads, hw = x.shape[0], x.shape[1] // width, x[0, 0].numel()
    block = power_of_two(width)
    pixels = max(1, min(power_of_two(rows * hw), tiles.TILE // 2 // maps // block))
    return block, pixels, ceil_div(rows * hw, pixels) * heads, (rows, heads, width, hw)
