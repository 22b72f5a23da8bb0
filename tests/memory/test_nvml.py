"""NVML's figures, and the sentence that stands in for each figure it hides."""

import os
import time

import pytest
import torch
from fake_devices import CUDA, UUID, FakeCuda, FakeNvml

from pbbench.memory.meters.nvml import NvmlMeter

MiB = 2**20


def measure(nvml: FakeNvml, cuda: FakeCuda | None = None, pid: int = 7):
    meter = NvmlMeter(CUDA, nvml=nvml, cuda=cuda or FakeCuda(), pid=pid)
    meter.start()
    try:
        return meter.end(meter.begin())
    finally:
        meter.stop()


def test_own_process_and_whole_device() -> None:
    nvml = FakeNvml([(5, 100 * MiB), (7, 300 * MiB)], used=500 * MiB)
    reading = measure(nvml)
    assert (reading.process_bytes, reading.device_bytes) == (300 * MiB, 500 * MiB)
    assert (reading.process_reason, reading.device_reason) == (None, None)
    assert reading.api == "nvmlDeviceGetComputeRunningProcesses_v3"
    assert nvml.asked_for == f"GPU-{UUID}"
    assert nvml.opened == 0, "every nvmlInit needs its nvmlShutdown"


def test_a_peak_between_begin_and_end_is_sampled_by_the_thread() -> None:
    nvml = FakeNvml([(7, 100 * MiB)], used=200 * MiB)
    meter = NvmlMeter(CUDA, nvml=nvml, cuda=FakeCuda(), pid=7, interval=0.001)
    meter.start()
    outer = meter.begin()
    nvml.processes = [(7, 900 * MiB)]
    deadline = time.monotonic() + 10
    while outer.process_bytes != 900 * MiB and time.monotonic() < deadline:
        time.sleep(0.001)
    nvml.processes = [(7, 100 * MiB)]
    inner = meter.begin()
    meter.end(inner)
    meter.end(outer)
    meter.stop()
    assert outer.process_bytes == 900 * MiB
    assert inner.process_bytes == 100 * MiB
    assert outer.closing_process_bytes == 100 * MiB
    assert outer.samples > inner.samples >= 2
    assert outer.longest_gap_s > 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver library"),
        (FakeNvml.NVML_ERROR_DRIVER_NOT_LOADED, "driver is not loaded"),
        (FakeNvml.NVML_ERROR_NO_PERMISSION, "no permission"),
        (FakeNvml.NVML_ERROR_GPU_IS_LOST, "error 15"),
    ],
)
def test_nothing_is_read_where_nvml_does_not_open(error: int, words: str) -> None:
    reading = measure(FakeNvml([], nvmlInit=error))
    assert (reading.process_bytes, reading.device_bytes, reading.samples) == (None, None, 0)
    assert words in reading.process_reason
    assert words in reading.device_reason


def test_device_is_read_where_processes_are_refused() -> None:
    reading = measure(
        FakeNvml([(7, MiB)], used=9 * MiB, nvmlDeviceGetComputeRunningProcesses_v3=FakeNvml.NVML_ERROR_NO_PERMISSION)
    )
    assert reading.process_bytes is None
    assert "no permission" in reading.process_reason
    assert (reading.device_bytes, reading.device_reason) == (9 * MiB, None)


def test_process_is_read_where_the_device_is_not_supported() -> None:
    reading = measure(FakeNvml([(7, MiB)], nvmlDeviceGetMemoryInfo=FakeNvml.NVML_ERROR_NOT_SUPPORTED))
    assert (reading.process_bytes, reading.process_reason) == (MiB, None)
    assert reading.device_bytes is None
    assert "not support" in reading.device_reason


def test_an_older_driver_is_asked_in_the_older_way() -> None:
    missing = FakeNvml.NVML_ERROR_FUNCTION_NOT_FOUND
    nvml = FakeNvml([(7, 3 * MiB)], nvmlDeviceGetComputeRunningProcesses_v3=missing)
    reading = measure(nvml)
    assert (reading.process_bytes, reading.api) == (3 * MiB, "nvmlDeviceGetComputeRunningProcesses_v2")
    nvml.failures["nvmlDeviceGetComputeRunningProcesses_v2"] = missing
    reading = measure(nvml)
    assert (reading.process_bytes, reading.api) == (None, None)
    assert reading.process_reason


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        ([], "does not list process 7"),
        ([(40, MiB), (41, MiB)], "lists 2 others"),
        ([(7, None)], "without its memory"),
        ([(7, 0)], "without its memory"),
    ],
)
def test_a_hidden_process_is_unknown_not_zero(processes: list[tuple[int, int | None]], words: str) -> None:
    reading = measure(FakeNvml(processes))
    assert reading.process_bytes is None
    assert words in reading.process_reason
    assert reading.device_bytes is not None


def test_mig_without_the_slice_reads_nothing() -> None:
    nvml = FakeNvml([(7, MiB)])
    nvml.mig = 1
    reading = measure(nvml)
    assert (reading.process_bytes, reading.device_bytes) == (None, None)
    assert "MIG" in reading.process_reason
    nvml.uuids, nvml.is_slice = {f"MIG-{UUID}"}, 1
    reading = measure(nvml)
    assert reading.process_bytes == MiB
    assert nvml.asked_for == f"MIG-{UUID}"


def test_a_gpu_without_mig_is_read() -> None:
    assert measure(FakeNvml([(7, MiB)], nvmlDeviceGetMigMode=FakeNvml.NVML_ERROR_NOT_SUPPORTED)).process_bytes == MiB


def test_the_physical_gpu_without_a_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([(7, MiB)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    measure(nvml, FakeCuda(uuid=None))
    assert nvml.asked_for == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    measure(nvml, FakeCuda(uuid=None))
    assert nvml.asked_for == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-89")
    reading = measure(nvml, FakeCuda(uuid=None))
    assert reading.device_bytes is None
    assert "CUDA_VISIBLE_DEVICES=GPU-89" in reading.device_reason


def test_the_real_library_answers_or_says_why() -> None:
    """On a machine without a driver pynvml itself raises; the meter must not."""
    pytest.importorskip("pynvml")
    meter = NvmlMeter(CUDA, cuda=FakeCuda(uuid=None))
    meter.start()
    reading = meter.end(meter.begin())
    meter.stop()
    meter.stop()
    assert (reading.device_bytes is None) == (reading.device_reason is not None)


@pytest.mark.cuda
def test_a_real_gpu_holds_what_was_put_on_it() -> None:
    torch.zeros(1, device="cuda")
    meter = NvmlMeter(torch.device("cuda"))
    meter.start()
    before = meter.end(meter.begin())
    block = torch.zeros(256 * MiB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    after = meter.end(meter.begin())
    meter.stop()
    del block
    assert after.device_bytes - before.device_bytes >= 256 * MiB
    if before.process_bytes is None:
        assert before.process_reason
        pytest.skip(f"NVML hides process {os.getpid()}: {before.process_reason}")
    assert after.process_bytes - before.process_bytes == 256 * MiB
