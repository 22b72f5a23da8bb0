"""The process's peak resident memory over a phase: Linux's VmHWM, reset through /proc/self/clear_refs.

The mark belongs to the process, so a reset inside another phase first folds the mark into that phase. Where it cannot be
reset, a phase that raised it still knows its own peak; one that stayed below an earlier peak does not, and says so.
On a CPU this is a coarse meter: glibc keeps freed memory unless it runs with ``MALLOC_MMAP_THRESHOLD_=65536``, and then the
peak lies some 3% above the live tensors. Use the tracer (``tracer/live.py``) for anything small.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


class HostPeak:
    """Peak resident bytes between ``begin`` and ``end``; instances nest. ``proc`` stands in for /proc/self in tests."""

    _open: list[HostPeak] = []  # noqa: RUF012 (shared on purpose: there is one mark per process)

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self.proc = proc
        self.peak = 0
        self._reset = False
        self._before = 0

    def begin(self) -> None:
        self._before = self._fold_into_open()
        self._reset = self._reset_mark()
        HostPeak._open.append(self)

    def end(self) -> dict[str, int | str]:
        """``peak_rss_bytes``, or why there is no reading."""
        HostPeak._open.remove(self)
        mark = self._fold_into_open()
        peak = max(self.peak, mark)
        if peak == 0:
            return {"peak_rss_bytes": f"no peak resident memory is offered on {sys.platform}"}
        if self._reset or peak > self._before:
            return {"peak_rss_bytes": peak}
        return {
            "peak_rss_bytes": f"the phase stayed below the process's earlier resident peak of {self._before} bytes, which "
            "cannot be reset here (/proc/self/clear_refs)"
        }

    def _fold_into_open(self) -> int:
        mark = self._mark()
        for phase in HostPeak._open:
            phase.peak = max(phase.peak, mark)
        return mark

    def _mark(self) -> int:
        """The process's high-water mark in bytes; 0 where the system has none."""
        try:
            match = re.search(r"^VmHWM:\s+(\d+) kB", (self.proc / "status").read_text(), re.MULTILINE)
        except OSError:
            match = None
        if match:
            return int(match[1]) * 1024
        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def _reset_mark(self) -> bool:
        try:
            (self.proc / "clear_refs").write_text("5")
        except OSError:
            return False
        return True
