"""Peaks of torch's CUDA caching allocator over a phase, and what is known when it runs out of memory.

``torch.cuda.reset_peak_memory_stats`` is global to a device: whoever resets inside someone else's measurement destroys
the outer peak. Here every reset first folds the peaks so far into all phases that are open on that device.
The ``cuda`` argument is ``torch.cuda`` or anything with its functions (the tests bring their own).
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import torch

PEAKS = {
    "peak_allocated_bytes": "allocated_bytes.all.peak",
    "peak_reserved_bytes": "reserved_bytes.all.peak",
    "peak_requested_bytes": "requested_bytes.all.peak",
    "peak_active_bytes": "active_bytes.all.peak",
}
"""Reading → key of torch.cuda.memory_stats. Allocated is requested rounded up to whole blocks; active adds freed blocks
that another stream may still use; reserved adds the cache."""
CLOSING = {
    "requested": "requested_bytes.all.current",
    "allocated": "allocated_bytes.all.current",
    "reserved": "reserved_bytes.all.current",
}
RETRIES = "num_alloc_retries"


class CudaPeaks:
    """The allocator's peaks on one device between ``begin`` and ``end``; instances nest in any order of devices."""

    _open: list[CudaPeaks] = []  # noqa: RUF012 (shared on purpose: the statistics they guard are global too)

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device = device
        self.cuda = cuda
        self.peaks: dict[str, int] = {}
        self._retries = 0

    def begin(self) -> None:
        """Wait for the device, fold the peaks so far into the phases around this one, and start from what is held now."""
        self.cuda.synchronize(self.device)
        stats = self.cuda.memory_stats(self.device)
        self._fold_into_open(stats)
        self.cuda.reset_peak_memory_stats(self.device)
        self._retries = stats.get(RETRIES, 0)
        CudaPeaks._open.append(self)

    def end(self) -> dict[str, Any]:
        """The peaks since ``begin``, nested phases included, ``alloc_retries`` since then, and what is held now (``closing``).

        Also after a failure in the phase. Empty where the backend keeps no statistics.
        """
        try:
            stats = self.cuda.memory_stats(self.device)
            self._fold_into_open(stats)
        finally:
            CudaPeaks._open.remove(self)
        if not stats:
            return {}
        closing = {name: stats[key] for name, key in CLOSING.items() if key in stats}
        return {**self.peaks, "alloc_retries": stats.get(RETRIES, 0) - self._retries, "closing": closing}

    def _fold_into_open(self, stats: dict[str, int]) -> None:
        for phase in CudaPeaks._open:
            if phase.cuda is self.cuda and phase.device == self.device:
                for name, key in PEAKS.items():
                    if key in stats:  # requested and active are missing under some allocator backends
                        phase.peaks[name] = max(phase.peaks.get(name, 0), stats[key])


_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_AMOUNT = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_FIGURES = {
    "requested": re.compile(rf"(?:Tried to allocate|Requested size:) {_AMOUNT}"),
    "capacity": re.compile(rf"total capacity of {_AMOUNT}"),
    "free": re.compile(rf"of which {_AMOUNT} is free"),
    "process": re.compile(rf"this process has {_AMOUNT} memory in use"),
    "allocated": re.compile(rf"{_AMOUNT} is allocated by PyTorch"),
    "cached": re.compile(rf"{_AMOUNT} is reserved by PyTorch but unallocated"),
    "allowed": re.compile(rf"{_AMOUNT} allowed"),
}
_HOST = re.compile(r"DefaultCPUAllocator: (?:can't allocate memory: you tried to allocate (\d+) bytes|not enough memory)")
_LIBRARY = re.compile(
    r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT)_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION"
)


def describe_out_of_memory(error: BaseException, cuda: Any = torch.cuda) -> dict[str, Any] | None:
    """What an error says about running out of memory; None where it is something else.

    ``source``: allocator (torch's, on the GPU), cuda (the runtime, outside torch's allocator), library (cuBLAS, cuDNN...),
    host (RAM). Bytes at that moment, as precise as the message's two decimals: requested, free, capacity, process, allowed,
    allocated, reserved. ``retries``: how often the allocator has emptied its cache and tried again in this process. What the
    error does not say is None.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        found = _describe(link, cuda)
        if found is not None:
            return found
        link = link.__cause__ or link.__context__
    return None


def _describe(error: BaseException, cuda: Any) -> dict[str, Any] | None:
    message = str(error)
    figures: dict[str, Any] = {name: _bytes(pattern.search(message)) for name, pattern in _FIGURES.items()}
    if isinstance(error, torch.OutOfMemoryError):
        source = "allocator"
    elif isinstance(error, MemoryError):
        source = "host"
    elif host := _HOST.search(message):
        source = "host"
        figures["requested"] = int(host[1]) if host[1] else None
    elif _LIBRARY.search(message):
        source = "library"
    elif "CUDA error: out of memory" in message or "CUDA driver error: out of memory" in message:
        source = "cuda"
    else:
        return None
    cached = figures.pop("cached")
    allocated = figures["allocated"]
    figures["reserved"] = allocated + cached if allocated is not None and cached is not None else None
    figures["retries"] = None
    if source != "host" and cuda.is_available() and cuda.is_initialized():
        with suppress(RuntimeError):  # after a CUDA error every later call fails
            figures["retries"] = cuda.memory_stats().get(RETRIES)
    return {"source": source, **figures, "message": " ".join(message.split())[:500]}


def _bytes(match: re.Match[str] | None) -> int | None:
    return round(float(match[1]) * _UNITS[match[2]]) if match else None
