"""The live-storage tracer: hand-computed bytes, a slow and obvious oracle, torch's own MemTracker, and what must not leak.

A float32 tensor of 128 elements is one 512-byte block; sizes below are in such blocks where that makes them plain.
"""

import gc
import weakref
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pbbench.memory.tracer.live import LiveTensorTracer, LiveTrace, trace
from pbbench.memory.tracer.storages import CATEGORIES, rounded

BLOCK = 512
N = 128  # float32 elements of one block


def ones(blocks: int, **options: Any) -> Tensor:
    return torch.ones(blocks * N, **options)


def blocks(live: LiveTrace) -> float:
    return live.peak_bytes / BLOCK


# -- what counts as a storage, and for how long


def test_every_storage_is_rounded_up_to_512_bytes() -> None:
    assert [rounded(size) for size in (0, 1, 511, 512, 513, 4096)] == [0, 512, 512, 512, 1024, 4096]
    assert trace(lambda: (torch.ones(1), torch.ones(129))).peak_bytes == 512 + 1024


def test_results_die_when_their_last_tensor_does() -> None:
    x = ones(1)

    def step() -> None:
        y = x + 1  # x, y
        y = y + 1  # x, y, the new y: the old one dies when the name moves
        y = y + 1

    live = trace(step, inputs=x)
    assert (blocks(live), live.start_bytes, live.end_bytes) == (3, BLOCK, BLOCK)


def test_views_and_in_place_results_are_no_new_storage() -> None:
    x = ones(4)

    def step() -> None:
        y = x.view(2, -1).t()[0].unsqueeze(0)
        y.add_(1).mul_(2)
        x.detach().zero_()

    assert blocks(trace(step, inputs=x)) == 4


def test_a_view_keeps_its_whole_storage() -> None:
    def step() -> None:
        head = ones(10)[:1]
        held = head + ones(1)
        del held

    assert blocks(trace(step)) == 10 + 1 + 1


def test_out_and_resize_grow_a_known_storage_in_place() -> None:
    """The new block is taken before the old one is given back, as the allocator does it."""
    x, y = ones(1), ones(3)
    live = trace(lambda: torch.add(y, 1, out=x.resize_(0)), inputs=(x, y))
    assert (blocks(live), live.end_bytes // BLOCK) == (3 + 1 + 3, 6)


def test_storages_resized_by_hand_are_followed() -> None:
    x = ones(4)

    def step() -> None:
        x.untyped_storage().resize_(0)
        ones(2)
        x.untyped_storage().resize_(6 * BLOCK)

    live = trace(step, inputs=x)
    assert (blocks(live), live.end_bytes // BLOCK) == (6, 6)
    assert live.by_category["input"] == 6 * BLOCK


def test_set_swaps_storages() -> None:
    def step() -> None:
        x = ones(1)
        x.set_(ones(5))  # the first storage dies
        held = ones(1)
        del held

    assert blocks(trace(step)) == 6
    assert trace(step).end_bytes == 0


def test_factories_and_python_lists() -> None:
    def step() -> None:
        held = (torch.zeros(N), torch.arange(N), torch.empty(2, N), torch.tensor([1.0]), torch.full((N,), 2), torch.randn(N))
        del held

    assert blocks(trace(step)) == 1 + 2 + 2 + 1 + 2 + 1  # int64 takes two blocks


def test_sparse_tensors_count_their_parts() -> None:
    x = torch.eye(N)

    def step() -> None:
        held = x.to_sparse()
        del held

    assert trace(step, inputs=x).peak_bytes >= x.nbytes + 4 * BLOCK + BLOCK  # 2 × 128 int64 indices, 128 values


def test_wrappers_count_the_tensors_inside_them() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    x = two_tensor.TwoTensor(ones(2), ones(2))
    live = trace(lambda: x + 1, inputs=x)
    assert (live.start_bytes, live.peak_bytes) == (4 * BLOCK, 8 * BLOCK)


def test_inputs_that_nobody_registered_count_from_the_start() -> None:
    """The step's first peak is before it touches them; they were there all the same."""
    hidden, parameter = ones(7), nn.Parameter(ones(3))

    def step() -> None:
        ones(5)
        hidden + parameter[:1]

    live = trace(step)
    assert live.start_bytes == 10 * BLOCK
    assert blocks(live) == 10 + 7
    assert (live.by_category["input"], live.by_category["parameter"]) == (7 * BLOCK, 3 * BLOCK)
    assert blocks(trace(lambda: (ones(9), hidden.sum()))) == 9 + 7 + 1


def test_tensors_elsewhere_are_not_counted() -> None:
    x = ones(2)

    def step() -> None:
        held = (x + 1, ones(100, device="meta"))
        del held

    assert blocks(trace(step, inputs=x)) == 4
    assert blocks(trace(step, device="meta")) == 100
    assert trace(step).device == "all devices"
    assert blocks(trace(step)) == 104


def test_meta_modules_are_counted_on_meta() -> None:
    model = nn.Linear(N, N, device="meta")
    x = torch.ones(1, N, device="meta")
    live = trace(lambda: model(x), modules=model, inputs=x)
    assert (live.device, blocks(live)) == ("meta", N + 1 + 1 + 1)


# -- training: hand-computed bytes, categories, phases


class TwoLayers(nn.Module):
    """Linear layers without bias: the weights have 128 × 128 elements, 128 blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(N, N, bias=False)
        self.second = nn.Linear(N, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def training(
    chunks: int = 1, optimizer_type: Any = torch.optim.Adam, **options: Any
) -> tuple[Callable[[], None], dict[str, Any]]:
    """A step and what trace() is told about it."""
    model = TwoLayers()
    optimizer = optimizer_type(model.parameters(), lr=0.1, **options)
    x = torch.ones(4, N)  # 4 blocks

    def step() -> None:
        for _ in range(chunks):
            model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, {"modules": model, "optimizer": optimizer, "inputs": x}


def test_the_training_step_by_hand() -> None:
    """SGD in one pass, in blocks. The weights have 256 together, x and each layer's result 4, a scalar 1."""
    step, about = training(optimizer_type=torch.optim.SGD)
    live = trace(step, **about)
    # weights, x, relu's result (kept for backward), the second layer's, and the sum's
    assert live.phases["forward"].peak_bytes == (256 + 4 + 4 + 4 + 1) * BLOCK
    # in the first layer's backward: weights, x, the sum, its gradient, the gradient of relu's argument, the weights' gradients
    assert blocks(live) == 256 + 4 + 1 + 1 + 4 + 256
    assert live.by_category["gradient"] == 256 * BLOCK
    assert live.by_module == [("TwoLayers (backward)", 4 * BLOCK), ("(outside modules)", 2 * BLOCK)]
    assert (live.peak_phase, live.peak_module, live.peak_operator) == ("backward", "first (backward)", "aten.mm.default")
    assert live.phases["optimizer"].peak_bytes == (256 + 4 + 256) * BLOCK
    assert live.end_bytes == live.start_bytes == (256 + 4) * BLOCK


def test_adams_state_is_other_no_longer_once_the_step_is_over() -> None:
    step, about = training(foreach=False)
    cold, warm = trace(step, **about), trace(step, **about)
    moments = 4 * N + 2  # two moments per weight, and a one-element step count each
    assert cold.by_category["optimizer"] + cold.by_category["other"] == cold.peak_bytes - (256 + 256 + 4) * BLOCK
    assert (cold.end_bytes - cold.start_bytes) // BLOCK == moments
    assert (warm.start_bytes - cold.start_bytes) // BLOCK == moments
    assert warm.by_category["optimizer"] // BLOCK == moments
    assert warm.by_category["other"] > 0, "Adam's temporaries are the peak of a model this small"
    assert warm.peak_phase == "optimizer"


def test_phases_are_maxima_over_chunks() -> None:
    one, two = (trace(step, **about) for step, about in (training(1), training(2)))
    assert set(one.phases) == {"forward", "backward", "optimizer"}
    # the second forward runs beside the gradients of the first chunk; its backward makes each gradient anew and adds it
    assert two.phases["forward"].peak_bytes == one.phases["forward"].peak_bytes + 256 * BLOCK
    assert two.phases["backward"].by_category["gradient"] == 256 * BLOCK
    assert two.phases["backward"].peak_bytes > one.phases["backward"].peak_bytes
    assert two.phases["optimizer"] == one.phases["optimizer"]
    for live in (one, two):
        assert live.peak_bytes == max(phase.peak_bytes for phase in live.phases.values())
        for phase in live.phases.values():
            assert sum(phase.by_category.values()) == phase.peak_bytes


def test_a_gradient_counts_as_one_although_the_peak_came_before_it_was_assigned() -> None:
    weight = nn.Parameter(ones(64))
    module = nn.Module()
    module.weight = weight
    live = trace(lambda: (weight * 2).sum().backward(), modules=module)
    # at the peak (mul's backward) the product is gone; the gradient is there, and becomes weight.grad afterwards
    assert live.by_category["gradient"] == 64 * BLOCK
    assert weight.grad is not None


def test_gradients_that_exist_are_registered_and_frozen_parameters_have_none() -> None:
    model = TwoLayers()
    model.first.requires_grad_(False)
    x = torch.ones(1, N)
    model(x).sum().backward()
    live = trace(lambda: model(x).sum().backward(), modules=model, inputs=x)
    assert live.by_category["gradient"] == 128 * BLOCK
    assert live.start_bytes == (256 + 128 + 1) * BLOCK


def test_gradients_assigned_by_hand_are_known_at_the_optimizers_step() -> None:
    weight = nn.Parameter(ones(8))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step() -> None:
        (weight.grad,) = torch.autograd.grad((weight * weight).sum(), weight)
        optimizer.step()

    assert trace(step, inputs=weight).by_category["gradient"] == 8 * BLOCK


def test_ema_inputs_and_parameters_keep_apart() -> None:
    model, ema = TwoLayers(), TwoLayers()
    batch = {"x": torch.ones(4, N), "more": [torch.ones(N), "a string", None]}
    live = trace(lambda: model(batch["x"]), modules={"unet": model}, ema=[ema], inputs=(batch, model.first.weight))
    assert live.phases == {}, "without backward or an optimizer there is nothing to tell apart"
    assert live.by_category == {
        "parameter": 256 * BLOCK,
        "gradient": 0,
        "optimizer": 0,
        "ema": 256 * BLOCK,
        "input": 5 * BLOCK,
        "activation": 8 * BLOCK,
        "other": 0,
    }


def test_buffers_are_parameters() -> None:
    model = nn.BatchNorm1d(N)
    assert trace(lambda: None, modules=model).by_category["parameter"] == 5 * BLOCK  # with num_batches_tracked


# -- attribution to modules


def test_activations_go_to_the_module_that_made_them() -> None:
    model = nn.Sequential(nn.Linear(N, 2 * N), nn.ReLU(), nn.Linear(2 * N, 3 * N))
    x = torch.ones(1, N, requires_grad=True)
    held: list[Tensor] = []
    live = trace(lambda: held.extend([model(x), ones(5)]), modules={"net": model}, inputs=x)
    # the first layer's result is gone: relu keeps its own result for backward, not its argument
    assert live.by_module == [("(outside modules)", 5 * BLOCK), ("net.2", 3 * BLOCK), ("net.1", 2 * BLOCK)]


def test_the_root_goes_by_its_class_and_its_own_operators_are_its() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    x = ones(3)
    assert trace(lambda: Doubling()(x), modules=(model := Doubling()), inputs=x).by_module == [("(outside modules)", 3 * BLOCK)]
    assert trace(lambda: model(x), modules=model, inputs=x).by_module == [("Doubling", 3 * BLOCK)]


def test_recomputation_belongs_to_the_module_that_recomputes() -> None:
    model = TwoLayers()
    x = torch.ones(4, N, requires_grad=True)
    live = trace(
        lambda: checkpoint(model, x, use_reentrant=False).sum().backward(), modules=model, inputs=x, record_events=True
    )
    made = [event.allocation for event in live.events if event.delta > 0]
    relus = [(one.phase, one.module) for one in made if one.operator == "aten.relu.default"]
    assert relus == [("forward", "TwoLayers"), ("backward", "TwoLayers")]
    assert set(live.phases) == {"forward", "backward"}


# -- after the run


def test_nothing_is_left_behind() -> None:
    step, about = training()
    resize = torch.UntypedStorage.resize_
    from torch.nn.modules import module
    from torch.optim import optimizer

    tables = (
        module._global_forward_hooks,
        module._global_forward_pre_hooks,
        module._global_forward_hooks_always_called,
        optimizer._global_optimizer_pre_hooks,
        optimizer._global_optimizer_post_hooks,
    )
    before = [len(table) for table in tables]
    trace(step, **about)
    with pytest.raises(ZeroDivisionError):
        trace(lambda: 1 / 0, **about)
    assert [len(table) for table in tables] == before
    assert torch.UntypedStorage.resize_ is resize
    assert not any(p._post_accumulate_grad_hooks for p in about["modules"].parameters())


def test_a_failing_step_still_has_a_reading() -> None:
    model = TwoLayers()
    tracer = LiveTensorTracer(modules=model)

    def step() -> None:
        model(ones(50))

    with pytest.raises(RuntimeError, match="shapes"), tracer:
        step()
    live = tracer.result()
    assert blocks(live) == 256 + 50
    assert sum(live.by_category.values()) == live.peak_bytes
    with pytest.raises(RuntimeError, match="runs once"):
        tracer.__enter__()


def test_the_reading_stands_still_after_the_run() -> None:
    held = []
    tracer = LiveTensorTracer()
    with tracer:
        held.append(ones(3))
    live = tracer.result()
    held.clear()
    assert tracer.result() == live
    assert live.end_bytes == 3 * BLOCK


def test_the_tracer_keeps_no_tensor_alive() -> None:
    """Its weak references and hooks form cycles of their own, which must not hold a storage until the next collection."""
    seen: list[Any] = []
    _, about = training()

    def watched() -> None:
        y = about["modules"](about["inputs"])
        seen.append(weakref.ref(y.untyped_storage()))
        y.sum().backward()

    gc.disable()
    try:
        trace(watched, **about, record_events=True)
        assert seen[0]() is None
    finally:
        gc.enable()


def test_events_replay_to_the_same_peak() -> None:
    step, about = training(2)
    step()
    live = trace(step, **about, record_events=True)
    assert live.events is not None
    totals = list(accumulate(event.delta for event in live.events))
    assert max(totals) == live.peak_bytes
    assert totals[-1] == live.end_bytes
    existing = [event for event in live.events if event.allocation.born == 0 and event.delta > 0]
    assert sum(event.delta for event in existing) == live.start_bytes
    assert live.events[: len(existing)] == existing
    freed = [event.allocation for event in live.events if event.delta < 0]
    assert len(set(map(id, freed))) == len(freed), "a storage dies once"
    orders = [event.allocation.born if event.delta > 0 else event.allocation.died for event in live.events]
    assert all(earlier <= later for earlier, later in pairwise(orders))
    assert trace(step, **about).events is None


# -- oracles


class Slow(TorchDispatchMode):
    """The obvious version: keep a weak reference to every storage ever seen and add up those alive after each operator."""

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()
        self.seen: dict[int, Any] = {}
        self.peak = 0
        for tensor in existing:
            self.note(tensor)

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.seen[id(storage)] = weakref.ref(storage)
        alive = [storage for reference in self.seen.values() if (storage := reference()) is not None]
        self.peak = max(self.peak, sum(-(-storage.nbytes() // 512) * 512 for storage in alive))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self.note, result)
        return result


class Attention(nn.Module):
    """A small network with convolution, norm and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.qkv = nn.Conv2d(16, 48, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=1))
        x = x.flatten(2).transpose(1, 2) + F.scaled_dot_product_attention(q, k, v)
        return self.head(x.mean(1))


def classification(model: nn.Module, size: int, **options: Any) -> tuple[Callable[[], None], dict[str, Any]]:
    optimizer = torch.optim.Adam(model.parameters(), **options)
    x, y = torch.randn(2, 3, size, size), torch.randint(0, 10, (2,))

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, {"modules": model, "optimizer": optimizer, "inputs": (x, y)}


def resnet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=10)


@pytest.mark.parametrize(("make", "size"), [(Attention, 16), (resnet, 32)], ids=["attention", "resnet18"])
def test_equal_to_torchs_mem_tracker(make: Callable[[], nn.Module], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MemTracker rounds on CUDA only; here it rounds as the allocator would, on the CPU too."""
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    monkeypatch.setattr(
        mem_tracker._WeakRefInfo, "_calculate_mem_consumed", lambda self: rounded(self.size * self.element_size)
    )
    step, about = classification(make(), size)
    step()
    live = trace(step, **about)
    tracker = mem_tracker.MemTracker()
    tracker.track_external(about["modules"], about["optimizer"], *about["inputs"])
    with tracker:
        step()
    assert live.peak_bytes == tracker._peak_mem[torch.device("cpu")]
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    kinds = mem_tracker._MemRefType
    assert live.by_category["parameter"] == theirs[kinds.PARAM] + theirs[kinds.BUFFER]
    assert live.by_category["input"] == theirs[kinds.OTH]


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=lambda options: next(iter(options))
)
def test_equal_to_the_slow_oracle_which_has_no_hooks(options: dict[str, bool]) -> None:
    step, about = classification(Attention(), 16, **options)
    step()
    state = [value for entry in about["optimizer"].state.values() for value in entry.values()]
    oracle = Slow([*about["modules"].parameters(), *state, *about["inputs"]])
    with oracle:
        step()
    assert trace(step, **about).peak_bytes == oracle.peak


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["make", "view", "add", "drop", "grow", "swap"]), st.integers(0, 7)), max_size=30))
def test_any_program_agrees_with_the_oracle(program: list[tuple[str, int]]) -> None:
    def run() -> None:
        held = [torch.ones(100)]
        for action, k in program:
            target = held[k % len(held)]
            if action == "make":
                held.append(torch.ones(60 * k))
            elif action == "view":
                held.append(target[:1].view(-1))
            elif action == "add":
                held.append(target + 1)
            elif action == "drop" and len(held) > 1:
                del held[k % len(held)]
            elif action == "grow":
                target.resize_(target.numel() + 50 * k)
            elif action == "swap":
                target.set_(torch.zeros(30 * k))

    oracle = Slow([])
    with oracle:
        run()
    live = trace(run, record_events=True)
    # growing takes the new block before the old one goes, which the oracle, looking between operators, does not see
    grown = any(action == "grow" for action, _ in program)
    assert live.peak_bytes == oracle.peak or (grown and live.peak_bytes > oracle.peak)
    assert live.end_bytes == live.start_bytes == 0
    assert sum(live.by_category.values()) == live.peak_bytes
    assert set(live.by_category) == set(CATEGORIES)


def test_the_categories_are_those_of_the_rows() -> None:
    from pbbench.records import rows as records

    assert CATEGORIES == records.CATEGORIES


def test_an_inner_tracer_sees_its_part_of_the_outer() -> None:
    x = ones(1)
    inner: list[LiveTrace] = []

    def step() -> None:
        held = ones(10)
        inner.append(trace(lambda: x + ones(1), inputs=x))
        del held

    outer = trace(step, inputs=x)
    assert (blocks(outer), blocks(inner[0])) == (1 + 10 + 2, 3)


@pytest.mark.cuda
def test_on_a_gpu_the_count_is_the_allocators() -> None:
    """Sizes that are whole blocks, in operators without workspaces: live bytes are max_memory_allocated."""
    x = ones(3, device="cuda", requires_grad=True)
    base = torch.cuda.memory_allocated() - 3 * BLOCK

    def step() -> None:
        y = (x * 2).relu() + x
        y.sum().backward()
        x.grad = None

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    measured = torch.cuda.max_memory_allocated() - base
    live = trace(step, inputs=x)
    assert live.peak_bytes == measured
    assert live.device.startswith("cuda")
