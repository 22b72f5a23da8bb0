"""When and where: what a patch is told besides its pixels and the global content, as one vector.

Shapes: R rows (patches in the pass). Source: the released code of Arakawa et al. 2023, whose trained weights must load.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pbbench.model.lean import wide


def sinusoidal(t: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Timesteps (R) as sines then cosines of frequencies exp(−ln(10000)·i / (width/2 − 1)): R × width, in ``dtype``."""
    half = width // 2
    # The frequencies in float32, as released, whatever the dtype: rounded differently, one moves its angle by t times that.
    frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10_000) / (half - 1)))
    angles = t[:, None] * frequencies.to(dtype)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class Embedding(nn.Module):
    """When and where: timestep and patch position to one vector of width 4·dim.

    A sum of a part that knows the time and one that knows the position: a step needs N of one and d² of the other, not N·d².
    """

    def __init__(self, dim: int, num_patches: int | None) -> None:
        """num_patches: None where the position is not told."""
        super().__init__()
        self.dim = dim
        self.time = nn.Linear(dim, dim)
        self.position = nn.Linear(num_patches, dim) if num_patches else None
        self.join = nn.Linear(2 * dim if num_patches else dim, 4 * dim)

    def when(self, t: Tensor) -> Tensor:
        """Of timesteps (int64, any number R): R × 4·dim."""
        dtype = self.time.weight.dtype
        waves = sinusoidal(t, self.dim, wide(dtype)).to(dtype)
        return F.linear(F.gelu(self.time(waves)), self.join.weight[:, : self.dim], self.join.bias)

    def where(self, position: Tensor) -> Tensor:
        """Of one-hot patch indices R × num_patches: R × 4·dim."""
        if self.position is None:
            return position.new_zeros(len(position), self.join.out_features)
        return F.linear(F.gelu(self.position(position)), self.join.weight[:, self.dim :])

    def forward(self, t: Tensor, position: Tensor) -> Tensor:
        return self.when(t) + self.where(position)  # R × 4·dim
