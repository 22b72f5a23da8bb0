"""Attention over the pixels of a map: softmax attention, and linear attention in little memory, in which every pixel reads a
32 × 32 summary of the image per head (Shen et al. 2021).

    q = softmax over the 32 channels of W_q y        k = softmax over the pixels of W_k y        v = W_v y
    context = k vᵀ                                   out = W_out (contextᵀ q / sqrt(32)) + bias

The products associate. Where there are more pixels than channels, v (128 × hw) and what is read (128 × hw) need not exist:

    context = (k yᵀ) W_vᵀ        out = (W_out contextᵀ / sqrt(32)) q + bias

with k yᵀ (128 × C) and W_out contextᵀ (C × 128) in their place, for no more multiplications. Without gradients the softmax
happens in place and k exists for one head at a time; q for as many heads as fill no more than a map of C channels.

Shapes: R rows, C channels, h × w = hw pixels, H = 4 heads of D = 32. Everything is in the dtype of y, under autocast too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pbbench.model import kernels
from pbbench.model.lean import softmax_heads, softmax_pixels

HEADS = 4
HEAD_WIDTH = 32


def softmax_attention(qkv: Tensor) -> Tensor:
    """Every pixel reads the others, by heads. qkv: R 3·128 h w, heads within each third. Returns R 128 h w in its layout."""
    (R, _, h, w), contiguous = qkv.shape, qkv.is_contiguous()
    # CUDA's kernels need the last dimension (32) contiguous and the other strides aligned: pixel by pixel in memory, as
    # channels_last has it already. The strides are then made from the shape: those that a map of one pixel comes with (1 where
    # there is but one) they refuse.
    qkv = qkv.permute(0, 2, 3, 1).reshape(-1).view(R, h * w, 3, HEADS, HEAD_WIDTH)
    q, k, v = qkv.transpose(1, 3).unbind(2)  # R heads h·w 32
    read = F.scaled_dot_product_attention(q, k, v)  # scale 32^−0.5 is its default
    del qkv, q, k, v
    read = read.transpose(1, 2).reshape(R, h, w, HEADS * HEAD_WIDTH).permute(0, 3, 1, 2)
    return read.contiguous() if contiguous else read


def linear_attention(y: list[Tensor], qkv: nn.Conv2d, out: nn.Conv2d) -> Tensor:
    """The equations above for the map in the list ``y``, R C h w, which is taken out of it so that nobody else holds it.

    qkv: the weights W_q, W_k, W_v (3·128 × C), heads outermost; out: W_out (C × 128) and bias. Returns R C h w.
    """
    dtype, (_, C, h, w) = y[0].dtype, y[0].shape
    weights = (qkv.weight.to(dtype), out.weight.to(dtype), None if out.bias is None else out.bias.to(dtype))
    with torch.autocast(y[0].device.type, enabled=False):
        if kernels.usable(y[0]):
            return (_few_pixels_fused if h * w <= C else _many_pixels_fused)(y, *weights)
        if h * w <= C:
            return _few_pixels(y.pop(), *weights)
        return _many_pixels(y.pop(), *weights) if torch.is_grad_enabled() else _head_by_head(y, *weights)


# On a GPU, in few launches: all heads at once; the result lies as y does.


def _few_pixels_fused(ys: list[Tensor], w_qkv: Tensor, w_out: Tensor, bias: Tensor | None) -> Tensor:
    """q, k and v are laid channel by channel, so that a head is a matrix; each on its own, so that backward keeps no more."""
    y = ys.pop()
    R, C, h, w = y.shape
    width, heads, channels_last = HEADS * HEAD_WIDTH, (R * HEADS, HEAD_WIDTH, h * w), not y.is_contiguous()
    qkv = y.permute(0, 2, 3, 1).reshape(-1, C) @ w_qkv.view(3 * width, C).T  # R·hw 3·128
    del y
    q, k, v = qkv.view(R, h, w, 3 * width).permute(0, 3, 1, 2).chunk(3, dim=1)  # R 128 h w
    del qkv
    k, v = softmax_pixels(k, contiguous=True), v.contiguous()
    context = torch.bmm(k.view(heads), v.view(heads).mT)  # R·H D D
    del k, v
    q = softmax_heads(q, HEAD_WIDTH, factor=HEAD_WIDTH**-0.5, contiguous=True)
    read = torch.bmm(context.mT, q.view(heads)).view(R, width, h * w)
    del q
    out = F.linear(read.mT.reshape(-1, width), w_out.view(C, width), bias)  # R·hw C
    out = out.view(R, h, w, C).permute(0, 3, 1, 2)
    return out if channels_last else out.contiguous()


def _many_pixels_fused(ys: list[Tensor], w_qkv: Tensor, w_out: Tensor, bias: Tensor | None) -> Tensor:
    """Beside y there is one map of 128 channels at a time."""
    y = ys.pop()
    R, C, h, w = y.shape
    width, channels_last = HEADS * HEAD_WIDTH, not y.is_contiguous()
    w_q, w_k, w_v = w_qkv.chunk(3)
    k = softmax_pixels(F.conv2d(y, w_k), overwrite=True)
    seen = torch.bmm(k.flatten(2), y.flatten(2).mT)  # R H·D C: k yᵀ
    del k
    of_all = (seen @ w_v.view(width, C).T).view(R, HEADS, HEAD_WIDTH, HEADS, HEAD_WIDTH)  # a head's keys, every head's values …
    del seen
    context = of_all.diagonal(dim1=1, dim2=3).permute(3, 2, 0, 1).reshape(HEADS, HEAD_WIDTH, -1)  # … and its own: H D R·D
    del of_all
    reader = torch.bmm(w_out.view(C, HEADS, HEAD_WIDTH).transpose(0, 1), context)  # H C R·D
    reader = reader.view(HEADS, C, R, HEAD_WIDTH).permute(2, 1, 0, 3).reshape(R, C, width)
    del context
    q = F.conv2d(y, w_q)
    del y
    q = softmax_heads(q, HEAD_WIDTH, overwrite=True, factor=HEAD_WIDTH**-0.5).flatten(2)  # R H·D hw
    if channels_last:
        out = torch.bmm(q.mT, reader.mT) if bias is None else torch.baddbmm(bias, q.mT, reader.mT)  # R hw C
        return out.view(R, h, w, C).permute(0, 3, 1, 2)
    out = torch.bmm(reader, q) if bias is None else torch.baddbmm(bias.view(1, C, 1), reader, q)
    return out.view(R, C, h, w)


def _few_pixels(y: Tensor, w_qkv: Tensor, w_out: Tensor, bias: Tensor | None) -> Tensor:
    R, _, h, w = y.shape
    q, k, v = (F.conv2d(y, part).view(R, HEADS, HEAD_WIDTH, h * w) for part in w_qkv.chunk(3))
    context = k.softmax(dim=3) @ v.mT * HEAD_WIDTH**-0.5  # R H D D
    read = context.mT @ q.softmax(dim=2)  # R H D hw
    return F.conv2d(read.view(R, HEADS * HEAD_WIDTH, h, w), w_out, bias)


def _many_pixels(y: Tensor, w_qkv: Tensor, w_out: Tensor, bias: Tensor | None) -> Tensor:
    R, C, h, w = y.shape
    w_q, w_k, w_v = w_qkv.chunk(3)
    k = F.conv2d(y, w_k).flatten(2).softmax(dim=2)  # R H·D hw
    seen = (k @ y.flatten(2).mT).view(R, HEADS, HEAD_WIDTH, C)  # k yᵀ
    context = torch.einsum("rhdc,hec->rhde", seen, w_v.view(HEADS, HEAD_WIDTH, C)) * HEAD_WIDTH**-0.5
    reader = torch.einsum("che,rhde->rchd", w_out.view(C, HEADS, HEAD_WIDTH), context).flatten(2)  # R C H·D
    q = F.conv2d(y, w_q).view(R, HEADS, HEAD_WIDTH, h * w).softmax(dim=2).flatten(1, 2)  # R H·D hw
    read = reader @ q if bias is None else torch.baddbmm(bias.view(1, C, 1), reader, q)
    return read.view(R, C, h, w)


def _head_by_head(ys: list[Tensor], w_qkv: Tensor, w_out: Tensor, bias: Tensor | None) -> Tensor:
    y = ys.pop()
    R, C, h, w = y.shape
    w_q, w_k, w_v = (part.view(HEADS, HEAD_WIDTH, C, 1, 1) for part in w_qkv.chunk(3))
    reader = y.new_empty(R, C, HEADS, HEAD_WIDTH)
    for head, w_head in enumerate(w_out.view(C, HEADS, HEAD_WIDTH).unbind(1)):
        k = F.conv2d(y, w_k[head]).flatten(2)  # R D hw
        torch.softmax(k, dim=2, out=k)
        context = k @ y.flatten(2).mT @ w_v[head].view(HEAD_WIDTH, C).T * HEAD_WIDTH**-0.5  # R D D
        del k
        reader[:, :, head] = w_head @ context.mT
    at_once = min(HEADS, max(1, C // HEAD_WIDTH))
    read: Tensor | None = None
    for heads in (slice(start, start + at_once) for start in range(0, HEADS, at_once)):
        q = F.conv2d(y, w_q[heads].flatten(0, 1)).view(R, -1, HEAD_WIDTH, h * w)
        if heads.stop >= HEADS:
            del y
        torch.softmax(q, dim=2, out=q)
        part = reader[:, :, heads].flatten(2)  # R C D·heads
        if read is None:
            read = part @ q.flatten(1, 2) if bias is None else torch.baddbmm(bias.view(1, C, 1), part, q.flatten(1, 2))
        else:
            read.baddbmm_(part, q.flatten(1, 2))
    assert read is not None
    return read.view(R, C, h, w)
