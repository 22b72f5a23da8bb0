"""What an error says of memory that ran out, taken apart; other errors are told from it."""

import pytest
import torch
from fake_devices import FakeCuda

from pbbench.memory.meters.outcome import describe_out_of_memory
from pbbench.memory.meters.phases import Meter

MiB = 2**20
GiB = 2**30
MESSAGE = (
    "CUDA out of memory. Tried to allocate 1.25 GiB. GPU 1 has a total capacity of 93.02 GiB of which 1.18 GiB is free. "
    "Including non-PyTorch memory, this process has 91.82 GiB memory in use. 80.00 GiB allowed; Of the allocated memory "
    "90.50 GiB is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def test_out_of_memory_in_torchs_allocator_is_taken_apart() -> None:
    cuda = FakeCuda()
    cuda.retries = 3
    found = describe_out_of_memory(torch.OutOfMemoryError(MESSAGE), cuda)
    assert found.pop("message") == MESSAGE
    assert found == {
        "source": "allocator",
        "requested": 5 * GiB // 4,
        "capacity": round(93.02 * GiB),
        "free": round(1.18 * GiB),
        "process": round(91.82 * GiB),
        "allowed": 80 * GiB,
        "allocated": round(90.5 * GiB),
        "reserved": round(90.5 * GiB) + 512 * MiB,
        "retries": 3,
    }


@pytest.mark.parametrize(
    ("error", "source", "requested"),
    [
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "cuda", None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "library", None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "library", None),
        (MemoryError(), "host", None),
    ],
)
def test_out_of_memory_elsewhere_is_told_apart(error: BaseException, source: str, requested: int | None) -> None:
    found = describe_out_of_memory(error, FakeCuda())
    assert (found["source"], found["requested"]) == (source, requested)


def test_out_of_host_memory_as_torch_reports_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52, dtype=torch.uint8)
    found = describe_out_of_memory(caught.value)
    assert (found["source"], found["requested"], found["retries"]) == ("host", 2**52, None)


def test_out_of_memory_is_found_behind_another_error() -> None:
    outer = ValueError("the batch failed")
    outer.__cause__ = KeyError("step")
    outer.__cause__.__context__ = torch.OutOfMemoryError(MESSAGE)
    assert describe_out_of_memory(outer, FakeCuda())["source"] == "allocator"


def test_other_errors_are_not_out_of_memory() -> None:
    assert describe_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    looped = ValueError("itself")
    looped.__cause__ = looped
    assert describe_out_of_memory(looped) is None


@pytest.mark.cuda
def test_real_cuda_out_of_memory() -> None:
    capacity = torch.cuda.get_device_properties(0).total_memory
    with Meter("cuda") as meter, pytest.raises(torch.OutOfMemoryError) as caught, meter.phase("step") as reading:
        torch.empty(2 * capacity, dtype=torch.uint8, device="cuda")
    found = describe_out_of_memory(caught.value)
    assert found["source"] == "allocator"
    assert found["requested"] == pytest.approx(2 * capacity, rel=0.01)
    assert found["capacity"] == pytest.approx(capacity, rel=0.05)
    assert reading.peak_allocated_bytes is not None
