"""Convolutions of many channels on small maps, on a CPU: the deepest levels of a chunk of patches.

At each call oneDNN copies the weights into an order of its own. The C library maps a copy of more than 32 MiB afresh every
time, page by page, which takes longer than convolving the small maps of a chunk; a smaller copy lies where the one before lay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Convolution(nn.Conv2d):
    """nn.Conv2d; on a CPU, without gradients, weights above 32 MiB are applied in pieces of the output's channels."""

    LARGEST_COPY = 2**25

    def forward(self, x: Tensor) -> Tensor:
        pieces = -(-self.weight.numel() * self.weight.element_size() // self.LARGEST_COPY)
        few_pixels = self.out_channels * x[:, 0].numel() <= self.weight.numel()  # the pieces and the whole exist together
        if pieces == 1 or not few_pixels or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        biases = self.bias.chunk(pieces) if self.bias is not None else [None] * pieces
        weights = self.weight.chunk(pieces)
        return torch.cat([self._conv_forward(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=1)
