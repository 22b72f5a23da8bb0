"""A CUDA device and an NVML library that exist only here, so that the meters are tested where there is no GPU."""

from types import SimpleNamespace
from typing import Any

import torch

UUID = "8932f937-d72c-4106-c12f-20bd9faed9f6"


class FakeCuda:
    """torch.cuda's functions over one device whose bytes the test moves with ``allocate`` and ``free``."""

    def __init__(self, *, reserve_ahead: int = 0, uuid: str | None = UUID) -> None:
        self.reserve_ahead = reserve_ahead
        self.now = {"requested": 0, "allocated": 0, "active": 0, "reserved": 0}
        self.peak = dict(self.now)
        self.retries = 0
        self.calls: list[str] = []
        self.broken = False
        self.properties = SimpleNamespace() if uuid is None else SimpleNamespace(uuid=uuid)

    def allocate(self, nbytes: int) -> None:
        block = -(-nbytes // 512) * 512
        self.now["requested"] += nbytes
        self.now["allocated"] += block
        self.now["active"] += block
        self.now["reserved"] = max(self.now["reserved"], self.now["allocated"] + self.reserve_ahead)
        self.peak = {name: max(self.peak[name], self.now[name]) for name in self.now}

    def free(self, nbytes: int) -> None:
        block = -(-nbytes // 512) * 512
        self.now["requested"] -= nbytes
        self.now["allocated"] -= block
        self.now["active"] -= block

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        self._fail_if_broken()
        stats = {f"{name}_bytes.all.current": value for name, value in self.now.items()}
        stats |= {f"{name}_bytes.all.peak": value for name, value in self.peak.items()}
        return {**stats, "num_alloc_retries": self.retries}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.calls.append("reset")
        self.peak = dict(self.now)

    def synchronize(self, device: Any = None) -> None:
        self.calls.append("synchronize")
        self._fail_if_broken()

    def _fail_if_broken(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return self.properties

    def current_device(self) -> int:
        return 0

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True


class FakeNvml:
    """pynvml's functions over one GPU. ``failures`` maps a function's name to the error value it raises."""

    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_ERROR_GPU_IS_LOST = 15

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(f"error {value}")
            self.value = value

    def __init__(self, processes: list[tuple[int, int | None]], used: int = 10 * 2**30, **failures: int) -> None:
        self.processes = processes
        self.used = used
        self.failures = failures
        self.mig = 0
        self.is_slice = 0
        self.uuids = {f"GPU-{UUID}"}
        self.opened = 0
        self.asked_for: Any = None
        self.millijoules = 1_000_000

    def _may_fail(self, name: str) -> None:
        if name in self.failures:
            raise self.NVMLError(self.failures[name])

    def nvmlInit(self) -> None:  # noqa: N802
        self._may_fail("nvmlInit")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.uuids:
            raise self.NVMLError(self.NVML_ERROR_NOT_FOUND)
        self.asked_for = uuid
        return "gpu"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self.asked_for = index
        return "gpu"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:  # noqa: N802
        self._may_fail("nvmlDeviceGetMigMode")
        return [self.mig, self.mig]

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> int:  # noqa: N802
        return self.is_slice

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        self._may_fail("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self._may_fail("nvmlDeviceGetTotalEnergyConsumption")
        return self.millijoules

    def _list(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        self._may_fail("nvmlDeviceGetComputeRunningProcesses_v3")
        return self._list()

    def nvmlDeviceGetComputeRunningProcesses_v2(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        self._may_fail("nvmlDeviceGetComputeRunningProcesses_v2")
        return self._list()


CUDA = torch.device("cuda", 0)
