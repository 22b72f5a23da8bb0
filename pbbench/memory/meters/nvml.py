"""GPU memory of this process and of the whole device as the driver sees it, sampled by a thread through NVML.

NVML keeps no peaks, so a thread reads it every few milliseconds while phases are open; the largest gap between two readings
is reported, because a peak may hide in it. Where the driver, a container, MIG, WSL or missing rights hide a figure, it is
None and a sentence says why. pynvml (the package nvidia-ml-py) is imported when the meter is made.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

INTERVAL_S = 0.01


@dataclass
class NvmlReading:
    """Largest and last readings of a phase. None comes with a reason."""

    process_bytes: int | None = None
    device_bytes: int | None = None
    process_reason: str | None = None
    device_reason: str | None = None
    closing_process_bytes: int | None = None
    closing_device_bytes: int | None = None
    """The sample that ``end`` took, for comparison with what torch holds at that moment."""
    samples: int = 0
    longest_gap_s: float = 0.0
    api: str | None = None
    last: float = field(default=0.0, repr=False)

    def add(self, process: int | None, device: int | None, now: float) -> None:
        """Fold in one sample taken at ``now`` seconds."""
        if process is not None:
            self.process_bytes = max(self.process_bytes or 0, process)
        if device is not None:
            self.device_bytes = max(self.device_bytes or 0, device)
        if self.samples:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last)
        self.samples += 1
        self.last = now


class NvmlMeter:
    """Samples one GPU between ``start`` and ``stop``; ``begin`` and ``end`` bracket phases, which may nest.

    device: a torch CUDA device; nvml: the pynvml module or a stand-in; cuda: torch.cuda or a stand-in;
    pid: the process to look for (its number as this process sees it); interval: seconds between samples.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        nvml: Any = None,
        cuda: Any = torch.cuda,
        pid: int | None = None,
        interval: float = INTERVAL_S,
    ) -> None:
        self.pid = pid if pid is not None else os.getpid()
        self.interval = interval
        self.process_reason: str | None = None
        self.device_reason: str | None = None
        self.api: str | None = None
        self._open: list[NvmlReading] = []
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._handle: Any = None
        self._initialised = False
        self.nvml: Any = nvml
        if nvml is None:
            try:
                import pynvml
            except ImportError:
                self._fail("pynvml cannot be imported; install nvidia-ml-py")
                return
            self.nvml = nvml = pynvml
        try:
            nvml.nvmlInit()
            self._initialised = True
            self._handle = _physical_handle(nvml, device, cuda)
            self._check_mig()
        except (nvml.NVMLError, LookupError) as error:
            self._fail(self._why(error))

    def _fail(self, reason: str) -> None:
        self.process_reason = self.device_reason = reason
        self._handle = None

    def _why(self, error: Exception) -> str:
        nvml = self.nvml
        if isinstance(error, nvml.NVMLError):
            if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
                return "no NVIDIA driver library (libnvidia-ml) on this machine"
            if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
                return "the NVIDIA driver is not loaded"
            if error.value == nvml.NVML_ERROR_NO_PERMISSION:
                return "NVML refuses it: no permission for this user or container"
            if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
                return "NVML does not support it under WSL" if _under_wsl() else "NVML does not support it on this device"
        return f"NVML: {' '.join(str(error).split())}"

    def _check_mig(self) -> None:
        nvml = self.nvml
        try:
            enabled = nvml.nvmlDeviceGetMigMode(self._handle)[0]
            is_slice = bool(nvml.nvmlDeviceIsMigDeviceHandle(self._handle))
        except nvml.NVMLError:
            return  # a device that knows no MIG
        if enabled and not is_slice:
            self._fail("MIG is enabled and the slice cannot be told from the GPU: its readings would be of all slices together")

    def start(self) -> None:
        """Start the sampling thread, so that it runs before the first phase does. No thread where nothing can be read."""
        if self._handle is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pbbench-nvml", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the thread and let go of NVML; twice is once."""
        self._halt.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._initialised:
            self._initialised = False
            self._handle = None
            self.nvml.nvmlShutdown()

    def begin(self) -> NvmlReading:
        reading = NvmlReading()
        with self._lock:
            self._open.append(reading)
        self._sample()
        return reading

    def end(self, reading: NvmlReading) -> NvmlReading:
        """Take the closing sample, which the thread's own cannot replace, and complete the reading."""
        reading.closing_process_bytes, reading.closing_device_bytes = self._sample()
        with self._lock:
            self._open = [other for other in self._open if other is not reading]
        reading.api = self.api
        if reading.closing_process_bytes is None:
            reading.process_reason = self.process_reason
        if reading.closing_device_bytes is None:
            reading.device_reason = self.device_reason
        return reading

    def energy_millijoules(self) -> tuple[int | None, str | None]:
        """(what the whole GPU has used since its driver was loaded, None), or (None, why that is not known)."""
        if self._handle is None:
            return None, self.device_reason or "NVML's meter was stopped"
        try:
            return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)), None
        except self.nvml.NVMLError as error:
            return None, self._why(error)

    def _run(self) -> None:
        while not self._halt.wait(self.interval):
            if self._open:
                self._sample()

    def _sample(self) -> tuple[int | None, int | None]:
        if self._handle is None:
            return None, None
        process, device = self._read_process(), self._read_device()
        with self._lock:
            now = time.perf_counter()
            for reading in self._open:
                reading.add(process, device, now)
        return process, device

    def _read_device(self) -> int | None:
        try:
            return int(self.nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self.nvml.NVMLError as error:
            self.device_reason = self._why(error)
            return None

    def _read_process(self) -> int | None:
        nvml, error = self.nvml, None
        for name in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"):
            try:
                processes = getattr(nvml, name)(self._handle)
            except AttributeError:
                continue
            except nvml.NVMLError as failure:
                error = failure
                if failure.value == nvml.NVML_ERROR_FUNCTION_NOT_FOUND:  # an older driver
                    continue
                break
            self.api = name
            return self._own_share(processes)
        self.process_reason = self._why(error) if error is not None else "this pynvml lists no processes"
        return None

    def _own_share(self, processes: list[Any]) -> int | None:
        own = [process.usedGpuMemory for process in processes if process.pid == self.pid]
        if not own:
            listed = f"it lists {len(processes)} others; " if processes else ""
            self.process_reason = f"NVML does not list process {self.pid} ({listed}a container's processes have other numbers)"
            return None
        if not all(own):  # None (WDDM, virtual GPUs) or 0, which no process with a CUDA context holds
            self.process_reason = "NVML lists the process without its memory (a container, WSL, WDDM or a virtual GPU)"
            return None
        return int(sum(own))


def _physical_handle(nvml: Any, device: torch.device, cuda: Any) -> Any:
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
