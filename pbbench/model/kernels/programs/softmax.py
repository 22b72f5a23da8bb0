"""The Triton kernels of ``softmax``; what holds for all of them is said in ``programs``.

Over the pixels: a program has a row, some of its channels, and all their pixels (``forward``, ``backward``) or a span of them;
then ``peaks`` and ``products`` leave a number or two per channel and span, R × spans × C, and ``apply`` and ``apply_backward``
begin by combining those. Over the channels of a head: a tile is one head × some pixels, counted through all rows.
"""

import triton
import triton.language as tl

from pbbench.model.kernels.programs.places import COUNTS, in_row, in_rows


@triton.jit
def _logits(x, at, c, channels, p, pixels):
    """A tile of x: −∞ beyond the last pixel, 0 beyond the last channel, where nothing is written."""
    v = tl.load(x + at, mask=(c < channels)[:, None] & (p < pixels)[None, :], other=0.0).to(tl.float32)
    return tl.where((p < pixels)[None, :], v, float("-inf"))


@triton.jit(do_not_specialize=COUNTS)
def forward(
    x, y, x_row, x_channel, x_pixel, y_row, y_channel, y_pixel, channels, pixels, channel_parts,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """All pixels at once. y may be x."""
    row = tl.program_id(0) // channel_parts
    c = tl.program_id(0) % channel_parts * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.arange(0, PIXELS)
    v = _logits(x, in_row(row, c, p, x_row, x_channel, x_pixel), c, channels, p, pixels)
    e = tl.exp(v - tl.max(v, axis=1)[:, None])
    out = e * (1.0 / tl.sum(e, axis=1))[:, None]
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    tl.store(y + in_row(row, c, p, y_row, y_channel, y_pixel), out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def peaks(
    x, part_peak, part_total, x_row, x_channel, x_pixel, channels, pixels, channel_parts, spans, span,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Each channel's largest value in a span, and the sum of exp(value − largest)."""
    part = tl.program_id(0) % (channel_parts * spans)
    row = tl.program_id(0) // (channel_parts * spans)
    c = part // spans * CHANNELS + tl.arange(0, CHANNELS)
    peak = tl.full([CHANNELS], float("-inf"), tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    begin = part % spans * span
    for start in range(begin, tl.minimum(begin + span, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        v = _logits(x, in_row(row, c, p, x_row, x_channel, x_pixel), c, channels, p, pixels)
        higher = tl.maximum(peak, tl.max(v, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(v - higher[:, None]), axis=1)
        peak = higher
    at = (row * spans + part % spans) * channels + c
    tl.store(part_peak + at, peak, mask=c < channels)
    tl.store(part_total + at, total, mask=c < channels)


@triton.jit(do_not_specialize=COUNTS)
def apply(
    x, y, part_peak, part_total, x_row, x_channel, x_pixel, y_row, y_channel, y_pixel,
    channels, pixels, channel_parts, spans, span,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """y may be x."""
    part = tl.program_id(0) % (channel_parts * spans)
    row = tl.program_id(0) // (channel_parts * spans)
    c = part // spans * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.arange(0, SPANS)
    known = (s < spans)[:, None] & (c < channels)[None, :]
    at = (row * spans + s[:, None]) * channels + c[None, :]
    part_peaks = tl.where((s < spans)[:, None], tl.load(part_peak + at, mask=known, other=0.0), float("-inf"))
    peak = tl.max(part_peaks, axis=0)
    total = tl.sum(tl.load(part_total + at, mask=known, other=1.0) * tl.exp(part_peaks - peak[None, :]), axis=0)
    over = 1.0 / total
    begin = part % spans * span
    for start in range(begin, tl.minimum(begin + span, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        v = _logits(x, in_row(row, c, p, x_row, x_channel, x_pixel), c, channels, p, pixels)
        out = tl.exp(v - peak[:, None]) * over[:, None]
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        tl.store(y + in_row(row, c, p, y_row, y_channel, y_pixel), out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def backward(
    dy, y, dx, dy_row, dy_channel, dy_pixel, y_row, y_channel, y_pixel, dx_row, dx_channel, dx_pixel,
    channels, pixels, channel_parts,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // channel_parts
    c = tl.program_id(0) % channel_parts * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.arange(0, PIXELS)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    v = tl.load(y + in_row(row, c, p, y_row, y_channel, y_pixel), mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + in_row(row, c, p, dy_row, dy_channel, dy_pixel), mask=inside, other=0.0).to(tl.float32)
    out = v * (d - tl.sum(v * d, axis=1)[:, None])
    tl.store(dx + in_row(row, c, p, dx_row, dx_channel, dx_pixel), out.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def products(
    dy, y, part_total, dy_row, dy_channel, dy_pixel, y_row, y_channel, y_pixel,
    channels, pixels, channel_parts, spans, span,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Each channel's Σ y · dy in a span."""
    part = tl.program_id(0) % (channel_parts * spans)
    row = tl.program_id(0) // (channel_parts * spans)
    c = part // spans * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    begin = part % spans * span
    for start in range(begin, tl.minimum(begin + span, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        v = tl.load(y + in_row(row, c, p, y_row, y_channel, y_pixel), mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + in_row(row, c, p, dy_row, dy_channel, dy_pixel), mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(v * d, axis=1)
    tl.store(part_total + (row * spans + part % spans) * channels + c, total, mask=c < channels)


@triton.jit(do_not_specialize=COUNTS)
def apply_backward(
    dy, y, dx, part_total, dy_row, dy_channel, dy_pixel, y_row, y_channel, y_pixel, dx_row, dx_channel, dx_pixel,
    channels, pixels, channel_parts, spans, span,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % (channel_parts * spans)
    row = tl.program_id(0) // (channel_parts * spans)
    c = part // spans * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.arange(0, SPANS)
    known = (s < spans)[:, None] & (c < channels)[None, :]
    at = (row * spans + s[:, None]) * channels + c[None, :]
    total = tl.sum(tl.load(part_total + at, mask=known, other=0.0), axis=0)
    begin = part % spans * span
    for start in range(begin, tl.minimum(begin + span, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        v = tl.load(y + in_row(row, c, p, y_row, y_channel, y_pixel), mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + in_row(row, c, p, dy_row, dy_channel, dy_pixel), mask=inside, other=0.0).to(tl.float32)
        out = v * (d - total[:, None])
        tl.store(dx + in_row(row, c, p, dx_row, dx_channel, dx_pixel), out.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def heads_forward(
    x, y, x_row, x_channel, x_pixel, y_row, y_channel, y_pixel, rows, heads, width, pixels, factor,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y may be x."""
    c = tl.arange(0, CHANNELS)
    channel = tl.program_id(0) % heads * width + c
    p = tl.program_id(0) // heads * PIXELS + tl.arange(0, PIXELS)
    inside = (c < width)[:, None] & (p < rows * pixels)[None, :]
    v = tl.load(x + in_rows(p, pixels, channel, x_row, x_channel, x_pixel), mask=inside, other=0.0).to(tl.float32)
    v = tl.where((c < width)[:, None], v, float("-inf"))
    e = tl.exp(v - tl.max(v, axis=0)[None, :])
    out = e * (factor / tl.sum(e, axis=0))[None, :]
    tl.store(y + in_rows(p, pixels, channel, y_row, y_channel, y_pixel), out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def heads_backward(
    dy, y, dx, dy_row, dy_channel, dy_pixel, y_row, y_channel, y_pixel, dx_row, dx_channel, dx_pixel,
    rows, heads, width, pixels, factor,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, CHANNELS)
    channel = tl.program_id(0) % heads * width + c
    p = tl.program_id(0) // heads * PIXELS + tl.arange(0, PIXELS)
    inside = (c < width)[:, None] & (p < rows * pixels)[None, :]
    v = tl.load(y + in_rows(p, pixels, channel, y_row, y_channel, y_pixel), mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + in_rows(p, pixels, channel, dy_row, dy_channel, dy_pixel), mask=inside, other=0.0).to(tl.float32)
    out = v * (d - (tl.sum(v * d, axis=0) / factor)[None, :])
    tl.store(dx + in_rows(p, pixels, channel, dx_row, dx_channel, dx_pixel), out.to(dx.dtype.element_ty), mask=inside)
