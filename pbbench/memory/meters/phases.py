"""One measured phase: every meter the device has, read around a block of code.

The order is: synchronise, reset, run, synchronise, read; the reading is completed in ``finally``, so a phase that fails
still reports. Phases nest: an inner reset folds into the outer peak. What cannot be read is None, with a reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from pbbench.errors import one_line
from pbbench.memory.meters.cuda import CudaPeaks
from pbbench.memory.meters.driver import DriverEnergy, DriverPeaks, Sampler
from pbbench.memory.meters.host import HostPeak
from pbbench.memory.meters.nvml import Nvml
from pbbench.memory.meters.outcome import Ok, Outcome, outcome_of
from pbbench.memory.tracer.modules import in_backward


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

    def take(self, found: dict[str, Any]) -> None:
        """Enter what a meter found: figures of the fields and of ``closing``, text where there is none, and the rest."""
        closing = found.pop("closing", {})
        for name, figure in found.items():
            if name not in COLUMNS:
                self.ledger[name] = figure
            elif isinstance(figure, str):
                self.reasons[name] = figure
            else:
                setattr(self, name, figure)
        if closing:
            self.closing_reasons |= {name: why for name, why in closing.items() if isinstance(why, str)}
            known = {name: None if name in self.closing_reasons else figure for name, figure in closing.items()}
            self.ledger.setdefault("closing", {}).update(known)
            self._check_process()

    def _check_process(self) -> None:
        """In a container NVML's numbers are the host's, so the process it lists under ours may be another: then it holds less
        than torch does."""
        closing = self.ledger["closing"]
        process, reserved = closing.get("process"), closing.get("reserved")
        if process is not None and reserved is not None and process < reserved:
            self.peak_process_bytes = closing["process"] = None
            self.reasons["peak_process_bytes"] = self.closing_reasons["process"] = (
                f"the process NVML lists under this number holds {process} bytes, less than torch reserved ({reserved}): "
                "another process of the host, seen from a container"
            )


BYTES = tuple(each.name for each in fields(Reading) if each.name.endswith("_bytes"))
COLUMNS = (*BYTES, "seconds", "energy_joules")
"""The figures of a reading."""


class PhaseMeter(Protocol):
    """Reads one thing of one phase. ``end`` gives what ``Reading.take`` enters, also after a failure in the phase."""

    def begin(self) -> None: ...

    def end(self) -> dict[str, Any]: ...


class Meter:
    """The meters of one device. Use it as a context manager (or call ``close``), so that NVML's thread ends.

    cuda, nvml: stand-ins for torch.cuda and pynvml, for tests.
    """

    def __init__(self, device: torch.device | str, *, cuda: Any = torch.cuda, nvml: Any = None) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # "cuda" and "cuda:0" share their peaks
            self.device = torch.device("cuda", cuda.current_device())
        self.cuda = cuda
        if self.device.type == "cuda":
            self.sampler = Sampler(Nvml(self.device, cuda=cuda, nvml=nvml))
            self.sampler.start()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End NVML's thread. Phases measured afterwards have no NVML reading."""
        if self.device.type == "cuda":
            self.sampler.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[Reading]:
        """Measure the block. The reading is complete when the block has ended, also by an exception, which passes through."""
        reading = Reading(name)
        with ExitStack() as meters:
            missing: set[str] = set()
            for device_type, columns, make in METERS:
                if device_type not in (None, self.device.type):
                    missing.update(columns)
                    continue
                meter = make(self)
                meter.begin()
                meters.callback(_end, meter, reading)
            why = f"read on CUDA devices only; this phase ran on {self.device.type}"
            reading.reasons.update((column, why) for column in COLUMNS if column in missing)
            start = time.perf_counter()
            try:
                yield reading
                reading.outcome = Ok()
            except BaseException as error:
                reading.outcome = outcome_of(error, self.cuda)
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
            self.cuda.synchronize(self.device)
        except RuntimeError as error:  # after a CUDA error every later call fails; the block's own exception says why
            reading.ledger["synchronise"] = one_line(error)


METERS: tuple[tuple[str | None, tuple[str, ...], Callable[[Meter], PhaseMeter]], ...] = (
    (None, ("peak_rss_bytes",), lambda of: HostPeak()),
    ("cuda", ("peak_process_bytes", "peak_device_bytes"), lambda of: DriverPeaks(of.sampler)),
    ("cuda", ("peak_allocated_bytes", "peak_reserved_bytes"), lambda of: CudaPeaks(of.device, of.cuda)),
    ("cuda", ("energy_joules",), lambda of: DriverEnergy(of.sampler.gpu)),
)
"""Every meter: the type of device it reads (None: any), the fields of ``Reading`` it fills, and how a phase gets one. They
begin in this order and end in the opposite one."""


def _end(meter: PhaseMeter, reading: Reading) -> None:
    reading.take(meter.end())


def _over_turns(earlier: Reading, later: Reading) -> Reading:
    """One reading of a part that ran twice: the larger peaks (unknown if one is) with their ledger, the times together."""
    larger = max((earlier, later), key=lambda reading: reading.peak_allocated_bytes or 0)
    both = Reading(earlier.name, reasons={**earlier.reasons, **later.reasons}, ledger=dict(larger.ledger))
    both.closing_reasons = larger.closing_reasons
    for column in BYTES:
        first, second = getattr(earlier, column), getattr(later, column)
        if first is not None and second is not None:
            setattr(both, column, max(first, second))
    both.seconds = (earlier.seconds or 0.0) + (later.seconds or 0.0)
    if earlier.energy_joules is not None and later.energy_joules is not None:
        both.energy_joules = earlier.energy_joules + later.energy_joules
    both.outcome = later.outcome
    both.ledger["turns"] = earlier.ledger.get("turns", 1) + 1
    return both
