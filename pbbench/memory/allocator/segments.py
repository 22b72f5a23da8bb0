"""The memory that the replayed caching allocator holds from the driver: segments taken, extended and given back.

Segments come in two kinds. A plain one is taken whole and given back whole. An expandable one is a range of addresses that
does not end, in whose pages memory is put where it is needed, and taken away again once they are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pbbench.memory.allocator.blocks import Block, Pool
from pbbench.memory.allocator.layout import Segment, mapped_ranges
from pbbench.memory.allocator.settings import AllocatorSettings

ADDRESS_RANGE = 2**50
"""Of an expandable segment. torch takes 9/8 of the device's memory; what counts is that it does not run out."""


class Memory:
    """Pools of free blocks and the segments they lie in. ``reserved_bytes`` never exceeds ``capacity_bytes`` (None: any)."""

    def __init__(self, settings: AllocatorSettings, capacity_bytes: int | None) -> None:
        self.settings = settings
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.num_alloc_retries = 0  # how often a request was tried again after the whole cache had been given back
        self.pools: dict[tuple[int, bool], Pool] = {}
        self._heads: dict[int, Block] = {}  # the first block of every segment, by its address
        self._next_address = ADDRESS_RANGE

    def empty_cache(self) -> None:
        """Give all segments without an active block back, and of expandable ones all pages without."""
        for pool in list(self.pools.values()):
            for block in pool.blocks():
                if block.expandable:
                    self._unmap(block)
                elif not block.is_split():
                    self._release(block)

    def give_back(self, address: int, size: int) -> bool:
        """Give back what a recording says was given back there; False where that is not free here."""
        for pool in self.pools.values():
            for block in pool.blocks():
                if block.address <= address and address + size <= block.address + block.size:
                    if block.expandable:
                        return self._unmap(block) == size
                    if block.is_split() or block.size != size:
                        return False
                    self._release(block)
                    return True
        return False

    def segments(self) -> list[Segment]:
        """What is reserved, by address; of an expandable segment each range with memory behind it, as in torch's snapshots."""
        return list(mapped_ranges(head for _, head in sorted(self._heads.items())))

    def take_over(self, segments: Iterable[Segment]) -> Iterator[Block]:
        """Start from these segments instead of from nothing; their active blocks.

        Ranges of one stream and size class of expandable segments are taken for parts of one that begins at the first.
        """
        assert not self._heads, "only an allocator that has done nothing can start from segments"
        for segment in sorted(segments, key=lambda each: each.address):
            yield from self._take_over(segment)
            self._next_address = max(self._next_address, segment.address + 2 * ADDRESS_RANGE)

    def _take_over(self, segment: Segment) -> Iterator[Block]:
        pool = self.pool(segment.stream, small=segment.small)
        if segment.expandable:
            if pool.unmapped:
                block = pool.at(pool.unmapped[-1])
            else:
                block = self._segment(pool, segment.address, ADDRESS_RANGE, expandable=True)
            if block.address < segment.address:  # a hole: its memory has been given back
                block = block.split(segment.address - block.address)
            else:
                pool.take(block)
            pool.put(block.split(segment.size))
            block.mapped = True
        else:
            block = self._segment(pool, segment.address, segment.size)
        self.reserved_bytes += segment.size
        for part in segment.blocks:
            rest = block.split(part.size) if part.size < block.size else None
            if part.active:
                block.free, block.allocated, block.requested = False, part.allocated, part.requested
                yield block
            else:
                pool.put(block)
            if rest is not None:
                block = rest

    def pool(self, stream: int, *, small: bool) -> Pool:
        pool = self.pools.get((stream, small))
        if pool is None:
            pool = self.pools[stream, small] = Pool(stream, small=small)
        return pool

    def best_fit(self, pool: Pool, size: int) -> Block | None:
        """The smallest free block that is large enough, the lowest address among equals; taken out of the pool."""
        position = pool.position(size)
        if position == len(pool.by_size):
            return None
        block = pool.at(pool.by_size[position][1])
        if block.expandable:  # one that can grow counts with what it can grow to, so that blocks further up are used first
            while position + 1 < len(pool.by_size):
                other = pool.at(pool.by_size[position + 1][1])
                if _size_when_grown(other) >= _size_when_grown(block):
                    break
                block, position = other, position + 1
        limit = self.settings.max_split_bytes
        if limit is not None:
            if size < limit <= block.size:
                return None
            if size >= limit and block.size >= size + self.settings.max_non_split_rounding_bytes:
                return None
        pool.take(block)
        return block

    def new_block(self, pool: Pool, size: int, segment_address: int | None) -> Block | None:
        """A block on new memory; where there is too little, after oversize blocks or the whole cache were given back."""
        block = self._grow(pool, size, segment_address)
        if block is None and self._release_oversize(pool, size):
            block = self._grow(pool, size, segment_address)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = self._grow(pool, size, segment_address)
        return block

    def _grow(self, pool: Pool, size: int, segment_address: int | None) -> Block | None:
        if self.settings.expandable_segments:
            return self._extend(pool, size, segment_address)
        nbytes = self.settings.segment_bytes(size)
        return self._segment(pool, segment_address, nbytes) if self._reserve(nbytes) else None

    def _extend(self, pool: Pool, size: int, segment_address: int | None) -> Block | None:
        """Put memory behind the lowest addresses where the request can lie, free blocks in between included."""
        block = _room(pool, size) or self._segment(pool, segment_address, ADDRESS_RANGE, expandable=True)
        while not block.mapped or block.size < size:
            have, rest = (block.size, block.next) if block.mapped else (0, block)
            assert rest is not None
            assert not rest.mapped
            mapped = self._map(rest, min(size - have, rest.size))
            if mapped is None:
                return None  # what was mapped so far stays in the pool
            block = mapped
        pool.take(block)
        return block

    def _map(self, block: Block, size: int) -> Block | None:
        """Put whole pages of memory behind the first ``size`` bytes of an unmapped block; the free block they are now in."""
        page = self._page(block)
        nbytes = -(-size // page) * page
        if not self._reserve(nbytes):
            return None
        block.pool.take(block)
        if nbytes < block.size:
            block.pool.put(block.split(nbytes))
        block.mapped = True
        return block.pool.settle(block)

    def _unmap(self, block: Block) -> int:
        """Take the memory from behind the whole pages inside a free block; the bytes given back."""
        page = self._page(block)
        begin = block.base + -(-(block.address - block.base) // page) * page
        end = block.base + (block.address + block.size - block.base) // page * page
        if begin >= end:
            return 0
        pool = block.pool
        pool.take(block)
        if begin > block.address:
            before, block = block, block.split(begin - block.address)
            pool.put(before)
        if block.address + block.size > end:
            pool.put(block.split(end - block.address))
        block.mapped = False
        block = pool.settle(block)
        if not block.is_split():
            pool.take(block)
            del self._heads[block.base]
        self.reserved_bytes -= end - begin
        return end - begin

    def _page(self, block: Block) -> int:
        return self.settings.small_segment_bytes if block.pool.small else self.settings.large_segment_bytes

    def _release(self, block: Block) -> None:
        block.pool.take(block)
        del self._heads[block.base]
        self.reserved_bytes -= block.size

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Give back one cached block that is not to be split and is large enough, else several, the largest first."""
        limit = self.settings.max_split_bytes
        if limit is None:
            return False
        wanted = max(size, limit)
        position = pool.position(wanted)
        candidates = [block for block in pool.blocks()[position:][:1] if not block.expandable]
        if not candidates:
            candidates = [block for block in reversed(pool.blocks()) if block.size >= limit and not block.expandable]
        released = 0
        for block in candidates:
            if released >= wanted:
                break
            released += block.size
            self._release(block)
        return released >= wanted

    def _reserve(self, nbytes: int) -> bool:
        """Take so much from the driver; False where it has not got it."""
        if self.capacity_bytes is not None and self.reserved_bytes + nbytes > self.capacity_bytes:
            return False
        self.reserved_bytes += nbytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _segment(self, pool: Pool, address: int | None, size: int, *, expandable: bool = False) -> Block:
        """A new segment, whole in one block. An expandable one is a range of addresses without memory behind it."""
        if address is None:
            address = self._next_address
            self._next_address += size
        block = self._heads[address] = Block(pool, address, address, size, expandable=expandable, mapped=not expandable)
        if expandable:
            pool.put(block)
        return block


def _room(pool: Pool, size: int) -> Block | None:
    """The lowest block of an expandable segment from which free and unmapped blocks together are large enough."""
    for address in pool.unmapped:
        start = pool.at(address)
        if start.prev is not None and start.prev.free:
            start = start.prev
        nbytes = 0
        for block in start.chain():
            if not block.free or nbytes >= size:
                break
            nbytes += block.size
        if nbytes >= size:
            return start
    return None


def _size_when_grown(block: Block) -> int:
    after = block.next
    return block.size + (after.size if after is not None and not after.mapped else 0)
