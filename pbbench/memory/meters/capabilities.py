"""What the meters can read on this machine, found out by reading: run as a fresh process, ``python -m
pbbench.memory.meters.capabilities DEVICE`` prints JSON, so that the process that asks never touches CUDA.

On a GPU it makes a context first, as a measured step does, because only then can NVML list the process. Every figure that
cannot be read is null, and the field of the same name with ``_reason`` says why.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from pbbench.errors import one_line
from pbbench.memory.meters.host import HostPeak
from pbbench.memory.meters.nvml import Nvml, physical_handle


def host_capabilities(proc: Path = Path("/proc/self")) -> dict[str, Any]:
    """Whether a phase's own resident peak can be had."""
    meter = HostPeak(proc)
    meter.begin()
    return _figure_or_reason("rss", meter.end()["peak_rss_bytes"])


def driver_capabilities(nvml: Any = None) -> dict[str, Any]:
    """The driver and the GPUs it lists, whether torch can use them or not."""
    found: dict[str, Any] = {"driver": None, "driver_reason": None, "driver_cuda": None, "gpus": []}
    with _opened(nvml) as (nvml, why):
        if why is not None:
            return found | {"driver_reason": why}
        version, _ = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
        count, _ = _ask(nvml, nvml.nvmlDeviceGetCount)
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count or 0)]
        found["driver"], found["driver_reason"] = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
        found["driver_cuda"] = f"{version // 1000}.{version % 1000 // 10}" if version else None
        return found | {"gpus": [_ask(nvml, nvml.nvmlDeviceGetName, handle)[0] or "a GPU" for handle in handles]}


def gpu_capabilities(
    device: torch.device, *, cuda: Any = torch.cuda, nvml: Any = None, pid: int | None = None
) -> dict[str, Any]:
    """What NVML tells of one GPU that torch uses: this process's memory, the device's, MIG, energy, other processes."""
    with closing(Nvml(device, nvml=nvml, cuda=cuda, pid=pid)) as gpu:
        held = gpu.memory()
    found = {**_figure_or_reason("process", held["process"]), **_figure_or_reason("device", held["device"]), "api": gpu.api}
    found |= {"mig": None, "energy_mj": None, "energy_reason": None, "others": None, "itself_listed": False}
    with _opened(nvml) as (nvml, why):
        if why is not None:
            return found | {"energy_reason": why}
        try:
            handle = physical_handle(nvml, device, cuda)
        except (nvml.NVMLError, LookupError) as error:
            return found | {"energy_reason": one_line(error)}
        mig, _ = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
        found["mig"] = None if mig is None else bool(mig[0])
        found["energy_mj"], found["energy_reason"] = _ask(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        listed, _ = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
        if listed is not None:
            found["others"] = sum(process.pid != gpu.pid for process in listed)
            found["itself_listed"] = found["others"] < len(listed)
    return found


def _figure_or_reason(name: str, figure: int | str) -> dict[str, Any]:
    known = isinstance(figure, int)
    return {f"{name}_bytes": figure if known else None, f"{name}_reason": None if known else figure}


@contextmanager
def _opened(nvml: Any) -> Iterator[tuple[Any, str | None]]:
    """(the library, None), or (the library, why it does not open)."""
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield nvml, f"NVML: {one_line(error)}"
        return
    try:
        yield nvml, None
    finally:
        nvml.nvmlShutdown()


def _ask(nvml: Any, question: Callable[..., Any], *about: Any) -> tuple[Any, str | None]:
    """(answer, None), or (None, why there is none)."""
    try:
        return question(*about), None
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
