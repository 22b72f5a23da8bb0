"""The Triton kernels of ``norm``; what holds for all of them is said in ``programs``.

A program has a row, a group of its channels, and a part of that group, channels × pixels (``tiles``). Where the group is one
part ``forward`` and ``backward`` see all of it; else ``statistics`` and ``sums`` leave a few numbers for each part, and then
``apply`` and ``apply_backward``, which have the same parts, begin by combining them. Parts are counted channels first.
"""

import triton
import triton.language as tl

from pbbench.model.kernels.programs.places import COUNTS, in_row


@triton.jit
def _gain_and_offset(weight, bias, scale, shift, scale_step, shift_step, row, channel, inside):
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + row * scale_step + channel, mask=inside, other=0.0).to(tl.float32) + 1.0
        gain = gain * factor
        offset = offset * factor + tl.load(shift + row * shift_step + channel, mask=inside, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def _silu(v, mean, rstd, gain, offset):
    z = (v - mean) * rstd * gain[:, None] + offset[:, None]
    return z * tl.sigmoid(z)


@triton.jit
def _silu_backward(v, dy, mean, rstd, gain, offset):
    """x̂ and dz = dy · σ(z) · (1 + z · (1 − σ(z)))."""
    normal = (v - mean) * rstd
    z = normal * gain[:, None] + offset[:, None]
    s = tl.sigmoid(z)
    return normal, dy * s * (1.0 + z * (1.0 - s))


@triton.jit(do_not_specialize=COUNTS)
def forward(
    x, y, residual, weight, bias, scale, shift, mean, rstd,
    x_row, x_channel, x_pixel, y_row, y_channel, y_pixel, residual_row, residual_channel, residual_pixel,
    scale_step, shift_step, groups, channels, pixels, eps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A whole group: the variance is taken about the mean, both from registers. ``channels``: of a group."""
    program = tl.program_id(0)
    row = program // groups
    c = tl.arange(0, CHANNELS)
    p = tl.arange(0, PIXELS)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    channel = program % groups * channels + c
    v = tl.load(x + in_row(row, channel, p, x_row, x_channel, x_pixel), mask=inside, other=0.0).to(tl.float32)
    m = tl.sum(v) / (channels * pixels)
    d = tl.where(inside, v - m, 0.0)
    r = 1.0 / tl.sqrt_rn(tl.sum(d * d) / (channels * pixels) + eps)
    tl.store(mean + program, m)
    tl.store(rstd + program, r)
    gain, offset = _gain_and_offset(weight, bias, scale, shift, scale_step, shift_step, row, channel, c < channels)
    out = _silu(v, m, r, gain, offset)
    if residual is not None:
        at = in_row(row, channel, p, residual_row, residual_channel, residual_pixel)
        out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + in_row(row, channel, p, y_row, y_channel, y_pixel), out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def statistics(
    x, part_mean, part_m2, x_row, x_channel, x_pixel, groups, channels, pixels, parts, spans, span,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The mean of each part, and the sum M2 of squared differences from it."""
    program = tl.program_id(0)
    part = program % parts
    group = program // parts
    c = part // spans * CHANNELS + tl.arange(0, CHANNELS)
    channel = group % groups * channels + c
    begin = part % spans * span
    end = tl.minimum(begin + span, pixels)
    height = tl.minimum(channels - part // spans * CHANNELS, CHANNELS)
    count = 0.0
    mean = 0.0
    m2 = 0.0
    for start in range(begin, end, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        v = tl.load(x + in_row(group // groups, channel, p, x_row, x_channel, x_pixel), mask=inside, other=0.0).to(tl.float32)
        n = (height * tl.minimum(pixels - start, PIXELS)).to(tl.float32)
        m = tl.sum(v) / n
        d = tl.where(inside, v - m, 0.0)
        apart = m - mean
        count += n
        mean += apart * (n / count)
        m2 += tl.sum(d * d) + apart * apart * n * ((count - n) / count)  # Chan et al. 1979
    tl.store(part_mean + program, mean)
    tl.store(part_m2 + program, m2)


@triton.jit
def _combined(
    part_mean, part_m2, group, channels, pixels, parts, spans, span, eps, CHANNELS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """The mean and rstd of a group from those of its parts: the differences of their means count for all their elements."""
    i = tl.arange(0, PARTS)
    inside = i < parts
    height = tl.minimum(channels - i // spans * CHANNELS, CHANNELS)
    width = tl.minimum(pixels - i % spans * span, span)
    n = tl.where(inside, height * width, 0).to(tl.float32)
    means = tl.load(part_mean + group * parts + i, mask=inside, other=0.0)
    mean = tl.sum(means * n) / (channels * pixels)
    apart = means - mean
    m2 = tl.sum(tl.load(part_m2 + group * parts + i, mask=inside, other=0.0) + apart * apart * n)
    return mean, 1.0 / tl.sqrt_rn(m2 / (channels * pixels) + eps)


@triton.jit(do_not_specialize=COUNTS)
def apply(
    x, y, residual, weight, bias, scale, shift, mean, rstd, part_mean, part_m2,
    x_row, x_channel, x_pixel, y_row, y_channel, y_pixel, residual_row, residual_channel, residual_pixel,
    scale_step, shift_step, groups, channels, pixels, parts, spans, span, eps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The result, with the statistics of the parts, left in ``mean`` and ``rstd``; or with those where there are no parts."""
    program = tl.program_id(0)
    part = program % parts
    group = program // parts
    row = group // groups
    if part_mean is not None:
        m, r = _combined(part_mean, part_m2, group, channels, pixels, parts, spans, span, eps, CHANNELS, PARTS)
        if part == 0:
            tl.store(mean + group, m)
            tl.store(rstd + group, r)
    else:
        m = tl.load(mean + group)
        r = tl.load(rstd + group)
    c = part // spans * CHANNELS + tl.arange(0, CHANNELS)
    channel = group % groups * channels + c
    gain, offset = _gain_and_offset(weight, bias, scale, shift, scale_step, shift_step, row, channel, c < channels)
    begin = part % spans * span
    for start in range(begin, tl.minimum(begin + span, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        v = tl.load(x + in_row(row, channel, p, x_row, x_channel, x_pixel), mask=inside, other=0.0).to(tl.float32)
        out = _silu(v, m, r, gain, offset)
        if residual is not None:
            at = in_row(row, channel, p, residual_row, residual_channel, residual_pixel)
            out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + in_row(row, channel, p, y_row, y_channel, y_pixel), out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def backward(
    dy, x, dx, weight, bias, scale, shift, mean, rstd, dgain, doffset,
    dy_row, dy_channel, dy_pixel, x_row, x_channel, x_pixel, dx_row, dx_channel, dx_pixel,
    scale_step, shift_step, groups, channels, pixels,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A whole group: dx, and d gain and d offset of its channels, R × C each."""
    program = tl.program_id(0)
    row = program // groups
    c = tl.arange(0, CHANNELS)
    p = tl.arange(0, PIXELS)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    channel = program % groups * channels + c
    m = tl.load(mean + program)
    r = tl.load(rstd + program)
    gain, offset = _gain_and_offset(weight, bias, scale, shift, scale_step, shift_step, row, channel, c < channels)
    v = tl.load(x + in_row(row, channel, p, x_row, x_channel, x_pixel), mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + in_row(row, channel, p, dy_row, dy_channel, dy_pixel), mask=inside, other=0.0).to(tl.float32)
    normal, dz = _silu_backward(v, d, m, r, gain, offset)  # dz is 0 outside, as d is
    of_gain = tl.sum(dz * normal, axis=1)
    of_offset = tl.sum(dz, axis=1)
    at = row * groups * channels + channel
    tl.store(dgain + at, of_gain, mask=c < channels)
    tl.store(doffset + at, of_offset, mask=c < channels)
    along = tl.sum(of_gain * gain) / (channels * pixels)
    level = tl.sum(of_offset * gain) / (channels * pixels)
    out = r * (dz * gain[:, None] - level - normal * along)
    tl.store(dx + in_row(row, channel, p, dx_row, dx_channel, dx_pixel), out.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def sums(
    dy, x, weight, bias, scale, shift, mean, rstd, dgain, doffset, part_along, part_level,
    dy_row, dy_channel, dy_pixel, x_row, x_channel, x_pixel,
    scale_step, shift_step, groups, channels, pixels, parts, spans, span,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Of each part: d gain and d offset of its channels, R × spans × C each, and the two sums over all of it that dx needs."""
    program = tl.program_id(0)
    part = program % parts
    group = program // parts
    row = group // groups
    c = part // spans * CHANNELS + tl.arange(0, CHANNELS)
    channel = group % groups * channels + c
    m = tl.load(mean + group)
    r = tl.load(rstd + group)
    gain, offset = _gain_and_offset(weight, bias, scale, shift, scale_step, shift_step, row, channel, c < channels)
    of_gain = tl.zeros([CHANNELS], tl.float32)
    of_offset = tl.zeros([CHANNELS], tl.float32)
    begin = part % spans * span
    for start in range(begin, tl.minimum(begin + span, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        v = tl.load(x + in_row(row, channel, p, x_row, x_channel, x_pixel), mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + in_row(row, channel, p, dy_row, dy_channel, dy_pixel), mask=inside, other=0.0).to(tl.float32)
        normal, dz = _silu_backward(v, d, m, r, gain, offset)
        of_gain += tl.sum(dz * normal, axis=1)
        of_offset += tl.sum(dz, axis=1)
    at = (row * spans + part % spans) * groups * channels + channel
    tl.store(dgain + at, of_gain, mask=c < channels)
    tl.store(doffset + at, of_offset, mask=c < channels)
    tl.store(part_along + program, tl.sum(of_gain * gain))
    tl.store(part_level + program, tl.sum(of_offset * gain))


@triton.jit(do_not_specialize=COUNTS)
def apply_backward(
    dy, x, dx, weight, bias, scale, shift, mean, rstd, part_along, part_level,
    dy_row, dy_channel, dy_pixel, x_row, x_channel, x_pixel, dx_row, dx_channel, dx_pixel,
    scale_step, shift_step, groups, channels, pixels, parts, spans, span,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dx, with the sums of the parts."""
    program = tl.program_id(0)
    part = program % parts
    group = program // parts
    row = group // groups
    i = tl.arange(0, PARTS)
    along = tl.sum(tl.load(part_along + group * parts + i, mask=i < parts, other=0.0)) / (channels * pixels)
    level = tl.sum(tl.load(part_level + group * parts + i, mask=i < parts, other=0.0)) / (channels * pixels)
    c = part // spans * CHANNELS + tl.arange(0, CHANNELS)
    channel = group % groups * channels + c
    m = tl.load(mean + group)
    r = tl.load(rstd + group)
    gain, offset = _gain_and_offset(weight, bias, scale, shift, scale_step, shift_step, row, channel, c < channels)
    begin = part % spans * span
    for start in range(begin, tl.minimum(begin + span, pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        v = tl.load(x + in_row(row, channel, p, x_row, x_channel, x_pixel), mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + in_row(row, channel, p, dy_row, dy_channel, dy_pixel), mask=inside, other=0.0).to(tl.float32)
        normal, dz = _silu_backward(v, d, m, r, gain, offset)
        out = r * (dz * gain[:, None] - level - normal * along)
        tl.store(dx + in_row(row, channel, p, dx_row, dx_channel, dx_pixel), out.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def parameters(
    dgain, doffset, weight, bias, scale, dweight, dbias, dmodulation, scale_step, rows, spans, channels,
    ROWS: tl.constexpr, SPANS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """From d gain and d offset, rows × spans × C: dweight and dbias, sums over all rows, and a row's own dscale and dshift.

    Without a scale these are the sums over rows and spans alone, which ``channel`` has a use for too.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    of_weight = tl.zeros([CHANNELS], tl.float32)
    of_bias = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        of_gain = tl.zeros([ROWS, CHANNELS], tl.float32)
        of_offset = tl.zeros([ROWS, CHANNELS], tl.float32)
        for begin in range(0, spans, SPANS):
            span = begin + tl.arange(0, SPANS)
            at = (row[:, None, None] * spans + span[None, :, None]) * channels + c[None, None, :]
            known = inside[:, None, :] & (span < spans)[None, :, None]
            of_gain += tl.sum(tl.load(dgain + at, mask=known, other=0.0), axis=1)
            of_offset += tl.sum(tl.load(doffset + at, mask=known, other=0.0), axis=1)
        if scale is not None:
            w = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
            b = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
            of_scale = of_gain * w + of_offset * b
            at = row[:, None] * 2 * channels + c[None, :]
            tl.store(dmodulation + at, of_scale.to(dmodulation.dtype.element_ty), mask=inside)
            tl.store(dmodulation + channels + at, of_offset.to(dmodulation.dtype.element_ty), mask=inside)
            factor = tl.load(scale + row[:, None] * scale_step + c[None, :], mask=inside, other=0.0).to(tl.float32) + 1.0
            of_gain *= factor
            of_offset *= factor
        of_weight += tl.sum(of_gain, axis=0)
        of_bias += tl.sum(of_offset, axis=0)
    tl.store(dweight + c, of_weight.to(dweight.dtype.element_ty), mask=c < channels)
    tl.store(dbias + c, of_bias.to(dbias.dtype.element_ty), mask=c < channels)
