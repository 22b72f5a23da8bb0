"""Counts the bytes of live tensor storage while any PyTorch code runs, and says what filled the peak.

A ``TorchDispatchMode`` sees every operator's results; the book (``storages.py``) learns when they die. Nothing is read from
an allocator, so the count is the same on every device, on ``meta``, and under ``FakeTensorMode``, where it is a prediction.
What an operator allocates and frees inside itself (workspaces) is not seen, and neither is an allocator's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from pbbench.memory.tracer.modules import RunningModule, in_backward
from pbbench.memory.tracer.storages import Book, Event
from pbbench.memory.tracer.tensors import first_device, plain_parts, state_tensors, tensors_in

_LIFT_FRESH = torch.ops.aten.lift_fresh.default
_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class PhasePeak:
    """The most bytes live during a phase, and what they were."""

    peak_bytes: int
    by_category: dict[str, int]


@dataclass(frozen=True)
class LiveTrace:
    """What a traced step held, in bytes, each storage rounded up to 512."""

    device: str
    peak_bytes: int
    by_category: dict[str, int]
    """Bytes at the peak per name of ``storages.CATEGORIES``; they sum to ``peak_bytes``. Buffers are parameters; activations
    are what forward and backward made; other is what was made between the optimizer's step and the next forward and is not
    the optimizer's state."""
    by_module: list[tuple[str, int]]
    """Activation bytes at the peak by the module that made them, largest first; they sum to the activations. "name (backward)"
    made them in the backward pass of that module's operators."""
    phases: dict[str, PhasePeak]
    """forward, backward, optimizer: those that occurred; empty where all was forward. A phase lasts until the next begins (the
    loss belongs to forward, clipping to backward); of one that occurs several times, as in a chunked step, the largest peak."""
    start_bytes: int
    """Live before the step: what was registered, and what the step used although nobody had registered it (an input)."""
    end_bytes: int
    """Live after the step."""
    peak_operator: str
    """The operator whose result made the peak; empty where nothing rose above the start."""
    peak_module: str
    peak_phase: str
    events: list[Event] | None = None
    """Allocations and frees in order, what was there before first, where ``record_events`` was asked for."""

    def before_and_during(self) -> tuple[list[Event], list[Event]]:
        """What was there before the step, and the step's own events."""
        if self.events is None:
            raise ValueError("this trace has no events; trace the step with record_events=True")
        before = [event for event in self.events if not event.phase]  # they come first
        return before, self.events[len(before) :]


class LiveTensorTracer(TorchDispatchMode):
    """Counts live storage between ``__enter__`` and ``__exit__``. Use it once; ``result()`` is valid also after a failure.

    modules: one module or a mapping of names to modules. Their parameters and buffers are ``parameter``, what becomes their
        parameters' ``.grad`` is ``gradient``, and activations are attributed to them by name.
    optimizer: its state is ``optimizer`` from the start (any optimizer is recognised when it steps).
    inputs, ema: any nesting of tensors and modules that exist before the step.
    device: only its tensors are counted. None: the device of the first parameter, else of the first input, else all.
    record_events: keep every allocation and free (``LiveTrace.events``).

    A storage that only a Python reference cycle holds stays live until Python's collector runs, with the tracer as without.
    Garbage from before the run is not counted, because nobody registers it and no operator uses it.
    """

    def __init__(
        self,
        *,
        modules: Mapping[str, nn.Module] | nn.Module | None = None,
        optimizer: Any = None,
        inputs: Any = (),
        ema: Any = None,
        device: torch.device | str | None = None,
        record_events: bool = False,
    ) -> None:
        super().__init__()
        self._roots = {"": modules} if isinstance(modules, nn.Module) else dict(modules or {})
        self._running = RunningModule(self._roots)
        self._optimizer, self._inputs, self._ema = optimizer, inputs, ema
        self._device = torch.device(device) if device is not None else first_device(self._roots.values(), inputs)
        self._book = Book(record_events=record_events)
        self._hooks: ExitStack | None = None
        self._result: LiveTrace | None = None

    def __enter__(self) -> LiveTensorTracer:
        if self._hooks is not None:
            raise RuntimeError("a LiveTensorTracer runs once; make a new one")
        parameters = list({id(p): p for root in self._roots.values() for p in root.parameters()}.values())
        self._register(parameters, "parameter")
        self._register((buffer for root in self._roots.values() for buffer in root.buffers()), "parameter")
        self._register((p.grad for p in parameters if p.grad is not None), "gradient")
        if self._optimizer is not None:
            self._register(state_tensors(self._optimizer), "optimizer")
        self._register(tensors_in(self._ema), "ema")
        self._register(tensors_in(self._inputs), "input")
        self._book.enter_phase("forward")
        with ExitStack() as hooks:
            hooks.enter_context(self._running.watch(self._root_begins))
            hooks.callback(register_optimizer_step_pre_hook(self._optimizer_begins).remove)
            hooks.callback(register_optimizer_step_post_hook(self._optimizer_ends).remove)
            for parameter in parameters:
                if parameter.requires_grad and parameter.is_leaf:
                    hooks.callback(parameter.register_post_accumulate_grad_hook(self._gradient_made).remove)
            hooks.enter_context(self._book.resizing_watched())
            super().__enter__()
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._hooks is not None
        try:
            super().__exit__(*error)
        finally:
            self._hooks.close()
            self._result = self._read()
            self._book.close()

    def result(self) -> LiveTrace:
        """The reading: of the run so far, or of the whole run once it has ended."""
        return self._result or self._read()

    def _read(self) -> LiveTrace:
        book = self._book
        modules: dict[str, int] = {}
        for allocation in book.members(book.total):
            if allocation.category == "activation":
                modules[allocation.module] = modules.get(allocation.module, 0) + allocation.nbytes
        phases = {name: PhasePeak(peak.nbytes, book.by_category(peak)) for name, peak in book.phases.items()}
        cause = book.total.cause
        return LiveTrace(
            device=str(self._device) if self._device is not None else "all devices",
            peak_bytes=book.total.nbytes,
            by_category=book.by_category(book.total),
            by_module=sorted(modules.items(), key=lambda item: (-item[1], item[0])),
            phases=phases if len(phases) > 1 else {},
            start_bytes=book.start_bytes,
            end_bytes=book.live_bytes,
            peak_operator=cause.operator if cause else "",
            peak_module=cause.module if cause else "",
            peak_phase=cause.phase if cause else "",
            events=book.events(),
        )

    # -- the dispatcher's stream of operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # a question that autograd asks of every fake tensor, oftener than it runs operators
            return getattr(args[0], "fake_device", None) or func(*args)
        for kind in types:
            if hasattr(kind, "__tensor_flatten__"):
                return NotImplemented  # a wrapper (DTensor, quantised): it comes back as operators on its parts
        if func is not _LIFT_FRESH:  # whose argument torch.tensor() has just made, out of sight
            self._find_unregistered(args)
            if kwargs:
                self._find_unregistered(kwargs.values())
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, torch.Tensor):
            self._see(result, func)
        elif isinstance(result, (list, tuple)):
            for item in result:
                if isinstance(item, torch.Tensor):
                    self._see(item, func)
                elif isinstance(item, (list, tuple)):
                    for tensor in item:
                        self._see(tensor, func)
        return result

    def _find_unregistered(self, args: Iterable[Any]) -> None:
        """Tensors that the step uses and nobody registered existed before it: parameters, if so made, or inputs."""
        for arg in args:
            if isinstance(arg, torch.Tensor):
                try:
                    known = self._book.knows(arg.untyped_storage())
                except NotImplementedError:  # a sparse tensor has several storages, an opaque one has none
                    known = False
                if not known:
                    self._register([arg], "parameter" if isinstance(arg, nn.Parameter) else "input")
            elif isinstance(arg, (list, tuple)):
                self._find_unregistered(arg)

    def _register(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Enter storages that exist already; the first category a storage is given stays."""
        for tensor in tensors:
            for part in plain_parts(tensor):
                if self._counts(part) and not self._book.knows(part.untyped_storage()):
                    self._book.found(part.untyped_storage(), category)

    def _counts(self, tensor: torch.Tensor) -> bool:
        wanted = self._device
        if wanted is None:
            return True
        device = getattr(tensor, "fake_device", None) or tensor.device
        return device.type == wanted.type and (wanted.index is None or device.index in (None, wanted.index))

    def _see(self, tensor: torch.Tensor, func: Any) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            for part in plain_parts(tensor):
                self._see(part, func)
            return
        nbytes = storage.nbytes()
        allocation = self._book.allocation_of(storage)
        if allocation is not None:
            if nbytes > allocation.nbytes:  # resize_ and out= grow a storage in place
                self._book.resized(storage, nbytes, str(func))
        elif self._counts(tensor):
            book = self._book
            if book.phase != "backward" and in_backward():
                book.enter_phase("backward")
            category = "other" if book.phase == "optimizer" else "activation"
            book.allocated(storage, nbytes, category, self._running.name(), str(func))

    # -- what the hooks tell

    def _root_begins(self) -> None:
        if self._book.phase != "forward":
            self._book.enter_phase("forward")

    def _gradient_made(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._relabel((parameter.grad,), "gradient")

    def _optimizer_begins(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        self._relabel((p.grad for p in parameters if p.grad is not None), "gradient")
        self._book.enter_phase("optimizer")

    def _optimizer_ends(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._relabel(state_tensors(optimizer), "optimizer")

    def _relabel(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        for tensor in tensors:
            for part in plain_parts(tensor):
                allocation = self._book.allocation_of(part.untyped_storage())
                if allocation is not None and allocation.category in ("activation", "other"):
                    allocation.category = category


def trace(
    step: Callable[[], Any],
    *,
    modules: Mapping[str, nn.Module] | nn.Module | None = None,
    optimizer: Any = None,
    inputs: Any = (),
    ema: Any = None,
    device: torch.device | str | None = None,
    record_events: bool = False,
) -> LiveTrace:
    """Run ``step`` once under a LiveTensorTracer (its arguments are explained there) and return what it held.

    What the step returns is dropped before the reading ends. The step's exceptions pass through.
    """
    tracer = LiveTensorTracer(
        modules=modules, optimizer=optimizer, inputs=inputs, ema=ema, device=device, record_events=record_events
    )
    with tracer:
        step()
    return tracer.result()
