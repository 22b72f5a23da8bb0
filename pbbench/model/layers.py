"""The parts of the U-Net, each a few lines.

Shapes: R rows (patches in the pass), C channels, h × w pixels of the current level, E = 4·dim the embedding's width.
Sources: Ho et al. 2020 (residual blocks), Nichol and Dhariwal 2021 (scale and shift), Shen et al. 2021 (linear attention),
put together as in the code released with Arakawa et al. 2023, whose trained weights must load (``reference.py``).
Under autocast maps have the lower precision, statistics float32. How they do with little memory: ``lean`` and ``attention``.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from pbbench.model.attention import HEAD_WIDTH, HEADS, linear_attention, softmax_attention
from pbbench.model.lean import Convolution, channel_norm, norm_silu, recomputed, recomputing


class ChannelLayerNorm(nn.Module):
    """At each pixel: (x − mean) / sqrt(var + 1e-5) · scale + shift over the channels, with the biased variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor, *, overwrite: bool = False, residual: Tensor | None = None) -> Tensor:
        return channel_norm(x, self.scale, self.shift, overwrite=overwrite, residual=residual)


class Block(nn.Module):
    """The parameters of: 3×3 convolution, group normalisation, optionally x·(scale + 1) + shift, SiLU."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.conv = Convolution(in_channels, out_channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, out_channels, eps=1e-5)

    def activate(self, x: Tensor, modulation: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Everything after the convolution, plus ``residual``."""
        norm = self.norm
        return norm_silu(x, norm.weight, norm.bias, modulation, norm.num_groups, norm.eps, residual)


class ResidualBlock(nn.Module):
    """Two blocks and a shortcut; the embedding scales and shifts the first (no embedding where its width is None)."""

    recompute = False  # True: the second convolution's input is made again in backward instead of kept

    def __init__(self, in_channels: int, out_channels: int, groups: int, embedding_width: int | None) -> None:
        super().__init__()
        self.modulation = None if embedding_width is None else nn.Linear(embedding_width, 2 * out_channels)
        self.block1 = Block(in_channels, out_channels, groups)
        self.block2 = Block(out_channels, out_channels, groups)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x: R C h w; embedding: R E, after its SiLU. Without gradients never more than three maps are alive."""
        modulation = None if self.modulation is None or embedding is None else self.modulation(embedding)  # R 2C
        y = self.block1.activate(self.block1.conv(x), modulation)
        with recomputed(y) if self.recompute else nullcontext():
            y = self.block2.conv(y)
        if isinstance(self.shortcut, nn.Identity):
            return self.block2.activate(y, residual=x)
        y = self.block2.activate(y)
        return y.add_(self.shortcut(x))  # in place: nothing keeps y. The shortcut is not made beside the norm's input


class SelfAttention(nn.Module):
    """x + attention over the pixels of the normalised x, 4 heads of 32; q, k and v come from one 1×1 convolution."""

    recompute = False  # True: all of it is computed again in backward, and only x is kept

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_WIDTH, 1, bias=False)
        self.out = nn.Conv2d(HEADS * HEAD_WIDTH, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return recomputing(self.attend, x) if self.recompute else self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        """x + ordinary softmax attention."""
        return self.out(softmax_attention(self.qkv(self.norm(x)))).add_(x)


class LinearAttention(SelfAttention):
    """The same at linear cost: pixels read a 32 × 32 summary of the image per head (``attention``); then normalised again."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.out_norm = ChannelLayerNorm(channels)

    def attend(self, x: Tensor) -> Tensor:
        return self.out_norm(linear_attention([self.norm(x)], self.qkv, self.out), overwrite=True, residual=x)
