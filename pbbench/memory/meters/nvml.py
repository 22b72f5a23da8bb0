"""One GPU as NVIDIA's driver sees it: this process's memory, the whole device's, and the energy it has used.

Where the driver, a container, MIG, WSL or missing rights hide a figure, a sentence stands in its place. pynvml (the package
nvidia-ml-py) is imported when a GPU is opened.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pbbench.errors import one_line


class Nvml:
    """NVML, opened for one torch CUDA device. Every reading is a number, or text that says why there is none.

    nvml: the pynvml module or a stand-in; cuda: torch.cuda or a stand-in; pid: the process to look for (its number as this
    process sees it).
    """

    def __init__(self, device: torch.device, *, nvml: Any = None, cuda: Any = torch.cuda, pid: int | None = None) -> None:
        self.pid = pid if pid is not None else os.getpid()
        self.api: str | None = None
        """The function that listed the processes."""
        self.hidden: str | None = None
        """Why nothing can be read."""
        self._handle: Any = None
        self._initialised = False
        self._nvml = nvml
        if nvml is None:
            try:
                import pynvml
            except ImportError:
                self.hidden = "pynvml cannot be imported; install nvidia-ml-py"
                return
            self._nvml = nvml = pynvml
        try:
            nvml.nvmlInit()
            self._initialised = True
            handle = physical_handle(nvml, device, cuda)
        except (nvml.NVMLError, LookupError) as error:
            self.hidden = self._why(error)
            return
        if self._is_divided(handle):
            self.hidden = (
                "MIG is enabled and the slice cannot be told from the GPU: its readings would be of all slices together"
            )
        else:
            self._handle = handle

    @property
    def readable(self) -> bool:
        return self._handle is not None

    def close(self) -> None:
        """Let go of NVML; twice is once."""
        self._handle = None
        if self._initialised:
            self._initialised = False
            self._nvml.nvmlShutdown()

    def memory(self) -> dict[str, int | str]:
        """Bytes of the process and of the whole device."""
        if self._handle is None:
            return dict.fromkeys(("process", "device"), self.hidden or "no sample was taken")
        return {"process": self._process_bytes(), "device": self._device_bytes()}

    def energy_millijoules(self) -> int | str:
        """What the whole GPU has used since its driver was loaded."""
        if self._handle is None:
            return self.hidden or "NVML's meter was stopped"
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError as error:
            return self._why(error)

    def _device_bytes(self) -> int | str:
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError as error:
            return self._why(error)

    def _process_bytes(self) -> int | str:
        why = "this pynvml lists no processes"
        for name in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"):
            try:
                processes = getattr(self._nvml, name)(self._handle)
            except AttributeError:
                continue
            except self._nvml.NVMLError as error:
                why = self._why(error)
                if error.value == self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND:  # an older driver
                    continue
                break
            self.api = name
            return self._own_share(processes)
        return why

    def _own_share(self, processes: list[Any]) -> int | str:
        own = [process.usedGpuMemory for process in processes if process.pid == self.pid]
        if not own:
            listed = f"it lists {len(processes)} others; " if processes else ""
            return f"NVML does not list process {self.pid} ({listed}a container's processes have other numbers)"
        if not all(own):  # None (WDDM, virtual GPUs) or 0, which no process with a CUDA context holds
            return "NVML lists the process without its memory (a container, WSL, WDDM or a virtual GPU)"
        return int(sum(own))

    def _is_divided(self, handle: Any) -> bool:
        """Whether the handle is that of a GPU in slices, and not of one of them."""
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(handle)[0]) and not self._nvml.nvmlDeviceIsMigDeviceHandle(handle)
        except self._nvml.NVMLError:
            return False  # a device that knows no MIG

    def _why(self, error: Exception) -> str:
        nvml, unsupported = self._nvml, "under WSL" if _under_wsl() else "on this device"
        told = {
            nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver library (libnvidia-ml) on this machine",
            nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
            nvml.NVML_ERROR_NO_PERMISSION: "NVML refuses it: no permission for this user or container",
            nvml.NVML_ERROR_NOT_SUPPORTED: f"NVML does not support it {unsupported}",
        }
        return told.get(getattr(error, "value", None), f"NVML: {one_line(error)}")


def physical_handle(nvml: Any, device: torch.device, cuda: Any) -> Any:
    """NVML's handle of a torch device. NVML counts all GPUs by PCI bus; torch counts the visible ones, fastest first."""
    index = device.index if device.index is not None else cuda.current_device()
    properties = cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        name = str(uuid)
        for candidate in (name,) if name.startswith(("GPU-", "MIG-")) else (f"GPU-{name}", f"MIG-{name}"):
            try:
                return nvml.nvmlDeviceGetHandleByUUID(candidate)
            except nvml.NVMLError as error:
                if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
                    raise
    return nvml.nvmlDeviceGetHandleByIndex(_physical_index(index, os.environ))


def _physical_index(index: int, environment: Any) -> int:
    """Position of a torch device among all GPUs by CUDA_VISIBLE_DEVICES; LookupError where that cannot be known."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return index
    entries = [entry.strip() for entry in visible.split(",")]
    if index >= len(entries) or not entries[index].isdigit():
        raise LookupError(f"cannot tell which GPU device {index} of CUDA_VISIBLE_DEVICES={visible} is")
    return int(entries[index])


def _under_wsl() -> bool:
    try:
        return "microsoft" in Path("/proc/version").read_text().lower()
    except OSError:
        return False
