"""NVML's figures, and the sentence that stands in for each figure it hides."""

import os
import time
from typing import Any

import pytest
import torch
from fake_devices import CUDA, UUID, FakeCuda, FakeNvml

from pbbench.memory.meters.driver import DriverPeaks, Sampler
from pbbench.memory.meters.nvml import Nvml

MiB = 2**20


def measure(nvml: FakeNvml, cuda: FakeCuda | None = None, pid: int = 7) -> tuple[int | str, int | str, DriverPeaks]:
    """(the process's bytes, the device's, the phase); text where one is not known."""
    sampler = Sampler(Nvml(CUDA, nvml=nvml, cuda=cuda or FakeCuda(), pid=pid))
    sampler.start()
    try:
        phase, found = a_phase(sampler)
        return found["peak_process_bytes"], found["peak_device_bytes"], phase
    finally:
        sampler.stop()


def a_phase(sampler: Sampler) -> tuple[DriverPeaks, dict[str, Any]]:
    phase = DriverPeaks(sampler)
    phase.begin()
    return phase, phase.end()


def test_own_process_and_whole_device() -> None:
    nvml = FakeNvml([(5, 100 * MiB), (7, 300 * MiB)], used=500 * MiB)
    process, device, phase = measure(nvml)
    assert (process, device) == (300 * MiB, 500 * MiB)
    assert phase.sampler.gpu.api == "nvmlDeviceGetComputeRunningProcesses_v3"
    assert nvml.asked_for == f"GPU-{UUID}"
    assert nvml.opened == 0, "every nvmlInit needs its nvmlShutdown"


def test_a_peak_between_begin_and_end_is_sampled_by_the_thread() -> None:
    nvml = FakeNvml([(7, 100 * MiB)], used=200 * MiB)
    sampler = Sampler(Nvml(CUDA, nvml=nvml, cuda=FakeCuda(), pid=7), interval=0.001)
    sampler.start()
    outer = DriverPeaks(sampler)
    outer.begin()
    nvml.processes = [(7, 900 * MiB)]
    deadline = time.monotonic() + 10
    while outer.peaks["process"] != 900 * MiB and time.monotonic() < deadline:
        time.sleep(0.001)
    nvml.processes = [(7, 100 * MiB)]
    inner, of_inner = a_phase(sampler)
    of_outer = outer.end()
    sampler.stop()
    assert of_outer["peak_process_bytes"] == 900 * MiB
    assert of_inner["peak_process_bytes"] == 100 * MiB
    assert of_outer["closing"]["process"] == 100 * MiB
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
    process, device, phase = measure(FakeNvml([], nvmlInit=error))
    assert phase.samples == 0
    assert words in process
    assert words in device


def test_device_is_read_where_processes_are_refused() -> None:
    process, device, _ = measure(
        FakeNvml([(7, MiB)], used=9 * MiB, nvmlDeviceGetComputeRunningProcesses_v3=FakeNvml.NVML_ERROR_NO_PERMISSION)
    )
    assert "no permission" in process
    assert device == 9 * MiB


def test_process_is_read_where_the_device_is_not_supported() -> None:
    process, device, _ = measure(FakeNvml([(7, MiB)], nvmlDeviceGetMemoryInfo=FakeNvml.NVML_ERROR_NOT_SUPPORTED))
    assert process == MiB
    assert "not support" in device


def test_an_older_driver_is_asked_in_the_older_way() -> None:
    missing = FakeNvml.NVML_ERROR_FUNCTION_NOT_FOUND
    nvml = FakeNvml([(7, 3 * MiB)], nvmlDeviceGetComputeRunningProcesses_v3=missing)
    process, _, phase = measure(nvml)
    assert (process, phase.sampler.gpu.api) == (3 * MiB, "nvmlDeviceGetComputeRunningProcesses_v2")
    nvml.failures["nvmlDeviceGetComputeRunningProcesses_v2"] = missing
    process, _, phase = measure(nvml)
    assert phase.sampler.gpu.api is None
    assert process == "NVML: error 13"


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
    process, device, _ = measure(FakeNvml(processes))
    assert words in process
    assert isinstance(device, int)


def test_mig_without_the_slice_reads_nothing() -> None:
    nvml = FakeNvml([(7, MiB)])
    nvml.mig = 1
    process, device, _ = measure(nvml)
    assert process == device
    assert "MIG" in process
    nvml.uuids, nvml.is_slice = {f"MIG-{UUID}"}, 1
    assert measure(nvml)[0] == MiB
    assert nvml.asked_for == f"MIG-{UUID}"


def test_a_gpu_without_mig_is_read() -> None:
    assert measure(FakeNvml([(7, MiB)], nvmlDeviceGetMigMode=FakeNvml.NVML_ERROR_NOT_SUPPORTED))[0] == MiB


def test_the_physical_gpu_without_a_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([(7, MiB)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    measure(nvml, FakeCuda(uuid=None))
    assert nvml.asked_for == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    measure(nvml, FakeCuda(uuid=None))
    assert nvml.asked_for == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-89")
    assert "CUDA_VISIBLE_DEVICES=GPU-89" in measure(nvml, FakeCuda(uuid=None))[1]


def test_the_real_library_answers_or_says_why() -> None:
    """On a machine without a driver pynvml itself raises; the meter must not."""
    pytest.importorskip("pynvml")
    sampler = Sampler(Nvml(CUDA, cuda=FakeCuda(uuid=None)))
    sampler.start()
    _, found = a_phase(sampler)
    sampler.stop()
    sampler.stop()
    assert found["peak_device_bytes"]


@pytest.mark.cuda
def test_a_real_gpu_holds_what_was_put_on_it() -> None:
    torch.zeros(1, device="cuda")
    sampler = Sampler(Nvml(torch.device("cuda")))
    sampler.start()
    _, before = a_phase(sampler)
    block = torch.zeros(256 * MiB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    _, after = a_phase(sampler)
    sampler.stop()
    del block
    assert after["peak_device_bytes"] - before["peak_device_bytes"] >= 256 * MiB
    if isinstance(before["peak_process_bytes"], str):
        pytest.skip(f"NVML hides process {os.getpid()}: {before['peak_process_bytes']}")
    assert after["peak_process_bytes"] - before["peak_process_bytes"] == 256 * MiB
