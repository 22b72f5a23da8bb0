"""The fused operators of the network, for a GPU: each reads its map once and writes its result once.

What ``lean`` and ``attention`` compute with several kernels of torch is here one custom operator (namespace ``pbbench``), made
of one to three Triton kernels, so that a step is not spent on launching. Statistics and sums are float32, whatever the map is,
and no float32 copy of a map is made. Sums have a fixed order (no atomics): results repeat to the bit.

A map is R C h w in float32, bfloat16 or float16, contiguous or channels_last, or a slice of such a map along its channels; it
is read as it lies, and the result lies as its input does. Operators have no gradient of their own: the autograd.Functions of
``lean`` call forward and backward. Their fake versions serve predictions, tracing and counts of operators, which need
no Triton; ``usable`` says when the real ones run.
"""

from pbbench.model.kernels.channel import channel_norm, channel_norm_, channel_norm_backward
from pbbench.model.kernels.choice import everywhere, nowhere, usable
from pbbench.model.kernels.norm import norm_silu, norm_silu_again, norm_silu_backward
from pbbench.model.kernels.softmax import (
    softmax_heads,
    softmax_heads_,
    softmax_heads_backward,
    softmax_pixels,
    softmax_pixels_,
    softmax_pixels_backward,
)

__all__ = [
    "channel_norm",
    "channel_norm_",
    "channel_norm_backward",
    "everywhere",
    "norm_silu",
    "norm_silu_again",
    "norm_silu_backward",
    "nowhere",
    "softmax_heads",
    "softmax_heads_",
    "softmax_heads_backward",
    "softmax_pixels",
    "softmax_pixels_",
    "softmax_pixels_backward",
    "usable",
]
