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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from pbbench.errors import one_line
from pbbench.memory.meters.cuda import CudaPeaks
from pbbench.memory.meters.host import HostPeak
from pbbench.memory.meters.nvml import NvmlMeter
from pbbench.memory.meters.outcome import Ok, Outcome, outcome_of
from pbbench.memory.tracer.modules import in_backward

_CUDA_ONLY = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes", "peak_device_bytes")
_SHORTEST_FOR_ENERGY_S = 0.1
"""The driver renews its energy counter about so often: what it says of a shorter phase is mostly chance."""


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
    energy_joules: float | None = None
    """What the whole GPU used meanwhile, by NVML's counter."""
    temperature: str | None = None
    """cold or warm, where whoever measured knows it."""
    outcome: Outcome | None = None
    """How the phase ended; None while it runs."""
    reasons: dict[str, str] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    """What stands beside the peaks. On CUDA: peak_requested_bytes, peak_active_bytes, alloc_retries; nvml: the function used,
    the number of samples, the longest gap between two in seconds; closing: requested, allocated, reserved, process and device
    bytes at the phase's end. turns: how often the part of a step ran, of which this is the maximum."""
    closing_reasons: dict[str, str] = field(default_factory=dict)
    """Why a figure of ``closing`` is None, where the peak is known all the same."""


class Meter:
    """The meters of one device. Use it as a context manager (or call ``close``), so that NVML's thread ends.

    cuda, nvml: stand-ins for torch.cuda and pynvml, for tests.
    """

    def __init__(self, device: torch.device | str, *, cuda: Any = torch.cuda, nvml: Any = None) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # "cuda" and "cuda:0" share their peaks
            self.device = torch.device("cuda", cuda.current_device())
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
        with ExitStack() as meters:
            meters.callback(self._begin_host(reading))
            if self._nvml is not None:
                meters.callback(_check_process, reading)
                meters.callback(self._begin_driver(self._nvml, reading))
                meters.callback(self._begin_allocator(reading))
                meters.callback(self._begin_energy(self._nvml, reading))
            else:
                why = f"read on CUDA devices only; this phase ran on {self.device.type}"
                reading.reasons.update(dict.fromkeys((*_CUDA_ONLY, "energy_joules"), why))
            start = time.perf_counter()
            try:
                yield reading
                reading.outcome = Ok()
            except BaseException as error:
                reading.outcome = outcome_of(error, self._cuda)
                raise
            finally:
                self._synchronise(reading)
                reading.seconds = time.perf_counter() - start

    @contextmanager
    def parts(self, model: nn.Module) -> Iterator[dict[str, Reading]]:
        """Measure forward, backward and optimizer of the training steps in the block, without touching the code.

        Yields a dict that gets one reading per part that occurs. Forward begins with the call of ``model`` and holds the loss;
        backward begins where the gradient reaches the model's output; the optimizer's part begins with its step. A part lasts
        until the next begins. Over several turns (chunks) peaks are maxima, seconds sums. Every change synchronises the device.
        """
        readings: dict[str, Reading] = {}
        running: list[tuple[AbstractContextManager[Reading], Reading]] = []

        def leave(*error: Any) -> None:
            if running:
                phase, reading = running.pop()
                phase.__exit__(*(error or (None, None, None)))
                earlier = readings.get(reading.name)
                readings[reading.name] = reading if earlier is None else _over_turns(earlier, reading)

        def enter(name: str) -> None:
            leave()
            phase = self.phase(name)
            running.append((phase, phase.__enter__()))

        def backward_begins(gradients: Any) -> None:
            if running and running[0][1].name != "backward":
                enter("backward")

        def forward_begins(module: nn.Module, args: Any) -> None:
            if not in_backward():  # there, a checkpoint recomputes
                enter("forward")

        def forward_ends(module: nn.Module, args: Any, output: Any) -> None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None and not in_backward():
                    leaf.grad_fn.register_prehook(backward_begins)

        with ExitStack() as hooks:
            hooks.push(leave)
            hooks.callback(model.register_forward_pre_hook(forward_begins).remove)
            hooks.callback(model.register_forward_hook(forward_ends).remove)
            hooks.callback(register_optimizer_step_pre_hook(lambda *_: enter("optimizer")).remove)
            yield readings

    def _synchronise(self, reading: Reading) -> None:
        if self.device.type != "cuda":
            return
        try:
            self._cuda.synchronize(self.device)
        except RuntimeError as error:  # after a CUDA error every later call fails; the block's own exception says why
            reading.ledger["synchronise"] = one_line(error)

    def _begin_allocator(self, reading: Reading) -> Callable[[], None]:
        peaks = CudaPeaks(self.device, self._cuda)
        peaks.begin()

        def read() -> None:
            why = "this allocator backend does not report it"
            found: dict[str, Any] = {}
            try:
                found = peaks.end()
            except RuntimeError as error:
                why = f"torch.cuda.memory_stats failed: {one_line(error)}"
            for column in ("peak_allocated_bytes", "peak_reserved_bytes"):
                value = found.pop(column, None)
                setattr(reading, column, value)
                if value is None:
                    reading.reasons[column] = why
            reading.ledger.update(found)

        return read

    def _begin_driver(self, nvml: NvmlMeter, reading: Reading) -> Callable[[], None]:
        begun = nvml.begin()

        def read() -> None:
            found = nvml.end(begun)
            reading.peak_process_bytes, reading.peak_device_bytes = found.process_bytes, found.device_bytes
            if found.process_bytes is None:
                reading.reasons["peak_process_bytes"] = found.process_reason or "no sample was taken"
            if found.device_bytes is None:
                reading.reasons["peak_device_bytes"] = found.device_reason or "no sample was taken"
            if found.samples:
                gap = round(found.longest_gap_s, 4)
                reading.ledger["nvml"] = {"api": found.api, "samples": found.samples, "longest_gap_s": gap}
                closing = reading.ledger.setdefault("closing", {})
                closing.update(process=found.closing_process_bytes, device=found.closing_device_bytes)
                told = {"process": found.process_reason, "device": found.device_reason}
                reading.closing_reasons.update({name: why for name, why in told.items() if why is not None})

        return read

    def _begin_energy(self, nvml: NvmlMeter, reading: Reading) -> Callable[[], None]:
        before, why_before = nvml.energy_millijoules()

        def read() -> None:
            after, why = nvml.energy_millijoules()
            if before is None or after is None:
                reading.reasons["energy_joules"] = why_before or why or "no sample was taken"
            elif (reading.seconds or 0.0) < _SHORTEST_FOR_ENERGY_S or after <= before:
                reading.reasons["energy_joules"] = (
                    f"the phase took {reading.seconds:.3g} s; the driver renews its energy counter some ten times a second"
                )
            else:
                reading.energy_joules = (after - before) / 1000

        return read

    def _begin_host(self, reading: Reading) -> Callable[[], None]:
        peak = HostPeak()
        peak.begin()

        def read() -> None:
            reading.peak_rss_bytes, why = peak.end()
            if why is not None:
                reading.reasons["peak_rss_bytes"] = why

        return read


def _check_process(reading: Reading) -> None:
    """In a container NVML's numbers are the host's, so the process it lists under ours may be another: then it holds less
    than torch does."""
    closing = reading.ledger.get("closing", {})
    process, reserved = closing.get("process"), closing.get("reserved")
    if process is not None and reserved is not None and process < reserved:
        reading.peak_process_bytes = closing["process"] = None
        reading.reasons["peak_process_bytes"] = reading.closing_reasons["process"] = (
            f"the process NVML lists under this number holds {process} bytes, less than torch reserved ({reserved}): another "
            "process of the host, seen from a container"
        )


def _over_turns(earlier: Reading, later: Reading) -> Reading:
    """One reading of a part that ran twice: the larger peaks (unknown if one is) with their ledger, the times together."""
    larger = max((earlier, later), key=lambda reading: reading.peak_allocated_bytes or 0)
    both = Reading(earlier.name, reasons={**earlier.reasons, **later.reasons}, ledger=dict(larger.ledger))
    both.closing_reasons = larger.closing_reasons
    for column in ("peak_rss_bytes", *_CUDA_ONLY):
        first, second = getattr(earlier, column), getattr(later, column)
        if first is not None and second is not None:
            setattr(both, column, max(first, second))
    both.seconds = (earlier.seconds or 0.0) + (later.seconds or 0.0)
    if earlier.energy_joules is not None and later.energy_joules is not None:
        both.energy_joules = earlier.energy_joules + later.energy_joules
    both.outcome = later.outcome
    both.ledger["turns"] = earlier.ledger.get("turns", 1) + 1
    return both
