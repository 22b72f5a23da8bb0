"""What the kernels share: where the elements of a tile lie from their map's beginning, and what is not compiled for.

Rows may lie more than 2^31 elements apart; one spans fewer.
"""

import triton
import triton.language as tl

COUNTS = ["groups", "parts", "spans", "channel_parts", "rows", "heads", "tiles", "scale_step", "shift_step"]
"""Arguments of which Triton need not know whether they are 1 or multiples of 16: each answer would be a version to compile."""


@triton.jit
def in_row(row, channel, pixel, row_step, channel_step, pixel_step):
    """Channels × pixels of one row."""
    return row.to(tl.int64) * row_step + (channel[:, None] * channel_step + pixel[None, :] * pixel_step)


@triton.jit
def in_rows(pixel, pixels, channel, row_step, channel_step, pixel_step):
    """Channels × pixels that are counted through all rows, of ``pixels`` each: maps of one pixel fill a tile too."""
    start = (pixel // pixels).to(tl.int64) * row_step + pixel % pixels * pixel_step
    return start[None, :] + (channel * channel_step)[:, None]
