"""Recorded allocator traces against their replay: snapshots written by hand in torch's format, and a real step on a GPU."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from fake_devices import FakeCuda

from pbbench.errors import InputError
from pbbench.memory.allocator import snapshot
from pbbench.memory.allocator.snapshot import STATISTICS, compare, events_of, load, record, save, segments_of

M = 2**20
SMALL, A, B, C = 0x7F0000000000, 0x7F0010000000, 0x7F0008000000, 0x7F0004000000  # the driver goes down from A to C


def entry(action, address, size, stream=0):
    where = "device_free" if action == "oom" else "addr"
    return {"action": action, where: address, "size": size, "stream": stream, "time_us": 1, "pool_id": (0, 0)}


def segment(address, *blocks, kind="large", expandable=False, device=0):
    """``blocks``: (size, requested, state), as torch writes them."""
    states = {"used": "active_allocated", "pending": "active_pending_free", "free": "inactive"}
    listed, place = [], address
    for size, requested, state in blocks:
        listed.append({"address": place, "size": size, "requested_size": requested, "state": states[state], "frames": []})
        place += size
    return {
        "device": device,
        "address": address,
        "total_size": place - address,
        "allocated_size": sum(size for size, _, state in blocks if state == "used"),
        "active_size": sum(size for size, _, state in blocks if state != "free"),
        "requested_size": sum(requested for _, requested, state in blocks if state != "free"),
        "stream": 0,
        "segment_type": kind,
        "segment_pool_id": (0, 0),
        "is_expandable": expandable,
        "frames": [],
        "blocks": listed,
    }


def whole(segments, trace, settings=""):
    return {
        "segments": segments,
        "device_traces": [trace],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": settings},
        "external_annotations": [],
    }


def statistics(**figures):
    """The figures under torch's keys."""
    return {STATISTICS[name]: value for name, value in figures.items()}


BEFORE = whole([segment(SMALL, (512, 100, "used"), (2 * M - 512, 7, "free"), kind="small")], [])
AFTER = whole(
    [
        segment(A, (5 * M, 5 * M - 100, "free"), (3 * M, 3 * M, "used"), (12 * M, 0, "free")),
        segment(SMALL, (1024, 1000, "used"), (2 * M - 1024, 0, "free"), kind="small"),
        segment(C, (30 * M, 30 * M, "used")),
        segment(A, (2 * M, 2 * M, "used"), device=1),
    ],
    [
        entry("segment_alloc", A, 20 * M),
        entry("alloc", A, 5 * M - 100),
        entry("segment_alloc", B, 30 * M),
        entry("alloc", B, 30 * M),
        entry("segment_alloc", C, 30 * M),
        entry("alloc", C, 30 * M),  # the peaks are here
        entry("free_requested", B, 30 * M),
        entry("free_completed", B, 30 * M),
        entry("free_requested", C, 30 * M),
        entry("free_completed", C, 30 * M),
        entry("alloc", C, 30 * M),  # of two equal blocks the lower, which came from the driver last
        entry("free_requested", A, 5 * M - 100),  # another stream still uses it, so the next goes behind it
        entry("alloc", A + 5 * M, 3 * M),
        entry("free_completed", A, 5 * M - 100),
        entry("snapshot", 0, 0),
        entry("oom", 1 * M, 900 * M),
        entry("segment_free", B, 30 * M),
        entry("free_requested", SMALL, 100),
        entry("free_completed", SMALL, 100),
        entry("alloc", SMALL, 1000),
    ],
)
STATS = statistics(
    peak_requested_bytes=65 * M,  # 100 + 5 M − 100 + 30 M + 30 M
    peak_allocated_bytes=65 * M + 512,
    peak_active_bytes=65 * M + 512,
    peak_reserved_bytes=82 * M,
    closing_requested_bytes=33 * M + 1000,
    closing_allocated_bytes=33 * M + 1024,
    closing_active_bytes=33 * M + 1024,
    closing_reserved_bytes=52 * M,
    inactive_split_bytes=5 * M + 12 * M + 2 * M - 1024,
)

E, F = 0x600000000000, 0x500000000000
EXPANDABLE_AFTER = whole(
    [segment(F, (7 * M, 7 * M, "used"), (13 * M, 0, "free"), expandable=True)],
    [
        entry("segment_map", E, 20 * M),
        entry("alloc", E, 15 * M),
        entry("segment_map", E + 20 * M, 20 * M),
        entry("alloc", E + 15 * M, 11 * M),
        entry("free_requested", E + 15 * M, 11 * M),
        entry("free_completed", E + 15 * M, 11 * M),
        entry("segment_unmap", E + 20 * M, 20 * M),  # the 5 M before it lie in a page in use
        entry("free_requested", E, 15 * M),
        entry("free_completed", E, 15 * M),
        entry("segment_unmap", E, 20 * M),
        entry("segment_map", F, 20 * M),  # nothing was left of the first, so its addresses have gone back, too
        entry("alloc", F, 7 * M),
    ],
    settings="expandable_segments:True",
)
EXPANDABLE_STATS = statistics(
    peak_requested_bytes=26 * M,
    peak_allocated_bytes=26 * M,
    peak_active_bytes=26 * M,
    peak_reserved_bytes=40 * M,
    closing_requested_bytes=7 * M,
    closing_allocated_bytes=7 * M,
    closing_active_bytes=7 * M,
    closing_reserved_bytes=20 * M,
    inactive_split_bytes=0,
)


class RecordingCuda(FakeCuda):
    """torch.cuda with a memory history: one snapshot before the step, one after it."""

    def __init__(self, before, after, stats):
        super().__init__()
        self.snapshots = iter([before, after])
        self.stats = {**stats, "num_alloc_retries": 0}
        self.history = []
        self.memory = SimpleNamespace(
            _snapshot=lambda: next(self.snapshots), _record_memory_history=lambda **options: self.history.append(options)
        )

    def memory_stats(self, device=None):
        return self.stats

    def empty_cache(self):
        self.calls.append("empty_cache")


def recorded(before=BEFORE, after=AFTER, stats=STATS):
    return record(lambda: None, cuda=RecordingCuda(before, after, stats))


def test_a_recording_is_made_from_an_emptied_cache_with_fresh_peaks():
    cuda, order = RecordingCuda(BEFORE, AFTER, STATS), []
    recording = record(lambda: order.extend(cuda.calls), cuda=cuda)
    assert order == ["synchronize", "empty_cache", "synchronize", "reset"]
    assert cuda.history == [{"enabled": "all", "context": None, "clear_history": True}, {"enabled": None}]
    assert len(recording.events) == len(AFTER["device_traces"][0]) - 1  # all but "snapshot"
    assert recording.torch_version == torch.__version__


def test_the_history_is_switched_off_when_the_step_fails():
    cuda = RecordingCuda(BEFORE, AFTER, STATS)
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 // 0, cuda=cuda)
    assert cuda.history[-1] == {"enabled": None}
    assert recorded().statistics["peak_reserved_bytes"] == 82 * M  # and nothing of the failed one is in the way


@pytest.mark.parametrize(
    ("before", "after", "stats"),
    [(BEFORE, AFTER, STATS), (whole([], []), EXPANDABLE_AFTER, EXPANDABLE_STATS)],
    ids=["plain", "expandable"],
)
def test_the_replay_equals_the_record_to_the_byte(before, after, stats):
    comparison = compare(recorded(before, after, stats))
    assert comparison.equal, comparison.report()
    assert set(comparison.figures) == {*STATISTICS, "num_segments"}


def test_pages_that_were_given_back_before_the_recording_are_used_again():
    # 20 M in use, 20 M unmapped, 20 M in use: 18 M go into the hole
    pages = [segment(E + start * M, (20 * M, 20 * M, "used"), expandable=True) for start in (0, 40)]
    filled = segment(
        E, (20 * M, 20 * M, "used"), (18 * M, 18 * M, "used"), (2 * M, 0, "free"), (20 * M, 20 * M, "used"), expandable=True
    )
    trace = [entry("segment_map", E + 20 * M, 20 * M), entry("alloc", E + 20 * M, 18 * M)]
    stats = {key: (60 if "reserved" in key else 58) * M for key in STATISTICS.values()}
    stats["inactive_split_bytes.all.current"] = 0
    recording = recorded(whole(pages, []), whole([filled], trace, "expandable_segments:True"), stats)
    comparison = compare(recording)
    assert comparison.equal, comparison.report()


def test_a_block_that_waits_for_another_stream_is_taken_over():
    before = whole([segment(A, (5 * M, 5 * M, "pending"), (15 * M, 0, "free"))], [])
    after = whole([segment(A, (20 * M, 0, "free"))], [entry("free_completed", A, 5 * M)])
    stats = dict.fromkeys(STATISTICS.values(), 0)
    stats["requested_bytes.all.peak"] = stats["active_bytes.all.peak"] = 5 * M
    stats["reserved_bytes.all.peak"] = stats["reserved_bytes.all.current"] = 20 * M
    comparison = compare(recorded(before, after, stats))
    assert comparison.equal, comparison.report()


def altered(number, **changes):
    after = copy.deepcopy(AFTER)
    after["device_traces"][0][number].update(changes)
    return after


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (
            altered(10, addr=B),
            f"event 10, alloc of {30 * M} bytes at {B:#x}: the record put it at {B:#x}, the replay at {C:#x}",
        ),
        (altered(0, size=22 * M), "the record took 23068672 bytes from the driver for it, the replay 20971520"),
        (altered(16, size=28 * M), "the replay has no such free segment or pages"),
        (altered(17, addr=SMALL + 512), "it was allocated before the record began"),
        (altered(18, action="free_requested"), "or says it twice"),
        (altered(17, action="free_completed"), "leaves out that its free was asked for"),
        (whole(AFTER["segments"][:2], AFTER["device_traces"][0]), "the segments at the end differ"),
    ],
)
def test_where_the_replay_parts_from_the_record_is_said(after, says):
    comparison = compare(recorded(after=after))
    assert not comparison.equal
    assert says in comparison.report()


def test_one_byte_is_a_difference():
    comparison = compare(recorded(stats={**STATS, "reserved_bytes.all.peak": 82 * M + 1}))
    assert not comparison.equal
    assert comparison.differences == []
    assert f"peak_reserved_bytes: recorded {82 * M + 1}, replayed {82 * M}, -1" in comparison.report()


def test_settings_that_are_not_modelled_are_refused():
    after = {**AFTER, "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:4"}}
    with pytest.raises(InputError, match="roundup_power2_divisions:4"):
        compare(recorded(after=after))


def test_what_is_no_snapshot_or_has_memory_pools_is_refused():
    for nonsense in ({}, {"device_traces": [[]], "segments": [{}]}, {"device_traces": [[{"action": "alloc"}]], "segments": 3}):
        with pytest.raises(InputError, match="no CUDA memory snapshot"):
            segments_of(nonsense)
    with pytest.raises(InputError, match="trace of device 3"):
        events_of(AFTER, 3)
    with pytest.raises(InputError, match="memory pools"):
        events_of(altered(1, pool_id=(0, 1)))
    pooled = segment(A, (2 * M, 0, "free")) | {"segment_pool_id": (0, 1)}
    with pytest.raises(InputError, match="memory pools"):
        segments_of(whole([pooled], []))


def test_a_recording_is_kept_as_json(tmp_path):
    recording, path = recorded(), tmp_path / "step.json"
    save(recording, path)
    assert load(path) == recording
    assert compare(load(path)).equal


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "step.json"
    save(recorded(), path)
    data = json.loads(path.read_text())
    wrong = [{**data, "format": "x"}, {**data, "statistics": {}}, {**data, "events": [["alloc", 1]]}, [1], {**data, "more": 1}]
    for content in [*map(json.dumps, wrong), "no json", "\x80"]:
        path.write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match="is not an allocator recording"):
            load(path)
    with pytest.raises(InputError, match="is not an allocator recording"):
        load(tmp_path / "missing.json")


@pytest.mark.cuda
def test_a_real_training_step_is_replayed_to_the_byte(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3, padding=1),
        torch.nn.GroupNorm(8, 64),
        torch.nn.SiLU(),
        torch.nn.Conv2d(64, 128, 3, padding=1),
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(2048, 100),
    ).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    other = torch.cuda.Stream()

    def step():
        for batch in (8, 32, 16):
            images = torch.randn(batch, 3, 64, 64, device="cuda")
            model(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.cuda.stream(other):  # its memory may be used again only once the other stream has got so far
                copied = images.clone()
                images.record_stream(other)
            del images, copied

    recording = record(step)
    save(recording, tmp_path / "step.json")
    comparison = snapshot.compare(load(tmp_path / "step.json"))
    assert {event.action for event in recording.events} >= {"alloc", "free_requested", "free_completed", "segment_alloc"}
    assert comparison.equal, comparison.report()
