"""Peaks of torch's CUDA caching allocator over a phase.

``torch.cuda.reset_peak_memory_stats`` is global to a device: whoever resets inside someone else's measurement destroys
the outer peak. Here every reset first folds the peaks so far into all phases that are open on that device.
The ``cuda`` argument is ``torch.cuda`` or anything with its functions (the tests bring their own).
"""

from __future__ import annotations

from typing import Any

import torch

from pbbench.errors import one_line

PEAKS = {f"peak_{name}_bytes": f"{name}_bytes.all.peak" for name in ("allocated", "reserved", "requested", "active")}
"""Reading → key of torch.cuda.memory_stats. Allocated is requested rounded up to whole blocks; active adds freed blocks
that another stream may still use; reserved adds the cache."""
CLOSING = {name: f"{name}_bytes.all.current" for name in ("requested", "allocated", "reserved")}
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

        Also after a failure in the phase. What a backend without statistics, or a broken device, does not tell says why.
        """
        found: dict[str, Any] = {}
        why = "this allocator backend does not report it"
        try:
            stats = self.cuda.memory_stats(self.device)
            self._fold_into_open(stats)
            if stats:
                closing = {name: stats[key] for name, key in CLOSING.items() if key in stats}
                found = {**self.peaks, "alloc_retries": stats.get(RETRIES, 0) - self._retries, "closing": closing}
        except RuntimeError as error:
            why = f"torch.cuda.memory_stats failed: {one_line(error)}"
        finally:
            CudaPeaks._open.remove(self)
        return {"peak_allocated_bytes": why, "peak_reserved_bytes": why, **found}

    def _fold_into_open(self, stats: dict[str, int]) -> None:
        for phase in CudaPeaks._open:
            if phase.cuda is self.cuda and phase.device == self.device:
                for name, key in PEAKS.items():
                    if key in stats:  # requested and active are missing under some allocator backends
                        phase.peaks[name] = max(phase.peaks.get(name, 0), stats[key])
