"""The Triton kernels of ``channel``; what holds for all of them is said in ``programs``.

A tile is all channels × some pixels; pixels are counted through all rows, so that maps of one pixel fill a tile too.
"""

import triton
import triton.language as tl

from pbbench.model.kernels.programs.places import COUNTS, in_rows


@triton.jit
def _normal(v, inside, channels, eps):
    """n, and rstd for each pixel."""
    mean = tl.sum(v, axis=0) / channels
    d = tl.where(inside, v - mean[None, :], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(d * d, axis=0) / channels + eps)
    return d * rstd[None, :], rstd


@triton.jit(do_not_specialize=COUNTS)
def forward(
    x, y, residual, scale, shift, x_row, x_channel, x_pixel, y_row, y_channel, y_pixel,
    residual_row, residual_channel, residual_pixel, rows, channels, pixels, eps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y may be x: the program has read its tile when it writes it."""
    c = tl.arange(0, CHANNELS)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = (c < channels)[:, None] & (p < rows * pixels)[None, :]
    v = tl.load(x + in_rows(p, pixels, c, x_row, x_channel, x_pixel), mask=inside, other=0.0).to(tl.float32)
    n, _ = _normal(v, inside, channels, eps)
    gain = tl.load(scale + c, mask=c < channels, other=0.0).to(tl.float32)
    offset = tl.load(shift + c, mask=c < channels, other=0.0).to(tl.float32)
    out = n * gain[:, None] + offset[:, None]
    if residual is not None:
        at = in_rows(p, pixels, c, residual_row, residual_channel, residual_pixel)
        out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + in_rows(p, pixels, c, y_row, y_channel, y_pixel), out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def backward(
    dy, x, dx, scale, dscale, dshift, dy_row, dy_channel, dy_pixel, x_row, x_channel, x_pixel, dx_row, dx_channel, dx_pixel,
    rows, channels, pixels, tiles, eps, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx = rstd · (dy · scale − mean(dy · scale) − n · mean(dy · scale · n)) of so many tiles, and their sums Σ dy · n and Σ dy
    per channel, programs × C each."""
    program = tl.program_id(0)
    c = tl.arange(0, CHANNELS)
    gain = tl.load(scale + c, mask=c < channels, other=0.0).to(tl.float32)
    of_scale = tl.zeros([CHANNELS], tl.float32)
    of_shift = tl.zeros([CHANNELS], tl.float32)
    for tile in range(program * tiles, (program + 1) * tiles):
        p = tile * PIXELS + tl.arange(0, PIXELS)
        inside = (c < channels)[:, None] & (p < rows * pixels)[None, :]
        v = tl.load(x + in_rows(p, pixels, c, x_row, x_channel, x_pixel), mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + in_rows(p, pixels, c, dy_row, dy_channel, dy_pixel), mask=inside, other=0.0).to(tl.float32)
        n, rstd = _normal(v, inside, channels, eps)
        of_scale += tl.sum(d * n, axis=1)
        of_shift += tl.sum(d, axis=1)
        d *= gain[:, None]
        level = tl.sum(d, axis=0) / channels
        along = tl.sum(d * n, axis=0) / channels
        out = rstd[None, :] * (d - level[None, :] - n * along[None, :])
        tl.store(dx + in_rows(p, pixels, c, dx_row, dx_channel, dx_pixel), out.to(dx.dtype.element_ty), mask=inside)
    tl.store(dscale + program * channels + c, of_scale, mask=c < channels)
    tl.store(dshift + program * channels + c, of_shift, mask=c < channels)
