"""GPU memory and energy of a phase as the driver tells them; memory is sampled by a thread, because NVML keeps no peaks.

The thread reads every few milliseconds while phases are open; the largest gap between two readings is reported, because a
peak may hide in it.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from pbbench.memory.meters.nvml import Nvml

INTERVAL_S = 0.01
SHORTEST_FOR_ENERGY_S = 0.1
"""The driver renews its energy counter about so often: what it says of a shorter phase is mostly chance."""


class Sampler:
    """Samples one GPU's memory for the phases that are open, from ``start`` to ``stop``; ``interval``: seconds between."""

    def __init__(self, gpu: Nvml, interval: float = INTERVAL_S) -> None:
        self.gpu = gpu
        self.interval = interval
        self.open: list[DriverPeaks] = []
        self.lock = threading.Lock()
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, so that it runs before the first phase does. No thread where nothing can be read."""
        if self.gpu.readable and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pbbench-nvml", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the thread and let go of NVML; twice is once."""
        self._halt.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.gpu.close()

    def sample(self) -> dict[str, int | str]:
        """Bytes of the process and of the device now, or why they are not known; folded into all open phases."""
        held = self.gpu.memory()
        with self.lock:
            now = time.perf_counter()
            for phase in self.open if self.gpu.readable else ():
                phase.fold(held, now)
        return held

    def _run(self) -> None:
        while not self._halt.wait(self.interval):
            if self.open:
                self.sample()


class DriverPeaks:
    """The largest samples of a phase; phases may nest."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.peaks: dict[str, int] = {}
        self.samples = 0
        self.longest_gap_s = 0.0
        self._last = 0.0

    def begin(self) -> None:
        with self.sampler.lock:
            self.sampler.open.append(self)
        self.sampler.sample()

    def end(self) -> dict[str, Any]:
        """The peaks; ``nvml``: how they were sampled; ``closing``: the last sample, which the thread's own cannot replace."""
        closing = self.sampler.sample()
        with self.sampler.lock:
            self.sampler.open = [other for other in self.sampler.open if other is not self]
        found: dict[str, Any] = {f"peak_{name}_bytes": self.peaks.get(name, closing[name]) for name in closing}
        if self.samples:
            gap = round(self.longest_gap_s, 4)
            found["nvml"] = {"api": self.sampler.gpu.api, "samples": self.samples, "longest_gap_s": gap}
            found["closing"] = closing
        return found

    def fold(self, held: dict[str, int | str], now: float) -> None:
        """One sample taken at ``now`` seconds."""
        for name, nbytes in held.items():
            if isinstance(nbytes, int):
                self.peaks[name] = max(self.peaks.get(name, 0), nbytes)
        if self.samples:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last)
        self.samples += 1
        self._last = now


class DriverEnergy:
    """What the whole GPU used between ``begin`` and ``end``."""

    def __init__(self, gpu: Nvml) -> None:
        self.gpu = gpu

    def begin(self) -> None:
        self._before, self._start = self.gpu.energy_millijoules(), time.perf_counter()

    def end(self) -> dict[str, Any]:
        seconds, after = time.perf_counter() - self._start, self.gpu.energy_millijoules()
        if isinstance(self._before, str) or isinstance(after, str):
            return {"energy_joules": next(figure for figure in (self._before, after) if isinstance(figure, str))}
        if seconds < SHORTEST_FOR_ENERGY_S or after <= self._before:
            why = f"the phase took {seconds:.3g} s; the driver renews its energy counter some ten times a second"
            return {"energy_joules": why}
        return {"energy_joules": (after - self._before) / 1000}
