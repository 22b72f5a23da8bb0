"""Counts the bytes of live tensor storage while any PyTorch code runs, and says what filled the peak.

A ``TorchDispatchMode`` sees every operator's results; a weak reference to each storage tells when it dies. Nothing is
read from the allocator, so the count is the same on every device, on ``meta`` and under ``FakeTensorMode`` (where it is a
prediction). What an operator allocates and frees inside itself (workspaces) is not seen, nor is the allocator's cache.

What the peak consists of is settled at the end, from the storages that were alive at that moment: a weight gradient that
backward had just made counts as a gradient although it became ``p.grad`` only later.
"""

from __future__ import annotations

import gc
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

CATEGORIES = ("parameter", "gradient", "optimizer", "ema", "input", "activation", "other")
ROUND = 512
"""The CUDA caching allocator's smallest unit; every storage is rounded up to it, on every device."""
OUTSIDE = "(outside modules)"
BACKWARD = "(backward)"

_aten = torch.ops.aten
_SCALAR_OVER_FULL_STORAGE = {_aten.mse_loss.default, _aten.smooth_l1_loss.default}
"""Their kernels write the elementwise loss into the result's storage and shrink only its shape when they reduce
(torch's Loss.cpp, CPU and CUDA alike); their fake versions return a true scalar, so the size is put right here."""


@dataclass(slots=True, eq=False)
class Allocation:
    """The life of one storage. ``born`` and ``died`` are positions in the run's order; born 0 means before the run."""

    nbytes: int
    category: str
    module: str
    operator: str
    phase: str
    born: int
    died: int | None = None


@dataclass(slots=True)
class Event:
    """One step of the timeline: ``delta`` is +nbytes or -nbytes, ``live`` the total after it."""

    order: int
    delta: int
    live: int
    allocation: Allocation


@dataclass(frozen=True)
class PhasePeak:
    """The most bytes live during a phase, and what they were."""

    peak_bytes: int
    by_category: dict[str, int]


@dataclass(frozen=True)
class LiveTrace:
    """What a traced step held. Bytes; each storage rounded up to 512."""

    device: str
    peak_bytes: int
    by_category: dict[str, int]
    """Bytes at the peak per name of CATEGORIES; they sum to ``peak_bytes``."""
    by_module: list[tuple[str, int]]
    """Activation bytes at the peak by the module that made them, largest first; they sum to the activations."""
    phases: dict[str, PhasePeak]
    """forward, backward, optimizer: those that occurred. A phase lasts until the next begins; its peak is the largest of
    its turns (a chunked training step has several)."""
    start_bytes: int
    """Live before the step: what was registered, and what the step used that nobody had registered (an input)."""
    end_bytes: int
    """Live after the step's result was dropped."""
    peak_operator: str
    peak_module: str
    peak_phase: str
    events: list[Event] | None = None
    """Allocations and frees in order, where ``record_events`` was asked for."""


@dataclass(slots=True)
class _Peak:
    """A maximum of the live total: when it was, and which storages alive then have died since."""

    nbytes: int = -1
    order: int = 0
    operator: str = ""
    module: str = ""
    phase: str = ""
    died_since: list[Allocation] = field(default_factory=list)


class _Watch(weakref.ref):
    """A weak reference to a storage that knows the storage's key and allocation."""

    __slots__ = ("allocation", "key")
    allocation: Allocation
    key: int


class LiveTensorTracer(TorchDispatchMode):
    """Counts live storage on ``device`` between ``__enter__`` and ``__exit__``; ``result()`` at any time.

    device: only its tensors are counted; None: the device of the first parameter, else of the first input, else all.
    modules: one module or a mapping of names to modules; their parameters and buffers are ``parameter``, the gradients
        their parameters get ``gradient``, and activations are attributed to them by name.
    optimizer: its state is ``optimizer`` (an optimizer that is not given is recognised when it steps).
    inputs, ema: any nesting of tensors or modules that exists before the step.
    record_events: keep every allocation and free in order (``LiveTrace.events``).

    A storage held only by a Python reference cycle stays live until the collector runs, as it does without the tracer.
    """

    def __init__(
        self,
        *,
        modules: Mapping[str, nn.Module] | nn.Module = {},  # noqa: B006
        optimizer: Any = None,
        inputs: Any = (),
        ema: Any = None,
        device: torch.device | str | None = None,
        record_events: bool = False,
    ) -> None:
        super().__init__()
        self._roots = {"": modules} if isinstance(modules, nn.Module) else dict(modules)
        self._names = dict(_module_names(self._roots))
        self._root_ids = {id(module) for module in self._roots.values()}
        self._optimizer, self._inputs, self._ema = optimizer, inputs, ema
        self._device = torch.device(device) if device is not None else _first_device(self._roots.values(), inputs)
        self._events: list[Event] | None = [] if record_events else None
        self._live: dict[int, _Watch] = {}
        self._current = self._order = self._start = 0
        self._total = _Peak()
        self._phases: dict[str, _Peak] = {}
        self._phase = "forward"
        self._optimizing = False
        self._stack = [OUTSIDE]
        self._made_from: tuple[list[int], list[str]] = ([], [])
        self._hooks: ExitStack | None = None

    # -- registering what exists before the step ------------------------------------------------------------------------

    def __enter__(self) -> LiveTensorTracer:
        if self._hooks is not None:
            raise RuntimeError("this tracer is already running; make a new LiveTensorTracer for each run")
        gc.collect()
        parameters = [p for module in self._roots.values() for p in module.parameters()]
        buffers = [b for module in self._roots.values() for b in module.buffers()]
        self._register(parameters + buffers, "parameter")
        self._register([p.grad for p in parameters if p.grad is not None], "gradient")
        if self._optimizer is not None:
            self._register(_state_tensors(self._optimizer), "optimizer")
        self._register(_tensors_in(self._ema), "ema")
        self._register(_tensors_in(self._inputs), "input")
        self._mark_peak(self._total, "", OUTSIDE)
        self._enter_phase("forward")
        with ExitStack() as hooks:
            for handle in (
                register_module_forward_pre_hook(self._module_begins),
                register_module_forward_hook(self._module_ends, always_call=True),
                register_optimizer_step_pre_hook(self._optimizer_begins),
                register_optimizer_step_post_hook(self._optimizer_ends),
                *(p.register_post_accumulate_grad_hook(self._gradient_done) for p in parameters if p.requires_grad),
            ):
                hooks.callback(handle.remove)
            _watch_resize(self, hooks)
            self._hooks = hooks.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            assert self._hooks is not None
            self._hooks.close()

    def _register(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Count storages that exist; the first category a storage is given stays."""
        for tensor in tensors:
            for part in _plain_parts(tensor):
                storage = part.untyped_storage()
                if storage._cdata not in self._live and self._counts(part):
                    self._found(storage, category)

    def _found(self, storage: torch.UntypedStorage, category: str) -> None:
        """A storage from before the run. It was there all along, so it counts in every peak that has been taken."""
        allocation = Allocation(_rounded(storage.nbytes()), category, OUTSIDE, "", "", 0)
        self._watch(storage, allocation)
        self._start += allocation.nbytes
        for peak in (self._total, *self._phases.values()):
            if peak.nbytes >= 0:
                peak.nbytes += allocation.nbytes

    def _counts(self, tensor: torch.Tensor) -> bool:
        device, wanted = tensor.device, self._device
        if wanted is None:
            return True
        return device.type == wanted.type and (wanted.index is None or device.index in (None, wanted.index))

    # -- the dispatcher's stream of operators ---------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kind in types:
            if hasattr(kind, "__tensor_flatten__"):
                return NotImplemented  # a wrapper (DTensor, quantised): it comes back as operators on its plain parts
        if func is not _aten.lift_fresh.default:  # whose argument torch.tensor() has just made, out of our sight
            self._look_for_unregistered(args)
            if kwargs:
                self._look_for_unregistered(kwargs.values())
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, torch.Tensor):
            self._see(result, func, args)
        elif isinstance(result, (list, tuple)):
            for item in result:
                if isinstance(item, torch.Tensor):
                    self._see(item, func, args)
                elif isinstance(item, (list, tuple)):
                    for tensor in item:
                        self._see(tensor, func, args)
        return result

    def _look_for_unregistered(self, args: Iterable[Any]) -> None:
        """Tensors that the step uses and nobody registered existed before it: they are inputs (parameters, if so made)."""
        live = self._live
        for arg in args:
            if isinstance(arg, torch.Tensor):
                try:
                    known = arg.untyped_storage()._cdata in live
                except NotImplementedError:  # sparse and other layouts without one storage
                    known = False
                if not known:
                    self._register([arg], "parameter" if isinstance(arg, nn.Parameter) else "input")
            elif isinstance(arg, (list, tuple)):
                self._look_for_unregistered(arg)

    def _see(self, tensor: torch.Tensor, func: Any, args: Any) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            for part in _plain_parts(tensor):
                self._see(part, func, args)
            return
        nbytes = storage.nbytes()
        watch = self._live.get(storage._cdata)
        if watch is None:
            if self._counts(tensor):
                if func in _SCALAR_OVER_FULL_STORAGE and tensor.dim() == 0:
                    nbytes = max(nbytes, _elementwise_bytes(args))
                self._allocated(storage, nbytes, func)
        elif (nbytes + ROUND - 1) // ROUND * ROUND > watch.allocation.nbytes:
            self._resized(storage, watch, func)

    def _allocated(self, storage: torch.UntypedStorage, nbytes: int, func: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if self._optimizing:
            category, module = "other", OUTSIDE
        else:
            if in_backward and self._phase != "backward":
                self._enter_phase("backward")
            category, module = "activation", self._stack[-1]
            if in_backward and module is OUTSIDE:
                module = self._module_of_node()
        self._order += 1
        self._watch(storage, Allocation(_rounded(nbytes), category, module, str(func), self._phase, self._order))

    def _watch(self, storage: torch.UntypedStorage, allocation: Allocation) -> None:
        watch = _Watch(storage, self._freed)
        watch.allocation, watch.key = allocation, storage._cdata
        self._live[watch.key] = watch
        self._current += allocation.nbytes
        if self._events is not None:
            self._events.append(Event(self._order, allocation.nbytes, self._current, allocation))
        if allocation.born:
            for peak in (self._total, self._phases[self._phase]):
                if self._current > peak.nbytes:
                    self._mark_peak(peak, allocation.operator, allocation.module)

    def _mark_peak(self, peak: _Peak, operator: str, module: str) -> None:
        peak.nbytes, peak.order, peak.operator, peak.module, peak.phase = (
            self._current,
            self._order,
            operator,
            module,
            self._phase,
        )
        peak.died_since = []

    def _freed(self, watch: _Watch) -> None:
        if self._live.get(watch.key) is watch:
            del self._live[watch.key]
            self._release(watch.allocation)

    def _release(self, allocation: Allocation) -> None:
        self._order += 1
        allocation.died = self._order
        self._current -= allocation.nbytes
        if self._events is not None:
            self._events.append(Event(self._order, -allocation.nbytes, self._current, allocation))
        for peak in (self._total, *self._phases.values()):
            if allocation.born <= peak.order:
                peak.died_since.append(allocation)

    def _resized(self, storage: torch.UntypedStorage, watch: _Watch, func: Any) -> None:
        """The allocator gives a resized storage a new block and then frees the old one, so both are live for a moment."""
        old = watch.allocation
        self._allocated(storage, storage.nbytes(), func)
        self._live[watch.key].allocation.category = old.category
        self._release(old)

    # -- what the hooks tell --------------------------------------------------------------------------------------------

    def _module_begins(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        in_backward = torch._C._current_graph_task_id() != -1  # a checkpoint recomputes
        if id(module) in self._root_ids and not in_backward and self._phase != "forward":
            self._enter_phase("forward")
        self._stack.append(name)
        if not in_backward:
            self._note_module(name)

    def _module_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self._names and len(self._stack) > 1:
            self._stack.pop()
            if torch._C._current_graph_task_id() == -1:
                self._note_module(self._stack[-1])

    def _note_module(self, name: str) -> None:
        """Autograd nodes are numbered as they are made, so a range of numbers belongs to the module that was running."""
        numbers, names = self._made_from
        numbers.append(torch._C._autograd._get_sequence_nr())
        names.append(name)

    def _module_of_node(self) -> str:
        node = torch._C._current_autograd_node()
        numbers, names = self._made_from
        if node is None or not numbers:
            return BACKWARD
        number = node._sequence_nr()
        last = torch._C._autograd._get_sequence_nr()
        position = bisect_right(numbers, number) - 1
        if position < 0 or number >= 2**63 or names[position] is OUTSIDE or number > last > 0:
            return BACKWARD
        return f"{names[position]} {BACKWARD}"

    def _optimizer_begins(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            self._relabel((p.grad for p in group["params"] if p.grad is not None), "gradient")
        self._optimizing = True
        self._enter_phase("optimizer")

    def _optimizer_ends(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._relabel(_state_tensors(optimizer), "optimizer")
        self._optimizing = False

    def _gradient_done(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._relabel([parameter.grad], "gradient")

    def _relabel(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        for tensor in tensors:
            for part in _plain_parts(tensor):
                watch = self._live.get(part.untyped_storage()._cdata)
                if watch is not None and watch.allocation.category in ("activation", "other"):
                    watch.allocation.category = category

    def _enter_phase(self, name: str) -> None:
        self._phase = name
        peak = self._phases.setdefault(name, _Peak())
        if self._current > peak.nbytes:
            self._mark_peak(peak, "", OUTSIDE)

    # -- the reading ----------------------------------------------------------------------------------------------------

    def result(self) -> LiveTrace:
        """The reading so far; after the run, the run's. Also valid after the step failed."""
        members = list(self._members(self._total))
        modules: dict[str, int] = {}
        for allocation in members:
            if allocation.category == "activation":
                modules[allocation.module] = modules.get(allocation.module, 0) + allocation.nbytes
        return LiveTrace(
            device=str(self._device) if self._device is not None else "all devices",
            peak_bytes=self._total.nbytes,
            by_category=_by_category(members),
            by_module=sorted(modules.items(), key=lambda item: (-item[1], item[0])),
            phases={
                name: PhasePeak(peak.nbytes, _by_category(self._members(peak)))
                for name, peak in self._phases.items()
                if peak.nbytes >= 0
            },
            start_bytes=self._start,
            end_bytes=self._current,
            peak_operator=self._total.operator,
            peak_module=self._total.module,
            peak_phase=self._total.phase,
            events=self._events,
        )

    def _members(self, peak: _Peak) -> Iterator[Allocation]:
        """The storages that were alive at the peak: those still alive, and those that died since."""
        for watch in self._live.values():
            if watch.allocation.born <= peak.order:
                yield watch.allocation
        yield from peak.died_since


def trace(
    step: Callable[[], Any],
    *,
    modules: Mapping[str, nn.Module] | nn.Module = {},  # noqa: B006
    optimizer: Any = None,
    inputs: Any = (),
    ema: Any = None,
    device: torch.device | str | None = None,
    record_events: bool = False,
) -> LiveTrace:
    """Run ``step`` once under a LiveTensorTracer and return what it held. The step's exceptions pass through."""
    tracer = LiveTensorTracer(
        modules=modules, optimizer=optimizer, inputs=inputs, ema=ema, device=device, record_events=record_events
    )
    with tracer:
        step()
    return tracer.result()


def _rounded(nbytes: int) -> int:
    return (nbytes + ROUND - 1) // ROUND * ROUND


def _by_category(allocations: Iterable[Allocation]) -> dict[str, int]:
    sums = dict.fromkeys(CATEGORIES, 0)
    for allocation in allocations:
        sums[allocation.category] += allocation.nbytes
    return sums


def _module_names(roots: Mapping[str, nn.Module]) -> Iterator[tuple[int, str]]:
    """(id, dotted name) of every module; a root without a name goes by its class."""
    for root_name, root in roots.items():
        for name, module in root.named_modules():
            yield id(module), ".".join(part for part in (root_name, name) if part) or type(module).__name__


def _first_device(roots: Iterable[nn.Module], inputs: Any) -> torch.device | None:
    for root in roots:
        for tensor in (*root.parameters(), *root.buffers()):
            return tensor.device
    for tensor in _tensors_in(inputs):
        return tensor.device
    return None


def _tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in a nesting of lists, tuples, dicts and modules."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, nn.Module):
            yield from leaf.parameters()
            yield from leaf.buffers()


def _state_tensors(optimizer: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The strided tensors a tensor consists of: itself, or the parts of a wrapper or a sparse tensor."""
    if is_traceable_wrapper_subclass(tensor):
        attributes, _ = tensor.__tensor_flatten__()
        return [part for name in attributes for part in _plain_parts(getattr(tensor, name))]
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []  # opaque (MKL-DNN): it has no storage to count


def _elementwise_bytes(args: Any) -> int:
    """The storage of a loss before its reduction: the inputs' common shape in their common type."""
    first, second = args[0], args[1]
    shape = torch.broadcast_shapes(first.shape, second.shape)
    return shape.numel() * torch.promote_types(first.dtype, second.dtype).itemsize


def _watch_resize(tracer: LiveTensorTracer, hooks: ExitStack) -> None:
    """``UntypedStorage.resize_`` is no operator: stand in for it while the tracer runs."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        watch = tracer._live.get(storage._cdata)
        if watch is not None:
            tracer._resized(storage, watch, "UntypedStorage.resize_")
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
    hooks.callback(setattr, torch.UntypedStorage, "resize_", original)
