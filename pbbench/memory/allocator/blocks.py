"""Blocks and pools of the replayed caching allocator: who lies beside whom, and which free block fits best.

A segment is a chain of blocks without gaps. The block at the segment's start keeps its identity: a split makes a new block
of the upper part, and a merge goes into the lower one. In an expandable segment (a range of addresses far larger than the
memory behind it) the parts without memory behind them are blocks too, not ``mapped``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator


class Block:
    """A range of addresses in one segment, which starts at ``base``. ``free``: in no one's use, not even another stream's."""

    __slots__ = ("address", "allocated", "base", "expandable", "free", "mapped", "next", "pool", "prev", "requested", "size")

    def __init__(self, pool: Pool, base: int, address: int, size: int, *, expandable: bool, mapped: bool = True) -> None:
        self.pool = pool
        self.base = base
        self.address = address
        self.size = size
        self.expandable = expandable
        self.mapped = mapped
        self.free = True
        self.allocated = False
        self.requested = 0
        self.prev: Block | None = None
        self.next: Block | None = None

    def split(self, size: int) -> Block:
        """Keep the first ``size`` bytes; the remainder is a new free block after this one."""
        rest = Block(
            self.pool, self.base, self.address + size, self.size - size, expandable=self.expandable, mapped=self.mapped
        )
        rest.prev, rest.next = self, self.next
        if rest.next is not None:
            rest.next.prev = rest
        self.next = rest
        self.size = size
        return rest

    def absorb_next(self) -> None:
        assert self.next is not None
        self.size += self.next.size
        self.next = self.next.next
        if self.next is not None:
            self.next.prev = self

    def chain(self) -> Iterator[Block]:
        """This block and all that follow in its segment."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.next

    def is_split(self) -> bool:
        """Whether its segment has other blocks, too."""
        return self.prev is not None or self.next is not None


class Pool:
    """The free blocks of one stream, of its small or of its large requests."""

    def __init__(self, stream: int, *, small: bool) -> None:
        self.stream = stream
        self.small = small
        self.by_size: list[tuple[int, int]] = []  # (size, address) of free mapped blocks: the order of best fit
        self.unmapped: list[int] = []  # addresses of blocks without memory behind them
        self._at: dict[int, Block] = {}

    def at(self, address: int) -> Block:
        return self._at[address]

    def blocks(self) -> list[Block]:
        """The free mapped blocks, smallest first."""
        return [self._at[address] for _, address in self.by_size]

    def position(self, size: int) -> int:
        """Where in ``by_size`` the blocks of at least ``size`` begin."""
        return bisect_left(self.by_size, (size, 0))

    def put(self, block: Block) -> None:
        self._at[block.address] = block
        if block.mapped:
            insort(self.by_size, (block.size, block.address))
        else:
            insort(self.unmapped, block.address)

    def take(self, block: Block) -> None:
        del self._at[block.address]
        if block.mapped:
            del self.by_size[bisect_left(self.by_size, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, block.address)]

    def settle(self, block: Block) -> Block:
        """Put a block that has become free (or unmapped), merged with its free neighbours of the same kind; the whole."""
        before = block.prev
        if before is not None and before.free and before.mapped == block.mapped:
            self.take(before)
            before.absorb_next()
            block = before
        after = block.next
        if after is not None and after.free and after.mapped == block.mapped:
            self.take(after)
            block.absorb_next()
        self.put(block)
        return block
