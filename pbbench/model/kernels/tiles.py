"""How a map is cut into tiles for the programs of a kernel, and how it lies in memory. Plain numbers, no Triton.

A tile is channels × pixels, both powers of two, and it is long along whichever of the two is contiguous in memory, so that a
warp reads whole sectors: pixels where the map is contiguous, channels where it is channels_last. A thread holds 32 numbers of
the map that a kernel reads, or 16 of each of two (backward), so that 65,536 registers have room for two or three programs a
multiprocessor: one computes while another waits for memory, and some 60 KB are on their way (bandwidth × latency is 20). The
sizes were chosen for Hopper by counting registers in what the compiler made; they have not been timed on one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

WHOLE = 2**14
"""Elements that one program takes at once where it must see all of a group: 64 KiB of float32, 16 warps."""
TILE = 2**13
"""Elements of a tile where one is as good as another and one map is read; half where two are."""
PARTS = 256
"""The most parts that a group is divided into; beyond, a part is several tiles long. A power of two: the programs of the second
stage load the first one's results in one go."""
SPANS = 64
"""The same for the pixels of a channel, where every channel has results of its own."""
PROGRAMS = 512
"""The most programs that each leave a sum per channel: some four for each of 132 multiprocessors."""


class Lies(NamedTuple):
    """Elements from one row, channel, pixel of a map to the next."""

    row: int
    channel: int
    pixel: int


class Tiles(NamedTuple):
    """How channels × pixels of one row are divided into parts, each of ``channels`` × ``span``, seen ``pixels`` at a time."""

    channels: int
    pixels: int
    span: int
    """Pixels of a part, a multiple of ``pixels``."""
    channel_parts: int
    spans: int

    @property
    def parts(self) -> int:
        return self.channel_parts * self.spans

    @property
    def elements(self) -> int:
        return self.channels * self.pixels


def lies(x: Tensor) -> Lies | None:
    """How the map x, R C h w, lies; None where its pixels are not evenly spaced."""
    h, w = x.shape[2:]
    row, channel, line, pixel = x.stride()
    if h * w == 1:
        return Lies(row, channel, x.shape[1])
    if w == 1:
        return Lies(row, channel, line)
    return Lies(row, channel, pixel) if h == 1 or line == w * pixel else None


def evenly_spaced(x: Tensor) -> tuple[Tensor, Lies]:
    """The map and how it lies: of a copy where its pixels are not evenly spaced, as those of all maps of the network are."""
    found = lies(x)
    if found is None:
        x = x.contiguous()
        found = lies(x)
        assert found is not None
    return x, found


def result(x: Tensor) -> Tensor:
    """A new map that lies as x does, or contiguous where that is not evenly spaced."""
    y = torch.empty_like(x)
    return y if lies(y) is not None else x.new_empty(x.shape)


def power_of_two(n: int) -> int:
    """The least one that is no less than n ≥ 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def whole_or_parts(channels: int, pixels: int, along_channels: bool, maps: int) -> Tiles:
    """Channels × pixels that belong together (a group): one part where they fit a program, else parts of a tile or more.

    maps: how many maps are read.
    """
    c, p = power_of_two(channels), power_of_two(pixels)
    if c * p <= WHOLE:
        return Tiles(c, p, p, 1, 1)
    tile = TILE // maps
    wanted = max(128, tile // p) if along_channels else tile // min(p, 1024)
    c = min(c, max(1, wanted, power_of_two(ceil_div(channels, PARTS))))
    return _parts(channels, pixels, c, min(p, max(1, tile // c)), max(1, PARTS // ceil_div(channels, c)))


def lines_or_parts(channels: int, pixels: int, along_channels: bool, maps: int) -> Tiles:
    """Channels × pixels of which the pixels of a channel belong together: all pixels a part where they fit a program.

    In channels_last a part is at least 16 channels wide, a sector of 32 bytes in 16 bits.
    """
    c, p = power_of_two(channels), power_of_two(pixels)
    least = min(c, 16) if along_channels else 1
    if least * p <= WHOLE:
        c = min(c, max(least, TILE // 2 // maps // p))
        return Tiles(c, p, p, ceil_div(channels, c), 1)
    c = min(c, 32) if along_channels else 1
    return _parts(channels, pixels, c, max(1, TILE // maps // c), SPANS)


def _parts(channels: int, pixels: int, c: int, p: int, most_spans: int) -> Tiles:
    tiles = ceil_div(pixels, p)
    span = ceil_div(tiles, min(tiles, most_spans)) * p
    return Tiles(c, p, span, ceil_div(channels, c), ceil_div(pixels, span))


def launch(kernel: Any, programs: int, x: Tensor, *args: Any, elements: int, **constants: int) -> None:
    """Run so many programs of a Triton kernel on the device of x. elements: of the tiles that one holds, of all maps.

    32 of them a thread; at most 16 warps of 32 threads, which may use 128 registers each.
    """
    if programs:
        with torch.cuda.device_of(x):
            kernel[(programs,)](*args, **constants, num_warps=min(16, max(1, elements // 1024)))
