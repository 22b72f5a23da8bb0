"""A step on fake tensors holds what the same step holds when it is run for real on a CPU: to the byte, part by part."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pbbench.memory.prediction.fake import Step, predict
from pbbench.memory.tracer.live import LiveTrace

Make = Callable[[], Step]


class Network(nn.Module):
    """Convolutions, norms and attention, as an image model has them."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.layer_norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.down = nn.Conv2d(16, 16, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1)
        self.head = nn.Conv2d(32, 3, 1)
        self.recompute = recompute

    def block(self, x: Tensor) -> Tensor:
        return F.mish(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # N, 16, H, W
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        tokens = self.layer_norm(x.flatten(2).transpose(1, 2))  # N, HW, 16
        q, k, v = self.qkv(tokens).view(*tokens.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).permute(0, 1, 3, 2).reshape(x.shape)
        skip = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
        return self.head(torch.cat([self.up(F.silu(self.down(x))), skip], dim=1))


def training(
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    chunks: int = 1,
    autocast: bool = False,
    recompute: bool = False,
    clip: bool = True,
) -> Make:
    def make() -> Step:
        model, ema_model = Network(recompute), Network()
        optimizer = torch.optim.Adam(model.parameters())
        x, y = torch.randn(4, 3, 16, 16), torch.rand(4, 3, 16, 16)

        def step() -> None:
            for rows in torch.arange(4).chunk(chunks):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = model(x[: len(rows)])
                (loss(output, y[: len(rows)]) / chunks).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return Step(step, model, optimizer, (x, y), ema_model)

    return make


def sampling() -> Step:
    model = Network().eval()
    x = torch.randn(4, 3, 16, 16)

    def step() -> Tensor:
        with torch.no_grad():
            return torch.lerp(x, model(x), 0.1)

    return Step(step, model, inputs=x)


def bounded(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(output.float().sigmoid(), target)


CASES: dict[str, Make] = {
    "sampling": sampling,
    "training": training(),
    "three_chunks": training(chunks=3),
    "autocast": training(autocast=True),
    "checkpoint": training(recompute=True),
    "smooth_l1": training(loss=F.smooth_l1_loss),
    "soft_margin": training(loss=F.soft_margin_loss),
    "bounded": training(loss=bounded),
    "l1_sum": training(loss=lambda output, target: F.l1_loss(output, target, reduction="sum")),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_equal_to_the_real_step_on_a_cpu(name: str, warm: bool) -> None:
    """The whole reading: peak, categories, modules, phases, start, end and the operator at the peak."""
    real = CASES[name]()
    if warm:
        real.run()
    assert predict(CASES[name], warm=warm) == real.trace()


def test_events_too_are_equal() -> None:
    """One by one, except that clipping takes the norms of real gradients together and those of fake ones in turn."""

    def told(live: LiveTrace) -> list[tuple[int, str, str, str]]:
        return [
            (event.delta, event.allocation.category, event.allocation.module, event.allocation.operator)
            for event in live.events
        ]

    for make in (sampling, training(clip=False)):
        assert told(predict(make, warm=False, record_events=True)) == told(make().trace(record_events=True))


def test_warm_is_the_default_and_differs_by_what_the_first_step_leaves() -> None:
    warm, cold = predict(training()), predict(training(), warm=False)
    assert warm.start_bytes == warm.end_bytes == cold.end_bytes > cold.start_bytes
    assert predict(sampling) == predict(sampling, warm=False)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_a_step_that_leaves_more_behind_than_state_is_warm_too(optimizer: type[torch.optim.Optimizer]) -> None:
    """It keeps its gradients, and a cache it makes when it first runs."""

    def make() -> Step:
        model = nn.Linear(64, 64)
        x = torch.randn(8, 64)
        steps = optimizer(model.parameters(), lr=0.01)
        cache: list[Tensor] = []

        def loss() -> Tensor:
            if not cache:
                cache.append(torch.zeros(1000))
            steps.zero_grad(set_to_none=False)
            value = (model(x) ** 2).mean() + cache[0].sum()
            value.backward()
            return value

        return Step(lambda: steps.step(loss), model, steps, x)

    real = make()
    real.run()
    assert predict(make) == real.trace()


def test_nothing_of_any_size_is_allocated() -> None:
    """A terabyte of activations on any machine."""

    def make() -> Step:
        model = nn.Conv2d(3, 2**15, 3, padding=1)
        x = torch.zeros(8, 3, 1024, 1024)
        return Step(lambda: model(x).sum().backward(), model, inputs=x)

    live = predict(make)
    assert live.peak_bytes > 2**40
    assert sum(live.by_category.values()) == live.peak_bytes


def test_a_mean_squared_error_keeps_its_image() -> None:
    """torch's kernel leaves the elementwise loss behind the scalar; the fake kernel does not (see predict.py)."""

    def make() -> Step:
        x, y = torch.zeros(100, 128), torch.zeros(128)
        return Step(lambda: F.mse_loss(x, y.expand(100, 128)), {}, inputs=(x, y))

    live = predict(make)
    assert live.peak_bytes - live.start_bytes == 100 * 512
    assert live == make().trace()


def test_mixed_types_as_the_kernels_have_them() -> None:
    def make() -> Step:
        model = nn.Sequential(nn.GroupNorm(4, 16), nn.LayerNorm(64))
        x = torch.randn(8, 16, 64, dtype=torch.bfloat16, requires_grad=True)
        y = torch.randn(8, 16, 64)

        def step() -> None:
            output = model(x)
            F.mse_loss(output.bfloat16(), y).backward()
            x.grad = None
            model.zero_grad()

        return Step(step, model, inputs=(x, y))

    assert predict(make) == make().trace()


def test_reading_a_value_is_refused_and_nothing_stays_fake() -> None:
    def make() -> Step:
        x = torch.ones(3)
        return Step(lambda: float(x.sum()), {}, inputs=x)

    with pytest.raises(Exception, match=r"item|data-dependent|_local_scalar_dense"):
        predict(make)
    assert type(torch.ones(1)) is Tensor
