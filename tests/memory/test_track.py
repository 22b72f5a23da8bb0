"""``memory.track`` and ``memory.measure``: phases, outcomes, ledger, repeats and energy, on a fake GPU and on a real one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_devices import CUDA, FakeCuda, FakeNvml
from torch import nn

from pbbench import memory
from pbbench.errors import InputError
from pbbench.memory.meters import driver, ledger
from pbbench.memory.meters.cuda import CudaPeaks
from pbbench.memory.meters.outcome import Failed, Ok, OutOfMemory
from pbbench.memory.meters.track import Spread

MiB = 2**20
GiB = 2**30
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8.00 GiB of which 5.00 MiB is free. "
    "Of the allocated memory 6.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pbbench.memory.meters.track"], "_HAVE_RUN", set())


def fakes(used: int = 5 * GiB, own: int | None = 4 * GiB, **failures: int) -> dict[str, Any]:
    return {"device": CUDA, "cuda": FakeCuda(), "nvml": FakeNvml([(os.getpid(), own)], used=used, **failures)}


def using(cuda: FakeCuda, nbytes: int) -> Callable[[], None]:
    def step() -> None:
        cuda.allocate(nbytes)
        cuda.free(nbytes)

    return step


# -- the package's names


@pytest.mark.parametrize(
    "first", ["memory.predict", "memory.track", "from pbbench.memory.prediction.fake import predict, Step"]
)
def test_the_packages_functions_are_functions_whatever_was_imported_first(first: str) -> None:
    code = f"""
import sys
from pbbench import memory
assert "torch" not in sys.modules
{first}
from pbbench.memory.prediction.fake import predict, Step
from pbbench.memory.meters.track import Tracked, track
assert memory.predict is predict and memory.Step is Step and memory.track is track
assert callable(memory.trace) and callable(memory.measure)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"memory.*'tracker'"):
        memory.tracker  # noqa: B018


# -- cold and warm, repeats


def test_the_first_run_of_a_name_is_cold_also_in_another_block() -> None:
    given = fakes()
    sizes = iter([9, 3, 1, 2, 4])
    for runs in (2, 3):
        with memory.track(**given) as tracked:
            for _ in range(runs):
                with tracked.phase("step"):
                    using(given["cuda"], next(sizes) * MiB)()
            temperatures = [reading.temperature for reading in tracked.readings]
            summary = tracked.summary("step")
        assert temperatures == (["cold", "warm"] if runs == 2 else ["warm"] * 3)
    assert summary.cold is None
    assert summary.repeats == 3
    assert summary.warm["peak_allocated_bytes"] == Spread(MiB, 2 * MiB, 4 * MiB)
    assert summary.warm["seconds"].min > 0


def test_a_summary_keeps_cold_and_warm_apart_and_bytes_whole() -> None:
    given = fakes()
    with memory.track(**given) as tracked:
        for size in (9, 1, 2):
            with tracked.phase("step"):
                using(given["cuda"], size * MiB)()
        summary = tracked.summary("step")
    assert summary.cold.peak_allocated_bytes == 9 * MiB
    spread = summary.warm["peak_allocated_bytes"]
    assert (spread.min, spread.median, spread.max) == (MiB, MiB, 2 * MiB)
    assert f"peak_allocated_bytes   {MiB:,} ({MiB:,} to {2 * MiB:,}); cold {9 * MiB:,}" in str(summary)


def test_a_run_without_a_reading_makes_the_spread_unknown_with_its_reason() -> None:
    given = fakes()
    with memory.track(**given) as tracked:
        for processes in ([(os.getpid(), GiB)], [(os.getpid(), GiB)], []):
            given["nvml"].processes = processes
            with tracked.phase("step"):
                pass
        summary = tracked.summary("step")
    assert summary.warm["peak_process_bytes"] is None
    assert "does not list process" in summary.reasons["peak_process_bytes"]
    assert summary.warm["peak_device_bytes"].max == 5 * GiB


def test_a_phase_that_failed_is_not_the_cold_run() -> None:
    given = fakes()
    with memory.track(**given) as tracked:
        assert tracked.attempt("step", lambda: 1 / 0) == Failed("ZeroDivisionError", "division by zero")
        assert tracked.attempt("step", lambda: None) == Ok()
        assert [reading.temperature for reading in tracked.readings] == ["cold", "cold"]
        assert tracked.summary("step").cold is tracked.readings[1]


def test_names_that_were_not_tracked_are_refused() -> None:
    with memory.track("cpu") as tracked:
        with tracked.phase("step"):
            pass
        with pytest.raises(InputError, match=r"'stpe'.*step"):
            tracked.summary("stpe")


def test_a_gpu_that_is_not_there_is_refused() -> None:
    cuda = FakeCuda()
    cuda.is_available = lambda: False
    with pytest.raises(InputError, match="no GPU"), memory.track("cuda", cuda=cuda):
        pass


# -- outcomes


def test_out_of_memory_is_an_outcome_with_its_figures() -> None:
    given = fakes()

    def step() -> None:
        given["cuda"].allocate(7 * MiB)
        given["cuda"].retries = 3
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    with memory.track(**given) as tracked:
        outcome = tracked.attempt("step", step)
        assert isinstance(outcome, OutOfMemory)
        assert outcome.status == "out_of_memory"
        assert (outcome.source, outcome.requested, outcome.free) == ("allocator", 20 * MiB, 5 * MiB)
        assert (outcome.allocated, outcome.reserved, outcome.retries) == (6 * GiB, 7 * GiB, 3)
        assert tracked.outcome is outcome
        assert tracked.readings[0].peak_allocated_bytes == 7 * MiB
        assert tracked.ledger("step").allocated == 7 * MiB
        assert tracked.summary("step").reasons["seconds"] == "no warm run has ended well"


def test_an_exception_passes_through_a_phase_and_is_its_outcome() -> None:
    with memory.track(**fakes()) as tracked:
        with pytest.raises(ValueError, match="the step's own"), tracked.phase("outer"), tracked.phase("inner"):
            raise ValueError("the step's own")
        assert [reading.name for reading in tracked.readings] == ["inner", "outer"]
        assert {reading.outcome for reading in tracked.readings} == {Failed("ValueError", "the step's own")}


def test_a_broken_device_fails_the_phase_and_the_next_attempt_raises() -> None:
    """After a CUDA error no meter of the allocator can begin: that is no outcome of the next step."""
    given = fakes()

    def step() -> None:
        given["cuda"].broken = True
        raise RuntimeError("CUDA error: out of memory")

    with memory.track(**given) as tracked:
        outcome = tracked.attempt("step", step)
        assert (outcome.source, outcome.retries) == ("cuda", None)
        assert "illegal memory access" in tracked.ledger("step").reasons["instant"]
        with pytest.raises(RuntimeError, match="illegal memory access"):
            tracked.attempt("step", lambda: None)
    assert CudaPeaks._open == []


def test_interrupts_pass_through_an_attempt() -> None:
    def step() -> None:
        raise KeyboardInterrupt

    with memory.track("cpu") as tracked, pytest.raises(KeyboardInterrupt):
        tracked.attempt("step", step)


@pytest.mark.parametrize("turn", range(3))
def test_an_inner_reset_leaves_the_outer_peak(turn: int) -> None:
    sizes = ([1, 2, 3] * 2)[turn : turn + 3]
    given = fakes()
    with memory.track(**given) as tracked, tracked.phase("outer") as outer:
        using(given["cuda"], sizes[0] * MiB)()
        tracked.attempt("inner", using(given["cuda"], sizes[1] * MiB))
        using(given["cuda"], sizes[2] * MiB)()
    assert outer.peak_allocated_bytes == 3 * MiB
    assert tracked.readings[0].peak_allocated_bytes == sizes[1] * MiB


def test_cuda_and_cuda_0_are_one_device() -> None:
    given = fakes()
    with memory.track(**{**given, "device": "cuda"}) as mine, memory.track(**{**given, "device": "cuda:0"}) as yours:
        with mine.phase("outer") as outer:
            using(given["cuda"], 5 * MiB)()
            with yours.phase("inner"):
                pass
        with yours.phase("outer") as again:
            pass
    assert outer.peak_allocated_bytes == 5 * MiB
    assert again.temperature == "warm"


# -- the ledger


def test_the_ledger_names_every_difference() -> None:
    given = fakes(used=500 * MiB, own=300 * MiB)
    given["cuda"].reserve_ahead = 3 * MiB
    with memory.track(**given) as tracked:
        with tracked.phase("step"):
            given["cuda"].allocate(1000)
        found = tracked.ledger("step")
    assert found == ledger.Ledger(
        requested=1000,
        allocated=1024,
        reserved=1024 + 3 * MiB,
        process=300 * MiB,
        device=500 * MiB,
        rounding=24,
        cache=3 * MiB,
        context=297 * MiB - 1024,
        others=200 * MiB,
        outside_torch=497 * MiB - 1024,
    )
    parts = (found.requested, found.rounding, found.cache, found.context, found.others)
    assert sum(parts) == found.device
    for words in ("+ rounding", "+ cache", "+ context and libraries", "+ other processes", f"{500 * MiB:,} B"):
        assert words in str(found)


def test_the_ledger_is_read_after_one_synchronisation_and_by_nothing_older() -> None:
    """What the sampling thread saw before is a peak, never the closing figure."""
    given = fakes(own=GiB)
    order: list[str] = []
    cuda, nvml = given["cuda"], given["nvml"]
    stats, memory_info = cuda.memory_stats, nvml.nvmlDeviceGetMemoryInfo
    with memory.track(**given) as tracked:
        with tracked.phase("step"):
            cuda.allocate(MiB)
            nvml.used = 6 * GiB
            tracked.meter.sampler.sample()
            nvml.used = 5 * GiB
            cuda.synchronize = lambda device=None: order.append("synchronise")
            cuda.memory_stats = lambda device=None: order.append("allocator") or stats(device)
            nvml.nvmlDeviceGetMemoryInfo = lambda handle: order.append("driver") or memory_info(handle)
        found = tracked.ledger("step")
    after = order[order.index("synchronise") + 1 :]
    assert "allocator" in after
    assert "driver" in after
    assert order.count("synchronise") == 1
    assert tracked.readings[0].peak_device_bytes == 6 * GiB
    assert found.device == 5 * GiB


@pytest.mark.parametrize(
    ("processes", "failures", "words"),
    [
        ([(40, GiB)], {}, "lists 1 others"),
        ([], {}, "does not list process"),
        ([(None, None)], {}, "without its memory"),
        ([], {"nvmlDeviceGetComputeRunningProcesses_v3": FakeNvml.NVML_ERROR_NO_PERMISSION}, "no permission"),
    ],
)
def test_a_hidden_process_leaves_the_rest_of_the_ledger(processes: list[Any], failures: dict[str, int], words: str) -> None:
    given = fakes(**failures)
    given["nvml"].processes = [(pid or os.getpid(), used) for pid, used in processes]
    with memory.track(**given) as tracked:
        with tracked.phase("step"):
            given["cuda"].allocate(MiB)
        found = tracked.ledger("step")
    assert (found.process, found.context, found.others) == (None, None, None)
    assert all(words in found.reasons[name] for name in ("process", "context", "others"))
    assert (found.allocated, found.device, found.outside_torch) == (MiB, 5 * GiB, 5 * GiB - MiB)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver library"),
        (FakeNvml.NVML_ERROR_DRIVER_NOT_LOADED, "driver is not loaded"),
        (None, "MIG is enabled"),
    ],
)
def test_without_a_driver_or_with_slices_only_torchs_part_is_known(error: int | None, words: str) -> None:
    given = fakes(**({"nvmlInit": error} if error is not None else {}))
    given["nvml"].mig = 1
    with memory.track(**given) as tracked:
        with tracked.phase("step"):
            given["cuda"].allocate(MiB)
        found = tracked.ledger("step")
    assert (found.allocated, found.process, found.device, found.outside_torch) == (MiB, None, None, None)
    assert all(words in found.reasons[name] for name in ("process", "device", "context", "others", "outside_torch"))
    assert words in tracked.readings[0].reasons["energy_joules"]


def test_another_process_that_dies_stays_in_the_peak_and_leaves_the_ledger() -> None:
    given = fakes(used=7 * GiB)
    with memory.track(**given) as tracked:
        with tracked.phase("step") as reading:
            given["nvml"].used = 4 * GiB
        found = tracked.ledger("step")
    assert reading.peak_device_bytes == 7 * GiB
    assert (found.device, found.others) == (4 * GiB, 0)


def test_a_process_that_is_no_longer_listed_keeps_its_peak() -> None:
    given = fakes()
    with memory.track(**given) as tracked:
        with tracked.phase("step") as reading:
            given["nvml"].processes = []
        found = tracked.ledger("step")
    assert reading.peak_process_bytes == 4 * GiB
    assert "peak_process_bytes" not in reading.reasons
    assert found.process is None
    assert "does not list process" in found.reasons["process"]


def test_figures_that_contradict_each_other_give_no_difference() -> None:
    given = fakes(used=3 * GiB, own=4 * GiB)
    with memory.track(**given) as tracked:
        with tracked.phase("step"):
            pass
        found = tracked.ledger("step")
    assert (found.process, found.device, found.others) == (4 * GiB, 3 * GiB, None)
    assert "less than process" in found.reasons["others"]


def test_on_a_cpu_the_ledger_is_null_with_the_reason() -> None:
    with memory.track("cpu") as tracked:
        with tracked.phase("step"):
            pass
        found = tracked.ledger("step")
    assert found.device is None
    assert "CUDA devices only" in found.reasons["requested"]
    assert str(found).count("CUDA devices only") == 1


# -- energy


@pytest.fixture
def _short_phases_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SHORTEST_FOR_ENERGY_S", 0.0)


@pytest.mark.usefixtures("_short_phases_count")
def test_energy_is_the_counters_difference() -> None:
    given = fakes()
    with memory.track(**given) as tracked, tracked.phase("step") as reading:
        given["nvml"].millijoules += 2500
    assert reading.energy_joules == 2.5


@pytest.mark.usefixtures("_short_phases_count")
def test_a_counter_that_stood_still_is_unknown_not_zero() -> None:
    with memory.track(**fakes()) as tracked, tracked.phase("step") as reading:
        pass
    assert reading.energy_joules is None
    assert "renews its energy counter" in reading.reasons["energy_joules"]


def test_a_short_phase_has_no_energy() -> None:
    given = fakes()
    with memory.track(**given) as tracked:
        with tracked.phase("short") as short:
            given["nvml"].millijoules += 2500
        with tracked.phase("long") as long:
            given["nvml"].millijoules += 2500
            time.sleep(0.11)
    assert (short.energy_joules, long.energy_joules) == (None, 2.5)


def test_a_card_without_the_counter_says_so() -> None:
    given = fakes(nvmlDeviceGetTotalEnergyConsumption=FakeNvml.NVML_ERROR_NOT_SUPPORTED)
    with memory.track(**given) as tracked, tracked.phase("step") as reading:
        pass
    assert "not support" in reading.reasons["energy_joules"]
    assert reading.peak_device_bytes == 5 * GiB


# -- measure


@pytest.mark.usefixtures("_short_phases_count")
def test_a_report_of_a_step() -> None:
    given = fakes()
    sizes = iter([9, 1, 5, 4, 6, 0])  # cold, warm-up, three repeats, traced
    model = nn.Linear(64, 64)  # on the CPU: the tracer counts nothing of it on the fake device

    def step() -> None:
        given["nvml"].millijoules += 1500
        using(given["cuda"], next(sizes) * MiB)()
        model(torch.ones(2, 64)).sum().backward()

    report = memory.measure(step, repeats=3, warmup=2, modules=model, **given)
    assert report.outcome == Ok()
    assert report.cold.peak_allocated_bytes == 9 * MiB
    spread = report.warm.warm["peak_allocated_bytes"]
    assert (report.warm.repeats, spread.min, spread.median, spread.max) == (3, 4 * MiB, 5 * MiB, 6 * MiB)
    assert sum(report.attribution.values()) == 5 * MiB
    assert report.attribution["unattributed"] == 5 * MiB - report.live.peak_bytes
    assert report.energy_joules == 1.5
    assert report.ledger.device == 5 * GiB
    told = json.loads(json.dumps(report.as_dict()))
    assert told["outcome"] == {"status": "ok"}
    assert told["attribution"] == report.attribution


def test_a_report_on_a_cpu_sums_to_the_live_peak() -> None:
    model = nn.Linear(128, 128, bias=False)  # 64 KiB
    x = torch.ones(4, 128)  # 2 KiB
    report = memory.measure(lambda: model(x).sum().backward(), device="cpu", repeats=2, modules=model, inputs=x)
    assert sum(report.attribution.values()) == report.live.peak_bytes
    assert (report.attribution["parameter"], report.attribution["input"]) == (65536, 2048)
    assert "unattributed" not in report.attribution
    assert report.energy_joules is None
    assert "CUDA" in report.reasons["energy_joules"]


@pytest.mark.parametrize("fails_at", range(5))
def test_out_of_memory_at_any_run_is_reported_with_what_was_read(fails_at: int) -> None:
    """Cold, warm-up, two repeats, traced."""
    given = fakes()
    runs = iter(range(5))

    def step() -> None:
        using(given["cuda"], MiB)()
        if next(runs) == fails_at:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    report = memory.measure(step, repeats=2, warmup=2, **given)
    assert report.outcome.status == "out_of_memory"
    assert report.cold.peak_allocated_bytes == MiB
    assert (report.live, report.attribution, report.energy_joules) == (None, None, None)
    assert {"live", "attribution", "energy_joules"} <= set(report.reasons)
    if fails_at >= 3:
        assert report.warm.warm["peak_allocated_bytes"].max == MiB
    json.dumps(report.as_dict())


def test_other_failures_pass_through_measure() -> None:
    with pytest.raises(ZeroDivisionError):
        memory.measure(lambda: 1 / 0, device="cpu")
    with pytest.raises(InputError, match="at least 1"):
        memory.measure(lambda: None, device="cpu", repeats=0)


# -- a real GPU


@pytest.mark.cuda
@pytest.mark.parametrize(("nbytes", "block"), [(3 * MiB, 3 * MiB), (1000, 1024), (1, 512), (MiB, MiB), (11 * MiB, 12 * MiB)])
def test_real_cuda_exact_bytes(nbytes: int, block: int) -> None:
    """Rounded up to 512; a large block keeps a rest of at most 1 MiB of its segment (11 MiB of one of 12)."""
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    with memory.track("cuda") as tracked:
        with tracked.phase("step") as reading:
            held = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        found = tracked.ledger("step")
        del held
    assert reading.peak_allocated_bytes - base == block
    assert found.allocated - base == block
    known = [v for v in (found.requested, found.allocated, found.reserved, found.process, found.device) if v is not None]
    assert known == sorted(known)
    assert found.device is not None or found.reasons["device"]


@pytest.mark.cuda
def test_real_cuda_report() -> None:
    model = nn.Linear(1024, 1024, bias=False, device="cuda")  # 4 MiB
    x = torch.ones(1024, 1024, device="cuda")  # 4 MiB

    def step() -> None:
        model.zero_grad()
        model(x).sum().backward()

    report = memory.measure(step, device="cuda", repeats=3, modules=model, inputs=x)
    assert report.outcome == Ok()
    assert sum(report.attribution.values()) == report.warm.warm["peak_allocated_bytes"].median
    assert report.attribution["parameter"] == report.attribution["input"] == 4 * MiB


@pytest.mark.cuda
def test_real_cuda_out_of_memory_is_an_outcome() -> None:
    capacity = torch.cuda.get_device_properties(0).total_memory
    with memory.track("cuda") as tracked:
        outcome = tracked.attempt("step", lambda: torch.empty(2 * capacity, dtype=torch.uint8, device="cuda"))
        assert outcome.status == "out_of_memory"
        assert outcome.requested == pytest.approx(2 * capacity, rel=0.01)
        assert tracked.attempt("after", lambda: torch.ones(1, device="cuda")) == Ok()


@pytest.mark.cuda
def test_real_cuda_energy_where_the_card_counts_it() -> None:
    x = torch.ones(4096, 4096, device="cuda")
    with memory.track("cuda") as tracked, tracked.phase("work") as reading:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            x @ x
            torch.cuda.synchronize()
    if reading.energy_joules is None:
        pytest.skip(reading.reasons["energy_joules"])
    assert 0.5 * 5 < reading.energy_joules < 0.7 * 2000  # between idle and more than any card draws
