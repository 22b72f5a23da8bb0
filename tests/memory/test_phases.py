"""The meter on allocations of known size: on a fake GPU everywhere, on a real one where there is one."""

import os
import threading

import pytest
import torch
from fake_devices import CUDA, FakeCuda, FakeNvml
from torch import nn

from pbbench.memory.meters.cuda import CudaPeaks
from pbbench.memory.meters.phases import COLUMNS, METERS, Meter

MiB = 2**20
GiB = 2**30


def fake_meter(cuda: FakeCuda, nvml: FakeNvml | None = None) -> Meter:
    return Meter(CUDA, cuda=cuda, nvml=nvml or FakeNvml([(os.getpid(), 4 * GiB)], used=5 * GiB))


def test_a_phase_reads_every_column() -> None:
    cuda = FakeCuda(reserve_ahead=3 * MiB)
    with fake_meter(cuda) as meter, meter.phase("step") as reading:
        assert reading.peak_allocated_bytes is None, "a reading is complete only when its phase has ended"
        cuda.allocate(1000)
        cuda.free(1000)
    assert reading.name == "step"
    assert reading.peak_allocated_bytes == 1024
    assert reading.peak_reserved_bytes == 1024 + 3 * MiB
    assert reading.ledger["peak_requested_bytes"] == 1000
    assert reading.peak_process_bytes == 4 * GiB
    assert reading.peak_device_bytes == 5 * GiB
    assert reading.ledger["closing"] == {
        "requested": 0,
        "allocated": 0,
        "reserved": 1024 + 3 * MiB,
        "process": 4 * GiB,
        "device": 5 * GiB,
    }
    assert reading.ledger["nvml"]["samples"] >= 2
    assert reading.peak_rss_bytes > 0
    assert reading.seconds > 0
    assert set(reading.reasons) == {"energy_joules"}, "the phase is too short for the driver's counter"


def test_every_figure_but_the_time_has_one_meter() -> None:
    filled = [column for _, columns, _ in METERS for column in columns]
    assert sorted([*filled, "seconds"]) == sorted(COLUMNS)


def test_the_order_is_synchronise_reset_run_synchronise() -> None:
    cuda = FakeCuda()
    with fake_meter(cuda) as meter, meter.phase("step"):
        cuda.calls.append("run")
    assert cuda.calls == ["synchronize", "reset", "run", "synchronize"]


def test_what_was_held_before_counts_and_an_earlier_peak_does_not() -> None:
    cuda = FakeCuda()
    cuda.allocate(8 * MiB)
    cuda.free(8 * MiB)
    cuda.allocate(MiB)
    with fake_meter(cuda) as meter, meter.phase("step") as reading:
        cuda.allocate(MiB)
    assert reading.peak_allocated_bytes == 2 * MiB


def test_inner_resets_keep_the_outer_peak() -> None:
    """The outer peak lies before, in, between and after the inner phases in turn."""
    sizes = [1, 2, 3, 4]
    for turn in range(4):
        rotated = sizes[turn:] + sizes[:turn]
        cuda = FakeCuda()

        def use(size: int, cuda: FakeCuda = cuda) -> None:
            cuda.allocate(size * MiB)
            cuda.free(size * MiB)

        with fake_meter(cuda) as meter, meter.phase("train_step") as outer:
            use(rotated[0])
            with meter.phase("forward") as first:
                use(rotated[1])
            use(rotated[2])
            with meter.phase("backward") as second:
                use(rotated[3])
        assert outer.peak_allocated_bytes == 4 * MiB
        assert first.peak_allocated_bytes == rotated[1] * MiB
        assert second.peak_allocated_bytes == rotated[3] * MiB


def test_two_meters_on_one_device_share_its_peaks() -> None:
    cuda = FakeCuda()
    with fake_meter(cuda) as mine, fake_meter(cuda) as yours, mine.phase("outer") as outer:
        cuda.allocate(5 * MiB)
        cuda.free(5 * MiB)
        with yours.phase("inner") as inner:
            cuda.allocate(MiB)
    assert outer.peak_allocated_bytes == 5 * MiB
    assert inner.peak_allocated_bytes == MiB


def test_a_failing_phase_still_reports_and_the_failure_passes_through() -> None:
    cuda = FakeCuda()
    cuda.retries = 2
    meter = fake_meter(cuda)

    def step() -> None:
        cuda.allocate(7 * MiB)
        cuda.retries = 5
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(torch.OutOfMemoryError), meter.phase("outer") as outer, meter.phase("inner") as inner:
        step()
    meter.close()
    for reading in (outer, inner):
        assert reading.peak_allocated_bytes == 7 * MiB
        assert reading.ledger["alloc_retries"] == 3
        assert reading.seconds > 0
    assert CudaPeaks._open == []


def test_after_a_cuda_error_the_rest_is_read_and_the_reason_stands() -> None:
    cuda = FakeCuda()
    meter = fake_meter(cuda)

    def step() -> None:
        cuda.broken = True
        raise RuntimeError("the step's own failure")

    with pytest.raises(RuntimeError, match="the step's own"), meter.phase("step") as reading:
        step()
    meter.close()
    assert reading.peak_allocated_bytes is None
    assert "illegal memory access" in reading.reasons["peak_allocated_bytes"]
    assert "illegal memory access" in reading.reasons["peak_reserved_bytes"]
    assert reading.peak_device_bytes == 5 * GiB
    assert CudaPeaks._open == []


def test_a_foreign_process_under_our_number_is_not_taken_for_ours() -> None:
    cuda = FakeCuda()
    with fake_meter(cuda, FakeNvml([(os.getpid(), 100 * MiB)])) as meter, meter.phase("step") as reading:
        cuda.allocate(200 * MiB)
    assert reading.peak_process_bytes is None
    assert "another process" in reading.reasons["peak_process_bytes"]
    assert reading.ledger["closing"]["process"] is None


def test_a_backend_without_statistics_is_null_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(cuda, "memory_stats", lambda device=None: {})
    with fake_meter(cuda) as meter, meter.phase("step") as reading:
        pass
    assert (reading.peak_allocated_bytes, reading.peak_reserved_bytes) == (None, None)
    assert set(reading.reasons) == {"peak_allocated_bytes", "peak_reserved_bytes", "energy_joules"}


def test_nvmls_reasons_reach_the_reading() -> None:
    nvml = FakeNvml([], nvmlInit=FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    with fake_meter(FakeCuda(), nvml) as meter, meter.phase("step") as reading:
        pass
    assert (reading.peak_process_bytes, reading.peak_device_bytes) == (None, None)
    assert "driver library" in reading.reasons["peak_process_bytes"]
    assert "nvml" not in reading.ledger


def test_nvmls_thread_lives_as_long_as_the_meter() -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "pbbench-nvml"]

    with fake_meter(FakeCuda()):
        assert threads() == ["pbbench-nvml"], "it must run before the first phase does"
    assert threads() == []


def test_on_a_cpu_the_gpu_columns_are_null_with_reasons() -> None:
    with Meter("cpu") as meter, meter.phase("step") as reading:
        torch.ones(10)
    columns = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes", "peak_device_bytes")
    assert [getattr(reading, column) for column in columns] == [None] * 4
    assert all("cpu" in reading.reasons[column] for column in columns)
    assert (reading.peak_rss_bytes is None) == ("peak_rss_bytes" in reading.reasons)


class Allocating(nn.Module):
    """A linear layer whose forward, backward and optimizer step leave known marks on the fake device."""

    def __init__(self, cuda: FakeCuda, forward: int, backward: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.cuda, self.forward_bytes = cuda, forward
        self.linear.weight.register_post_accumulate_grad_hook(lambda parameter: self.use(backward))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.use(self.forward_bytes)
        return self.linear(x)

    def use(self, nbytes: int) -> None:
        self.cuda.allocate(nbytes)
        self.cuda.free(nbytes)


def test_the_parts_of_a_step_are_measured_without_touching_it() -> None:
    cuda = FakeCuda()
    model = Allocating(cuda, forward=2 * MiB, backward=5 * MiB)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: model.use(MiB))  # runs after the meter's, which is global
    hooks_before = (len(model._forward_pre_hooks), len(model._forward_hooks))
    with fake_meter(cuda) as meter, meter.phase("train_step") as whole, meter.parts(model) as parts:
        model(torch.ones(1, 2)).sum().backward()
        model.forward_bytes = 3 * MiB
        model.use(4 * MiB)  # after the backward of the first chunk: still its part
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert {name: part.peak_allocated_bytes for name, part in parts.items()} == {
        "forward": 3 * MiB,
        "backward": 5 * MiB,
        "optimizer": MiB,
    }
    assert whole.peak_allocated_bytes == 5 * MiB
    assert parts["forward"].ledger["turns"] == parts["backward"].ledger["turns"] == 2
    assert sum(part.seconds for part in parts.values()) <= whole.seconds
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks_before


def test_the_parts_of_a_failing_step_are_complete() -> None:
    cuda = FakeCuda()
    model = Allocating(cuda, forward=2 * MiB, backward=0)
    with pytest.raises(RuntimeError), fake_meter(cuda) as meter, meter.parts(model) as parts:
        model(torch.ones(1, 3))
    assert parts["forward"].peak_allocated_bytes == 2 * MiB
    assert parts["forward"].outcome.status == "failed"
    assert CudaPeaks._open == []


def test_recomputation_in_backward_is_backward() -> None:
    cuda = FakeCuda()
    model = Allocating(cuda, forward=2 * MiB, backward=MiB)
    outer = nn.Sequential(model)

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    with fake_meter(cuda) as meter, meter.parts(outer) as parts:
        outer.forward = run
        outer(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert list(parts) == ["forward", "backward"]
    assert "turns" not in parts["forward"].ledger
    assert parts["backward"].peak_allocated_bytes == 2 * MiB


@pytest.mark.cuda
def test_real_cuda_known_sizes() -> None:
    device = torch.device("cuda")
    with Meter(device) as meter:
        base = torch.cuda.memory_allocated()
        with meter.phase("outer") as outer:
            held = torch.empty(64 * MiB, dtype=torch.uint8, device=device)
            del held
            with meter.phase("inner") as inner:
                small = torch.empty(1000, dtype=torch.uint8, device=device)
        assert outer.peak_allocated_bytes - base == 64 * MiB
        assert inner.peak_allocated_bytes - base == 1024
        assert outer.peak_reserved_bytes >= outer.peak_allocated_bytes
        assert small.numel() == 1000
        closing = {name: value for name, value in outer.ledger["closing"].items() if value is not None}
        order = [closing[name] for name in ("requested", "allocated", "reserved", "process", "device") if name in closing]
        assert order == sorted(order)
