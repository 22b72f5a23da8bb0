"""What the meters can read on this machine, found out by reading: run as a fresh process, ``python -m
pbbench.memory.meters.capabilities DEVICE`` prints JSON, so that the process that asks never touches CUDA.

On a GPU it makes a context first, as a measured step does, because only then can NVML list the process. Every figure that
cannot be read is null, and the field of the same name with ``_reason`` says why.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pbbench.errors import one_line
from pbbench.memory.meters.host import HostPeak
from pbbench.memory.meters.nvml import NvmlMeter, _physical_handle


def host_capabilities(proc: Path = Path("/proc/self")) -> dict[str, Any]:
    """Whether a phase's own resident peak can be had."""
    meter = HostPeak(proc)
    meter.begin()
    peak, reason = meter.end()
    return {"rss_bytes": peak, "rss_reason": reason}


def driver_capabilities(nvml: Any = None) -> dict[str, Any]:
    """The driver and the GPUs it lists, whether torch can use them or not."""
    nvml = _library(nvml)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return {"driver": None, "driver_reason": f"NVML: {one_line(error)}", "driver_cuda": None, "gpus": []}
    try:
        version, _ = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
        count, _ = _ask(nvml, nvml.nvmlDeviceGetCount)
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count or 0)]
        driver, reason = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
        return {
            "driver": driver,
            "driver_reason": reason,
            "driver_cuda": f"{version // 1000}.{version % 1000 // 10}" if version else None,
            "gpus": [_ask(nvml, partial(nvml.nvmlDeviceGetName, handle))[0] or "a GPU" for handle in handles],
        }
    finally:
        nvml.nvmlShutdown()


def gpu_capabilities(
    device: torch.device, *, cuda: Any = torch.cuda, nvml: Any = None, pid: int | None = None
) -> dict[str, Any]:
    """What NVML tells of one GPU that torch uses: this process's memory, the device's, MIG, energy, other processes."""
    found = _memory_readings(device, cuda, nvml, pid)
    found |= {"mig": None, "energy_mj": None, "energy_reason": None, "others": None, "itself_listed": False}
    nvml = _library(nvml)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return found | {"energy_reason": f"NVML: {one_line(error)}"}
    try:
        handle = _physical_handle(nvml, device, cuda)
        mig, _ = _ask(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
        found["mig"] = None if mig is None else bool(mig)
        found["energy_mj"], found["energy_reason"] = _ask(nvml, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        listed, _ = _ask(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle))
        if listed is not None:
            own = pid if pid is not None else os.getpid()
            found["others"] = sum(process.pid != own for process in listed)
            found["itself_listed"] = found["others"] < len(listed)
    except (nvml.NVMLError, LookupError) as error:
        found["energy_reason"] = one_line(error)
    finally:
        nvml.nvmlShutdown()
    return found


def _memory_readings(device: torch.device, cuda: Any, nvml: Any, pid: int | None) -> dict[str, Any]:
    meter = NvmlMeter(device, nvml=nvml, cuda=cuda, pid=pid)
    try:
        reading = meter.end(meter.begin())
    finally:
        meter.stop()
    return {
        "process_bytes": reading.process_bytes,
        "process_reason": reading.process_reason,
        "device_bytes": reading.device_bytes,
        "device_reason": reading.device_reason,
        "api": reading.api,
    }


def _library(nvml: Any) -> Any:
    if nvml is None:
        import pynvml

        return pynvml
    return nvml


def _ask(nvml: Any, question: Callable[[], Any]) -> tuple[Any, str | None]:
    """(answer, None), or (None, why there is none)."""
    try:
        return question(), None
    except nvml.NVMLError as error:
        return None, f"NVML: {one_line(error)}"


def main() -> None:
    found: dict[str, Any] = {**host_capabilities(), **driver_capabilities(), "gpu_error": None}
    if sys.argv[1] == "cuda":
        try:
            torch.ones(1, device="cuda").sum().item()
            total = torch.cuda.get_device_properties(0).total_memory
            found |= {"gpu_free_bytes": torch.cuda.mem_get_info()[0], "gpu_total_bytes": total}
            found |= {"gpu_count": torch.cuda.device_count()} | gpu_capabilities(torch.device("cuda", 0))
        except RuntimeError as error:
            found["gpu_error"] = one_line(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
