"""The replayed caching allocator: every rule on bytes worked out by hand, then invariants on random programs.

Sizes: K and M are KiB and MiB. A small segment is 2 M, a large one 20 M or, from 10 M on, the request rounded up to 2 M.
"""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbbench.errors import InputError
from pbbench.memory.allocator.caching import AllocatorOutOfMemory, CachingAllocator, replay
from pbbench.memory.allocator.settings import AllocatorSettings

K = 2**10
M = 2**20
EXPANDABLE = AllocatorSettings.parse("expandable_segments:True")
OVERSIZE = AllocatorSettings.parse("max_split_size_mb:32")


def sizes(allocator):
    """Per segment its blocks' sizes, those in use negative."""
    return [[-b.size if b.active else b.size for b in segment.blocks] for segment in allocator.segments()]


# --- settings -------------------------------------------------------------------------------------------------------------


def test_settings_are_parsed_as_torch_does():
    parsed = AllocatorSettings.parse(
        " expandable_segments:True, large_segment_size_mb:32,max_split_size_mb:64,", "2.15.0+cu130"
    )
    assert parsed == AllocatorSettings(expandable_segments=True, large_segment_bytes=32 * M, max_split_bytes=64 * M)
    assert AllocatorSettings.parse("max_non_split_rounding_mb:40").max_non_split_rounding_bytes == 40 * M
    assert AllocatorSettings.parse("backend:native,pinned_use_background_threads:True") == AllocatorSettings()
    assert AllocatorSettings.parse("", "2.11.0") == AllocatorSettings()


@pytest.mark.parametrize(
    ("text", "version", "says"),
    [
        (
            "roundup_power2_divisions:[256:1,512:2,>:4],expandable_segments:True",
            None,
            "roundup_power2_divisions:[256:1,512:2,>:4]",
        ),
        ("garbage_collection_threshold:0.8,max_split_size_mb:64", None, "garbage_collection_threshold:0.8"),
        ("backend:cudaMallocAsync", None, "backend:cudaMallocAsync"),
        ("per_process_memory_fraction:0.5,no_such:1", None, "per_process_memory_fraction:0.5, no_such:1"),
        ("large_segment_size_mb:32", "2.11.0", "large_segment_size_mb:32"),
        ("large_segment_size_mb:10", None, "at least 11"),
        ("max_split_size_mb:19", None, "at least 20"),
        ("large_segment_size_mb:64,max_split_size_mb:32", None, "at least 64"),
        ("expandable_segments:true", None, "True or False"),
        ("max_split_size_mb", None, "key:value"),
        ("roundup_power2_divisions:[256:1", None, "key:value"),
        ("max_split_size_mb:", None, "key:value"),
        ("", "2.9.1", "torch 2.9.1"),
        ("", "newest", "not a version"),
    ],
)
def test_settings_that_are_not_modelled_or_wrong_are_refused_by_name(text, version, says):
    with pytest.raises(InputError) as caught:
        AllocatorSettings.parse(text, version)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- sizes and pools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (1, 512, 2 * M),
        (512, 512, 2 * M),
        (513, 1024, 2 * M),
        (1 * M, 1 * M, 2 * M),  # the largest small request
        (1 * M + 1, 1 * M + 512, 20 * M),  # the smallest large one
        (10 * M - 512, 10 * M - 512, 20 * M),
        (10 * M - 1, 10 * M, 10 * M),  # rounding comes first: 10 M has a segment of its own
        (10 * M + 1, 10 * M + 512, 12 * M),  # 2 M less 512 remain, more than 1 M: they are split off
        (11 * M + 512 * K, 12 * M, 12 * M),  # 512 K remain, not more than 1 M: they are not, and so count as allocated
    ],
)
def test_a_fresh_request(requested, allocated, reserved):
    allocator = CachingAllocator()
    allocator.allocate(requested)
    assert (allocator.requested_bytes, allocator.allocated_bytes, allocator.reserved_bytes) == (requested, allocated, reserved)


def test_small_requests_share_segments_and_large_ones_do_not_use_them():
    allocator = CachingAllocator()
    for _ in range(3):
        allocator.allocate(900 * K)  # two in one segment of 2 M (2048 K − 1800 K = 248 K remain), one in the next
    assert sizes(allocator) == [[-900 * K, -900 * K, 248 * K], [-900 * K, 1148 * K]]
    allocator.allocate(1100 * K)  # fits the 1148 K, but large requests have a pool of their own
    assert allocator.reserved_bytes == 4 * M + 20 * M


def test_each_stream_has_its_own_free_blocks():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(5 * M, stream=0))
    allocator.allocate(5 * M, stream=7)
    assert allocator.reserved_bytes == 40 * M
    assert [segment.stream for segment in allocator.segments()] == [0, 7]


# --- fit, split and merge -------------------------------------------------------------------------------------------------


def test_the_best_fit_is_the_smallest_block_and_among_equals_the_lowest():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size) for size in (40 * M, 30 * M, 30 * M, 50 * M)]
    for block in reversed(blocks):
        allocator.free(block)
    assert [allocator.allocate(29 * M) for _ in range(2)] == blocks[1:3]  # 1 M remains of each: not split
    assert allocator.allocated_bytes == 60 * M
    assert allocator.allocate(29 * M) == blocks[0]  # 11 M remain of 40 M: split
    assert sizes(allocator) == [[-29 * M, 11 * M], [-30 * M], [-30 * M], [50 * M]]


@pytest.mark.parametrize(
    ("request_bytes", "blocks"),
    [
        (19 * M, [[-20 * M]]),  # exactly 1 M remains: not split
        (19 * M - 512, [[-(19 * M - 512), 1 * M + 512]]),
    ],
)
def test_large_blocks_are_split_when_more_than_1_mib_remains(request_bytes, blocks):
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(20 * M))
    allocator.allocate(request_bytes)
    assert sizes(allocator) == blocks


def test_small_blocks_are_split_when_512_bytes_remain():
    allocator = CachingAllocator()
    allocator.allocate(1 * M)
    allocator.allocate(1 * M - 512)
    assert sizes(allocator) == [[-1 * M, -(1 * M - 512), 512]]


def test_neighbours_merge_on_both_sides_but_not_across_segments():
    allocator = CachingAllocator()
    first, middle, last = (allocator.allocate(6 * M) for _ in range(3))  # 2 M of the 20 M remain
    other = allocator.allocate(20 * M)
    allocator.free(first)
    allocator.free(last)
    assert sizes(allocator) == [[6 * M, -6 * M, 8 * M], [-20 * M]]
    assert allocator.inactive_split_bytes == 14 * M
    allocator.free(middle)
    allocator.free(other)
    assert sizes(allocator) == [[20 * M], [20 * M]]
    assert allocator.inactive_split_bytes == 0
    allocator.allocate(21 * M)  # 40 M are free, and none of it will do
    assert allocator.reserved_bytes == 62 * M  # 21 M rounded up to 22 M


def test_a_freed_block_that_another_stream_uses_stays_active():
    allocator = CachingAllocator()
    block = allocator.allocate(5 * M)
    allocator.request_free(block)
    assert (allocator.allocated_bytes, allocator.active_bytes, allocator.requested_bytes) == (0, 5 * M, 5 * M)
    assert allocator.allocate(5 * M) != block
    allocator.complete_free(block)
    assert allocator.active_bytes == 5 * M
    assert allocator.allocate(5 * M) == block


def test_what_is_not_held_cannot_be_freed():
    allocator = CachingAllocator()
    block = allocator.allocate(512)
    with pytest.raises(KeyError):
        allocator.complete_free(block)
    allocator.request_free(block)
    with pytest.raises(KeyError):
        allocator.request_free(block)
    allocator.complete_free(block)
    with pytest.raises(KeyError):
        allocator.free(block)
    with pytest.raises(ValueError, match="cannot allocate 0 bytes"):
        allocator.allocate(0)


def test_the_cache_is_given_back_by_whole_segments():
    allocator = CachingAllocator()
    kept = allocator.allocate(5 * M)
    allocator.free(allocator.allocate(5 * M))  # beside it in the same 20 M
    allocator.free(allocator.allocate(30 * M))
    assert allocator.reserved_bytes == 50 * M
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * M
    allocator.free(kept)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments()) == (0, [])
    assert allocator.peak_reserved_bytes == 50 * M


# --- blocks that are not to be split (max_split_size_mb:32) ---------------------------------------------------------------


def test_a_block_of_max_split_size_does_not_serve_smaller_requests():
    allocator = CachingAllocator(OVERSIZE)
    oversize = allocator.allocate(32 * M)
    allocator.free(oversize)
    allocator.allocate(30 * M)
    assert sizes(allocator) == [[32 * M], [-30 * M]]
    assert allocator.allocate(32 * M) == oversize


def test_an_oversize_request_takes_a_whole_block_less_than_20_mib_larger():
    allocator = CachingAllocator(OVERSIZE)
    allocator.free(allocator.allocate(60 * M))
    allocator.allocate(40 * M)  # 60 M is 20 M more: too much
    assert sizes(allocator) == [[60 * M], [-40 * M]]
    allocator.allocate(42 * M)  # 18 M more: taken whole
    assert sizes(allocator) == [[-60 * M], [-40 * M]]
    assert allocator.allocated_bytes == 100 * M


def test_out_of_memory_first_gives_one_oversize_block_back():
    allocator = CachingAllocator(OVERSIZE, capacity_bytes=200 * M)
    for block in [allocator.allocate(size) for size in (40 * M, 70 * M, 80 * M)]:
        allocator.free(block)
    allocator.allocate(50 * M)  # 70 M is 20 M more, too much; 10 M left, so the smallest of at least 50 M goes
    assert sizes(allocator) == [[40 * M], [80 * M], [-50 * M]]
    assert allocator.num_alloc_retries == 0


def test_out_of_memory_gives_several_oversize_blocks_back_largest_first():
    allocator = CachingAllocator(OVERSIZE, capacity_bytes=200 * M)
    for block in [allocator.allocate(size) for size in (40 * M, 70 * M, 80 * M)]:
        allocator.free(block)
    allocator.allocate(120 * M)  # none is so large: 80 M, then 70 M make 150 M, and 40 M stays
    assert sizes(allocator) == [[40 * M], [-120 * M]]
    assert allocator.num_alloc_retries == 0


def test_out_of_memory_gives_everything_back_where_oversize_blocks_do_not_suffice():
    allocator = CachingAllocator(OVERSIZE, capacity_bytes=100 * M)
    for block in [allocator.allocate(size) for size in (24 * M, 24 * M, 40 * M)]:
        allocator.free(block)
    allocator.allocate(70 * M)  # 40 M of oversize blocks are less than 70 M
    assert sizes(allocator) == [[-70 * M]]
    assert allocator.num_alloc_retries == 1


# --- out of memory --------------------------------------------------------------------------------------------------------


def test_the_cache_is_given_back_before_a_request_fails():
    allocator = CachingAllocator(capacity_bytes=50 * M)
    kept = allocator.allocate(5 * M)
    allocator.free(allocator.allocate(30 * M))
    allocator.allocate(29 * M)  # the cached 30 M will do, whole: no retry
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (50 * M, 0)
    with pytest.raises(AllocatorOutOfMemory) as caught:
        allocator.allocate(16 * M)  # 15 M are free in the first segment
    error = caught.value
    assert (error.requested, error.free, error.allocated, error.reserved, error.retries) == (16 * M, 0, 35 * M, 50 * M, 1)
    allocator.free(kept)
    allocator.allocate(16 * M)
    assert allocator.allocated_bytes == 46 * M
    assert allocator.num_alloc_retries == 1


def test_a_retry_succeeds_once_the_cache_is_gone():
    allocator = CachingAllocator(capacity_bytes=50 * M)
    allocator.free(allocator.allocate(30 * M))
    allocator.allocate(40 * M)
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (40 * M, 1)


# --- expandable segments --------------------------------------------------------------------------------------------------


def test_an_expandable_segment_grows_by_pages_of_20_mib_and_2_mib():
    allocator = CachingAllocator(EXPANDABLE)
    allocator.allocate(15 * M)
    allocator.allocate(11 * M)  # 5 M are left of the first page, 6 M more are needed: one page
    assert sizes(allocator) == [[-15 * M, -11 * M, 14 * M]]
    allocator.allocate(1 * M + 512)
    allocator.allocate(900 * K)
    assert sizes(allocator) == [[-15 * M, -11 * M, -(1 * M + 512), 13 * M - 512], [-900 * K, 2 * M - 900 * K]]
    assert allocator.reserved_bytes == 42 * M
    allocator.allocate(1 * M)
    allocator.allocate(1 * M)  # 124 K are free after the first: 900 K more, a page of 2 M
    assert sizes(allocator)[1] == [-900 * K, -1 * M, -1 * M, 4 * M - 2 * M - 900 * K]


def test_large_requests_split_down_to_512_bytes_in_expandable_segments():
    allocator = CachingAllocator(EXPANDABLE)
    allocator.allocate(11 * M + 512 * K)  # alone in a segment it would count 12 M
    allocator.allocate(8 * M)
    assert sizes(allocator) == [[-(11 * M + 512 * K), -8 * M, 512 * K]]


def test_pages_of_large_segment_size():
    allocator = CachingAllocator(AllocatorSettings.parse("expandable_segments:True,large_segment_size_mb:32"))
    allocator.allocate(33 * M)
    assert allocator.reserved_bytes == 64 * M
    plain = CachingAllocator(AllocatorSettings.parse("large_segment_size_mb:32"))
    plain.allocate(2 * M)
    plain.allocate(10 * M)  # in the same segment
    plain.allocate(33 * M)  # segments of 10 M and more stay whole multiples of 2 M
    assert sizes(plain) == [[-2 * M, -10 * M, 20 * M], [-34 * M]]


def test_the_end_that_can_grow_is_used_last():
    allocator = CachingAllocator(EXPANDABLE)
    hole = allocator.allocate(18 * M)
    allocator.allocate(12 * M)  # 40 M mapped: 10 M at the end
    allocator.free(hole)
    # the smallest block that fits 9 M is the end's 10 M, but with what it can grow to it is the largest
    assert allocator.allocate(9 * M) == hole
    assert sizes(allocator) == [[-9 * M, 9 * M, -12 * M, 10 * M]]


def test_only_whole_free_pages_are_given_back_and_holes_are_filled_first():
    allocator = CachingAllocator(EXPANDABLE)
    blocks = [allocator.allocate(25 * M) for _ in range(4)]  # 100 M, five pages of 20 M, without rest
    assert allocator.reserved_bytes == 100 * M
    allocator.free(blocks[1])  # 25 M to 50 M: only page 2 (40 M to 60 M) begins there, no whole page is free
    allocator.empty_cache()
    assert allocator.reserved_bytes == 100 * M
    allocator.free(blocks[2])  # 25 M to 75 M: page 2 is free, 15 M on either side stay
    allocator.empty_cache()
    assert sizes(allocator) == [[-25 * M, 15 * M], [15 * M, -25 * M]]
    assert (allocator.reserved_bytes, allocator.inactive_split_bytes) == (80 * M, 0)
    assert allocator.allocate(45 * M) == blocks[1]  # 15 M free, 20 M to map, 10 of the other 15 M
    assert sizes(allocator) == [[-25 * M, -45 * M, 5 * M, -25 * M]]


def test_expandable_segments_out_of_memory():
    allocator = CachingAllocator(EXPANDABLE, capacity_bytes=50 * M)
    small = allocator.allocate(512)
    large = allocator.allocate(25 * M)  # 42 M
    with pytest.raises(AllocatorOutOfMemory) as caught:
        allocator.allocate(16 * M)  # 15 M are left, a page more is too much
    assert (caught.value.free, caught.value.reserved, caught.value.retries) == (8 * M, 42 * M, 1)
    allocator.free(large)
    allocator.free(small)
    allocator.allocate(35 * M, stream=1)  # two pages: all of stream 0's are taken away for them
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (40 * M, 2)


# --- replay ---------------------------------------------------------------------------------------------------------------


def test_replay_of_events():
    # warm-up: 50 M; then 30 M and, in 20 M, 5 M, with 50 M still reserved
    events = [("a", 50 * M), ("a", -50 * M), ("b", 30 * M), ("c", 5 * M), ("z", 0), ("z", 0), ("b", -30 * M)]
    cold = replay(events)
    assert (cold.peak_allocated_bytes, cold.peak_reserved_bytes, cold.num_segments) == (50 * M, 50 * M, 1)
    warm = replay(events, peaks_from=2)
    assert warm.peak_requested_bytes == warm.peak_allocated_bytes == warm.peak_active_bytes == 35 * M
    assert warm.peak_reserved_bytes == warm.closing_reserved_bytes == 50 * M
    assert warm.closing_requested_bytes == warm.closing_allocated_bytes == warm.closing_active_bytes == 5 * M
    assert warm.fragmentation == pytest.approx(1 - 35 / 50)
    assert warm.inactive_split_bytes == 45 * M  # 30 M freed before the 5 M, 15 M after it
    assert replay(events, peaks_from=len(events)).peak_allocated_bytes == 5 * M
    assert replay([]).fragmentation == 0.0


def test_replay_refuses_events_that_make_no_sense():
    with pytest.raises(InputError, match="event 1 frees 'b', which is not held"):
        replay([("a", 512), ("b", -512)])
    with pytest.raises(InputError, match="event 1 allocates 'a', which is held already"):
        replay([("a", 512), ("a", 512)])


def test_replay_out_of_memory():
    with pytest.raises(AllocatorOutOfMemory):
        replay([("a", 3 * M)], capacity_bytes=19 * M)


def test_replay_of_a_traced_step():
    import torch

    from pbbench.memory.tracer.live import trace

    layer = torch.nn.Linear(1024, 1024, bias=False)
    live = trace(lambda: layer(torch.ones(1024, 1024)).sum().backward(), modules=layer, record_events=True)
    replayed = replay((id(event.allocation), event.delta) for event in live.events)
    assert replayed.peak_requested_bytes == live.peak_bytes
    assert replayed.peak_reserved_bytes >= live.peak_bytes


def test_a_hundred_thousand_events_take_no_time():
    events = []
    for number in range(50_000):
        events.append((number, 1 + number * 7919 % (20 * M)))
        if number >= 300:
            events.append((number - 300, -1))
    start = time.process_time()
    replay(events)
    assert time.process_time() - start < 5  # about 0.4 s on one core of a small machine


# --- invariants on random programs ----------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 3 * M),
    st.integers(1, 60 * M),
    st.sampled_from([512, 1 * M, 1 * M + 1, 2 * M, 10 * M - 512, 10 * M, 19 * M, 20 * M, 32 * M, 52 * M]),
)
ALLOCATE, FREE, REQUEST, EMPTY = range(4)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just(ALLOCATE), SIZES, st.integers(0, 1)),
        st.tuples(st.sampled_from([FREE, FREE, REQUEST, EMPTY]), st.integers(0, 2**30), st.just(0)),
    ),
    max_size=40,
)
ALL_SETTINGS = st.sampled_from(
    [
        AllocatorSettings(),
        EXPANDABLE,
        OVERSIZE,
        AllocatorSettings.parse("expandable_segments:True,max_split_size_mb:32"),
        AllocatorSettings.parse("large_segment_size_mb:32"),
    ]
)


def check(allocator, capacity):
    """What must hold after every step."""
    assert allocator.requested_bytes <= allocator.active_bytes
    assert allocator.allocated_bytes <= allocator.active_bytes <= allocator.reserved_bytes
    assert capacity is None or allocator.peak_reserved_bytes <= capacity
    segments = allocator.segments()
    end = 0
    for segment in segments:
        assert segment.address >= end
        end = segment.address + segment.size
        offset = 0
        for block in segment.blocks:  # they tile the segment, so none overlap
            assert block.offset == offset
            assert block.size > 0
            assert block.size % 512 == 0
            assert block.requested <= block.size
            offset += block.size
        assert offset == segment.size
        for left, right in zip(segment.blocks, segment.blocks[1:], strict=False):
            assert left.active or right.active, "two free neighbours must have merged"
    blocks = [block for segment in segments for block in segment.blocks]
    assert sum(segment.size for segment in segments) == allocator.reserved_bytes
    assert sum(block.size for block in blocks if block.active) == allocator.active_bytes
    assert sum(block.size for block in blocks if block.allocated) == allocator.allocated_bytes
    assert sum(block.requested for block in blocks) == allocator.requested_bytes
    assert 0 <= allocator.fragmentation <= 1
    return segments


def peaks(allocator):
    return (
        allocator.peak_requested_bytes,
        allocator.peak_allocated_bytes,
        allocator.peak_active_bytes,
        allocator.peak_reserved_bytes,
    )


@settings(max_examples=300, deadline=None)
@given(STEPS, ALL_SETTINGS, st.sampled_from([None, 64 * M, 150 * M]))
def test_invariants(steps, chosen, capacity):
    allocator = CachingAllocator(chosen, capacity)
    held, waiting, failures = [], [], []
    before = peaks(allocator)
    for action, amount, stream in steps:
        if action == ALLOCATE:
            try:
                held.append(allocator.allocate(amount, stream))
            except AllocatorOutOfMemory as error:
                failures.append((error, allocator.reserved_bytes, allocator.allocated_bytes))
        elif action == EMPTY:
            allocator.empty_cache()
        elif held:
            block = held.pop(amount % len(held))
            if action == FREE:
                allocator.free(block)
            else:
                allocator.request_free(block)
                waiting.append(block)
        segments = check(allocator, capacity)
        assert all(now >= then for now, then in zip(peaks(allocator), before, strict=True))
        before = peaks(allocator)
    for error, reserved, allocated in failures:
        assert (error.reserved, error.allocated, error.free) == (reserved, allocated, capacity - reserved)
        size = chosen.rounded(error.requested)
        page = chosen.small_segment_bytes if size <= M else chosen.large_segment_bytes
        assert (-(-size // page) * page if chosen.expandable_segments else chosen.segment_bytes(size)) > error.free
    # another allocator that starts from these segments holds the same, and may go on
    other = CachingAllocator(chosen, capacity)
    if steps:
        other.restore(segments)
        assert other.segments() == segments
    for each in (allocator, other):
        for block in waiting:
            each.complete_free(block)
        for block in held:
            each.free(block)
        for segment in check(each, capacity):
            assert len(segment.blocks) == 1, "everything freed merges back to whole segments"
        each.empty_cache()
        assert (each.reserved_bytes, each.segments()) == (0, [])


class Plain:
    """The rules without expandable segments and limits, written as plainly as possible: lists of [size, key or None]."""

    def __init__(self):
        self.segments = []  # (small, blocks), in the order in which they were taken

    def allocate(self, key, nbytes):
        size = -(-nbytes // 512) * 512
        small = size <= M
        fits = [
            (block[0], index, place)
            for index, (kind, blocks) in enumerate(self.segments)
            for place, block in enumerate(blocks)
            if kind == small and block[1] is None and block[0] >= size
        ]
        if not fits:
            total = 2 * M if small else 20 * M if size < 10 * M else -(-size // (2 * M)) * 2 * M
            self.segments.append((small, [[total, None]]))
            fits = [(total, len(self.segments) - 1, 0)]
        found, index, place = min(fits)
        blocks = self.segments[index][1]
        if found - size >= 512 if small else found - size > M:
            blocks[place : place + 1] = [[size, key], [found - size, None]]
        else:
            blocks[place] = [found, key]

    def free(self, key):
        for _, blocks in self.segments:
            merged = []
            for size, holder in blocks:
                holder = None if holder == key else holder
                if merged and holder is None and merged[-1][1] is None:
                    merged[-1][0] += size
                else:
                    merged.append([size, holder])
            blocks[:] = merged


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(SIZES, st.integers(-100, -1)), max_size=60))
def test_the_same_as_a_plain_version(program):
    plain, allocator, held = Plain(), CachingAllocator(), {}
    for number, step in enumerate(program):
        if step > 0:
            plain.allocate(number, step)
            held[number] = allocator.allocate(step)
        elif held:
            key = list(held)[step % len(held)]
            plain.free(key)
            allocator.free(held.pop(key))
        expected = [[size if key is None else -size for size, key in blocks] for _, blocks in plain.segments]
        assert sizes(allocator) == expected
