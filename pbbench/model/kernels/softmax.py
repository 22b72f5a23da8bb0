"""The two softmaxes of linear attention: k over all pixels, q over the channels of each head, times a factor.

Both take the map as the convolution made it, R K h w with K channels, also where it is a slice of a larger map's channels (the
rows are then further apart). Names that end in an underscore write the result in the place of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("pbbench::softmax_pixels", mutates_args=())
def softmax_pixels(x: Tensor) -> Tensor:
    """Softmax over h·w of every channel of x, R K h w. Returns y like x."""
    raise NotImplementedError


@softmax_pixels.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pbbench::softmax_pixels_", mutates_args={"x"})
def softmax_pixels_(x: Tensor) -> None:
    raise NotImplementedError


@softmax_pixels_.register_fake
def _(x: Tensor) -> None:
    return None


@torch.library.custom_op("pbbench::softmax_pixels_backward", mutates_args=())
def softmax_pixels_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dx = y · (dy − Σ y · dy), the sum over the pixels. Returns dx like y."""
    raise NotImplementedError


@softmax_pixels_backward.register_fake
def _(dy: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


@torch.library.custom_op("pbbench::softmax_heads", mutates_args=())
def softmax_heads(x: Tensor, width: int, factor: float) -> Tensor:
    """Softmax over each ``width`` channels of a pixel, times ``factor``. x: R K h w, K divisible by width. Returns y like x."""
    raise NotImplementedError


@softmax_heads.register_fake
def _(x: Tensor, width: int, factor: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pbbench::softmax_heads_", mutates_args={"x"})
def softmax_heads_(x: Tensor, width: int, factor: float) -> None:
    raise NotImplementedError


@softmax_heads_.register_fake
def _(x: Tensor, width: int, factor: float) -> None:
    return None


@torch.library.custom_op("pbbench::softmax_heads_backward", mutates_args=())
def softmax_heads_backward(dy: Tensor, y: Tensor, width: int, factor: float) -> Tensor:
    """dx = y · (dy − Σ y · dy / factor), the sum over the head's channels; y with its factor. Returns dx like y."""
    raise NotImplementedError


@softmax_heads_backward.register_fake
def _(dy: Tensor, y: Tensor, width: int, factor: float) -> Tensor:
    return torch.empty_like(y)
