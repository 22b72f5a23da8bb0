"""What the replayed caching allocator holds at one moment, as plain data: segments tiled by blocks, by address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from pbbench.memory.allocator.blocks import Block


class SegmentBlock(NamedTuple):
    """A part of a segment. ``active`` and not ``allocated``: freed, but another stream may still use it."""

    offset: int
    size: int
    requested: int
    allocated: bool
    active: bool


@dataclass(frozen=True)
class Segment:
    """A piece of memory from the driver, or a range of an expandable segment with memory behind it. The blocks tile it."""

    address: int
    size: int
    stream: int
    small: bool
    expandable: bool
    blocks: tuple[SegmentBlock, ...]


def mapped_ranges(heads: Iterable[Block]) -> Iterator[Segment]:
    """Of every chain of blocks, given by its first, each range with memory behind it."""
    for head in heads:
        for mapped, blocks in groupby(head.chain(), key=lambda block: block.mapped):
            if mapped:
                yield _segment(list(blocks))


def _segment(blocks: list[Block]) -> Segment:
    first, size = blocks[0], sum(block.size for block in blocks)
    tiles = tuple(
        SegmentBlock(each.address - first.address, each.size, 0 if each.free else each.requested, each.allocated, not each.free)
        for each in blocks
    )
    return Segment(first.address, size, first.pool.stream, first.pool.small, first.expandable, tiles)
