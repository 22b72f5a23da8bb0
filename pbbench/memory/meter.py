"""One measured phase: every meter the device has, read around a block of code.

    with Meter(torch.device("cuda")) as meter:
        step()                                   # warm up
        with meter.phase("train_step") as reading:
            step()
    print(reading.peak_allocated_bytes, reading.reasons)

The order is: synchronise, reset, run, synchronise, read; the reading is completed in ``finally``, so a phase that fails
still reports. Phases nest: an inner reset folds into the outer peak. What cannot be read is None, with a reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pbbench.errors import one_line
from pbbench.memory.cuda import CudaPeaks
from pbbench.memory.host import HostPeak
from pbbench.memory.nvml import NvmlMeter


@dataclass
class Reading:
    """What one phase took. Bytes are integers; None has its reason in ``reasons`` (field → why)."""

    name: str
    peak_allocated_bytes: int | None = None
    """torch.cuda's caching allocator: blocks handed out."""
    peak_reserved_bytes: int | None = None
    """The same with the allocator's cache: what torch holds of the GPU."""
    peak_process_bytes: int | None = None
    """NVML: the process, with the CUDA context and libraries."""
    peak_device_bytes: int | None = None
    """NVML: the whole GPU, other processes included."""
    peak_rss_bytes: int | None = None
    """The process's resident memory in host RAM."""
    seconds: float | None = None
    """Wall time between the two synchronisations."""
    reasons: dict[str, str] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    """What stands beside the peaks: on CUDA the peaks of requested and active bytes and the allocator's retries; from NVML the
    function used, the number of samples and the longest gap between two (seconds)."""


class Meter:
    """The meters of one device. Use it as a context manager (or call ``close``), so that NVML's thread ends.

    cuda, nvml: stand-ins for torch.cuda and pynvml, for tests.
    """

    def __init__(self, device: torch.device | str, *, cuda: Any = torch.cuda, nvml: Any = None) -> None:
        self.device = torch.device(device)
        self._cuda = cuda
        self._nvml: NvmlMeter | None = None
        if self.device.type == "cuda":
            self._nvml = NvmlMeter(self.device, cuda=cuda, nvml=nvml)
            self._nvml.start()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End NVML's thread. Phases measured afterwards have no NVML reading."""
        if self._nvml is not None:
            self._nvml.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[Reading]:
        """Measure the block. The reading is complete when the block has ended, also by an exception, which passes through."""
        reading = Reading(name)
        finish: list[Callable[[], None]] = [self._host(reading)]
        if self.device.type == "cuda":
            finish += [self._driver(reading), self._allocator(reading)]
        else:
            for column in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes", "peak_device_bytes"):
                reading.reasons[column] = f"read on CUDA devices only; this phase ran on {self.device.type}"
        start = time.perf_counter()
        try:
            yield reading
        finally:
            self._synchronise(reading)
            reading.seconds = time.perf_counter() - start
            for read in reversed(finish):
                read()

    def _synchronise(self, reading: Reading) -> None:
        if self.device.type != "cuda":
            return
        try:
            self._cuda.synchronize(self.device)
        except RuntimeError as error:  # after a CUDA error every later call fails; the block's own exception says why
            reading.ledger["synchronise"] = one_line(error)

    def _allocator(self, reading: Reading) -> Callable[[], None]:
        peaks = CudaPeaks(self.device, self._cuda)
        peaks.begin()

        def read() -> None:
            try:
                found: dict[str, int] = peaks.end()
            except RuntimeError as error:
                found, why = {}, f"torch.cuda.memory_stats failed: {one_line(error)}"
            else:
                why = "this allocator backend does not report it"
            reading.peak_allocated_bytes = found.pop("peak_allocated_bytes", None)
            reading.peak_reserved_bytes = found.pop("peak_reserved_bytes", None)
            reading.ledger.update(found)
            for column in ("peak_allocated_bytes", "peak_reserved_bytes"):
                if getattr(reading, column) is None:
                    reading.reasons[column] = why

        return read

    def _driver(self, reading: Reading) -> Callable[[], None]:
        assert self._nvml is not None
        meter = self._nvml
        begun = meter.begin()

        def read() -> None:
            found = meter.end(begun)
            reading.peak_process_bytes, reading.peak_device_bytes = found.process_bytes, found.device_bytes
            if found.process_bytes is None:
                reading.reasons["peak_process_bytes"] = found.process_reason or "no sample was taken"
            if found.device_bytes is None:
                reading.reasons["peak_device_bytes"] = found.device_reason or "no sample was taken"
            if found.samples:
                reading.ledger["nvml"] = {
                    "api": found.api,
                    "samples": found.samples,
                    "longest_gap_s": round(found.longest_gap_s, 4),
                }

        return read

    def _host(self, reading: Reading) -> Callable[[], None]:
        peak = HostPeak()
        peak.begin()

        def read() -> None:
            reading.peak_rss_bytes, why = peak.end()
            if why is not None:
                reading.reasons["peak_rss_bytes"] = why

        return read
