"""The parts of the U-Net, each a few lines.

Shapes: R rows (patches in the pass), C channels, h × w pixels of the current level, E = 4·dim the embedding's width.
Sources: Ho et al. 2020 (residual blocks), Nichol and Dhariwal 2021 (scale and shift), Shen et al. 2021 (linear attention),
put together as in the code released with Arakawa et al. 2023, whose trained weights must load (``reference.py``).
Under autocast the convolutions and products run in the lower precision, the statistics of a normalisation in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4
HEAD_WIDTH = 32


class ChannelLayerNorm(nn.Module):
    """At each pixel: (x − mean) / sqrt(var + 1e-5) · scale + shift over the channels, with the biased variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x.float(), dim=1, keepdim=True, correction=0)  # R 1 h w
        return torch.addcmul(self.shift, (x - mean) * torch.rsqrt(variance + 1e-5), self.scale)


class Block(nn.Module):
    """3×3 convolution, group normalisation, optionally x·(scale + 1) + shift, SiLU."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, out_channels, eps=1e-5)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.norm(self.conv(x))
        if scale_shift is not None:
            scale, shift = scale_shift  # R C 1 1 each
            x = torch.addcmul(shift, x, scale + 1)
        return F.silu(x)


class ResidualBlock(nn.Module):
    """Two blocks and a shortcut; the embedding scales and shifts the first (no embedding where its width is None)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, embedding_width: int | None) -> None:
        super().__init__()
        self.modulation = None if embedding_width is None else nn.Linear(embedding_width, 2 * out_channels)
        self.block1 = Block(in_channels, out_channels, groups)
        self.block2 = Block(out_channels, out_channels, groups)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        scale_shift = None
        if self.modulation is not None and embedding is not None:
            scale, shift = self.modulation(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
            scale_shift = scale, shift
        return self.block2(self.block1(x, scale_shift)) + self.shortcut(x)


class LinearAttention(nn.Module):
    """x + attention of linear cost: every pixel reads a 32 × 32 summary of the image per head (Shen et al. 2021)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_WIDTH, 1, bias=False)
        self.out = nn.Conv2d(HEADS * HEAD_WIDTH, channels, 1)
        self.out_norm = ChannelLayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        R, _, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(R, 3, HEADS, HEAD_WIDTH, h * w).unbind(1)
        context = k.softmax(dim=-1) @ v.mT  # R heads 32 32: sum over pixels
        context = context * HEAD_WIDTH**-0.5  # the scale of q, applied where it costs nothing
        read = context.mT @ q.softmax(dim=-2)  # R heads 32 h·w
        del q, k, v  # under no_grad this frees q, k and v before the output is made
        return x + self.out_norm(self.out(read.view(R, HEADS * HEAD_WIDTH, h, w)))


class Attention(nn.Module):
    """x + ordinary softmax attention over the pixels, 4 heads of 32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_WIDTH, 1, bias=False)
        self.out = nn.Conv2d(HEADS * HEAD_WIDTH, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        R, _, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(R, 3, HEADS, HEAD_WIDTH, h * w)
        # The fused kernels need the last dimension (32) contiguous; one copy for all three.
        q, k, v = qkv.transpose(-2, -1).contiguous().unbind(1)  # R heads h·w 32
        read = F.scaled_dot_product_attention(q, k, v)  # scale 32^−0.5 is its default
        return x + self.out(read.transpose(-2, -1).reshape(R, HEADS * HEAD_WIDTH, h, w))


def sinusoidal(t: Tensor, width: int) -> Tensor:
    """Timesteps (R) as sines then cosines of frequencies exp(−ln(10000)·i / (width/2 − 1)): R × width, float32."""
    half = width // 2
    # In float32, as released: rounding a frequency differently moves its angle by up to t times that.
    frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10_000) / (half - 1)))
    angles = t[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class Embedding(nn.Module):
    """When and where: timestep and patch position to one vector of width 4·dim."""

    def __init__(self, dim: int, num_patches: int) -> None:
        super().__init__()
        self.dim = dim
        self.time = nn.Linear(dim, dim)
        self.position = nn.Linear(num_patches, dim)
        self.join = nn.Linear(2 * dim, 4 * dim)

    def forward(self, t: Tensor, position: Tensor) -> Tensor:
        time = F.gelu(self.time(sinusoidal(t, self.dim)))
        return self.join(torch.cat((time, F.gelu(self.position(position))), dim=1))  # R × 4·dim
