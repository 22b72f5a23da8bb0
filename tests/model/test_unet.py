"""PatchUNet against the plain version of the network, and against itself however its passes are cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from plain_unet import plain_unet
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pbbench.errors import InputError
from pbbench.experiment.settings import DiffusionConfig, ModelConfig, Recompute
from pbbench.model.diffusion import Diffusion
from pbbench.model.patching import row_chunks, split
from pbbench.model.reference import reference_name
from pbbench.model.unet import PatchUNet

CONFIGS = {
    "released shape": {"dim": 8, "dim_mults": (1, 2, 4), "image_size": 32, "patch_divider": 2},
    "whole image": {"dim": 8, "dim_mults": (1, 2), "image_size": 16, "patch_divider": 1},
    "one level": {"dim": 8, "dim_mults": (1,), "image_size": 16, "patch_divider": 4},
    "not square": {"dim": 8, "dim_mults": (1, 2), "image_size": (16, 48), "patch_divider": 4},
    "own widths": {
        "dim": 12,
        "dim_mults": (1, 3),
        "image_size": (24, 12),
        "patch_divider": 3,
        "init_dim": 5,
        "channels": 1,
        "out_channels": 2,
        "resnet_block_groups": 4,
    },
}


def build(**settings: object) -> tuple[PatchUNet, Tensor, Tensor]:
    """A model whose every weight is random (a fresh norm's scale of 1 would hide a mistake), and a batch of three."""
    model = PatchUNet(ModelConfig(**settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(3, model.config.channels, *model.config.size), torch.tensor([0, 417, 999])


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_the_plain_network(settings: dict[str, object]) -> None:
    model, x_t, t = build(**settings)
    weights = {reference_name(name): p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = plain_unet(weights, x_t, t, model.config.patch_divider, model.config.resnet_block_groups)
    out = model(x_t, t)
    assert out.shape == (3, model.config.out_channels or model.config.channels, *model.config.size)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    pull = torch.randn_like(out)
    (out * pull).mean().backward()
    (expected * pull).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[reference_name(name)].grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("patch_batch_size", [1, 2, 3, 5, 7, 12, 100])
def test_any_patch_batch_size_gives_the_same_output(patch_batch_size: int) -> None:
    model, x_t, t = build(**CONFIGS["released shape"])
    with torch.no_grad():
        stacked = model(x_t, t)
        torch.testing.assert_close(model(x_t, t, patch_batch_size), stacked, rtol=1e-4, atol=1e-5)
    recorded = model(x_t, t, patch_batch_size)
    assert recorded.requires_grad
    torch.testing.assert_close(recorded.detach(), stacked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_backward_per_chunk_gives_the_same_gradients(loss_type: str, prediction_type: str) -> None:
    model, x_start, t = build(**CONFIGS["not square"])
    diffusion = Diffusion(DiffusionConfig(loss_type=loss_type, prediction_type=prediction_type))  # type: ignore[arg-type]
    noise = torch.randn_like(x_start)
    x_t, target = diffusion.q_sample(x_start, t, noise), diffusion.target(x_start, t, noise)

    stacked = diffusion.loss(model(x_t, t), target)
    stacked.backward()
    expected = gradients(model)
    for patch_batch_size in (3, 5, 48):  # one patch index; straddling, with a last chunk of 3; all at once
        model.zero_grad()
        total = 0.0
        for rows in row_chunks(48, patch_batch_size):
            loss = diffusion.loss(model(x_t, t, rows=rows), split(target, 4, rows), total=target.numel())
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(stacked.item(), rel=1e-5)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def gradients(model: PatchUNet) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_has_a_gradient_and_x_t_has_none(tiny_config: ModelConfig) -> None:
    model = PatchUNet(tiny_config)
    x_t = torch.randn(2, 3, 16, 16, requires_grad=True)
    model(x_t, torch.tensor([1, 2])).sum().backward()
    assert x_t.grad is None
    assert set(gradients(model)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_float64_trains_and_agrees_with_float32(recompute: Recompute) -> None:
    model, x_start, t = build(**CONFIGS["not square"])
    double = copy.deepcopy(model).double().set_recompute(recompute)
    diffusion, noise = Diffusion(DiffusionConfig(loss_type="l2")), torch.randn_like(x_start)
    outputs = []
    for network, x, e in ((model, x_start, noise), (double, x_start.double(), noise.double())):
        x_t, target = diffusion.q_sample(x, t, e), diffusion.target(x, t, e)
        for rows in row_chunks(48, 5):
            loss = diffusion.loss(network(x_t, t, rows=rows), split(target, 4, rows), total=target.numel())
            assert loss.dtype == x.dtype
            loss.backward()
        outputs.append(network(x_t, t).detach())
        assert outputs[-1].dtype == x.dtype
    torch.testing.assert_close(outputs[1], outputs[0].double(), rtol=1e-4, atol=1e-5)
    expected = gradients(model)
    for name, gradient in gradients(double).items():
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(gradient, expected[name].double(), rtol=1e-4, atol=1e-6, msg=name)
    # The answer to a step of 1e-12 is as small: nothing between is float32.
    moved = double(x_t + 1e-12, t) - double(x_t, t)
    assert 0 < moved.abs().max() < 1e-9


def test_a_patch_is_told_its_position_and_the_whole_image(tiny_config: ModelConfig) -> None:
    model, t = PatchUNet(tiny_config), torch.tensor([500])
    same = torch.randn(1, 3, 8, 8).repeat(1, 1, 2, 2)  # four equal patches
    with torch.no_grad():
        first, *others = split(model(same, t), 2)
        assert all((first - other).abs().max() > 1e-4 for other in others)
        changed = same.clone()
        changed[:, :, 8:, 8:] += 1  # the last patch; the first sees it in the global content only
        assert (split(model(changed, t), 2)[0] - first).abs().max() > 1e-4


def test_the_released_width_has_the_released_parameters() -> None:
    with torch.device("meta"):
        model = PatchUNet(ModelConfig(dim=128, dim_mults=(1, 2, 4, 8), image_size=128, patch_divider=4))
    unused_embedder = 4 * 128 * 128 + 4 * 128
    assert sum(p.numel() for p in model.parameters()) == 126_851_919 - unused_embedder


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in tensors(result):
            self.elements = max(self.elements, value.numel())
        return result


def tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def test_a_smaller_chunk_makes_smaller_tensors() -> None:
    model, x_t, t = build(**CONFIGS["not square"])
    largest = {}
    for patch_batch_size in (1, 3, 48):
        with torch.no_grad(), LargestTensor() as mode:
            model(x_t, t, patch_batch_size)
        largest[patch_batch_size] = mode.elements
    for rows in (1, 3):  # nothing holds more than the chunk's rows, but the image itself
        assert largest[rows] == max(x_t.numel(), largest[48] * rows // 48)


def test_runs_on_fake_tensors_and_under_autocast(tiny_config: ModelConfig) -> None:
    with FakeTensorMode():
        model = PatchUNet(tiny_config)
        out = model(torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64), rows=slice(1, 4))
        assert out.shape == (3, 3, 8, 8)
        out.sum().backward()

    model, x_t, t = PatchUNet(tiny_config), torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    expected = model(x_t, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x_t, t, 3)
    assert out.dtype == torch.float32
    assert 0 < (out - expected).abs().max() < 0.1


@pytest.mark.parametrize(
    ("x_t", "t", "chunks", "message"),
    [
        ((2, 3, 16, 18), (2,), {}, "divisible by 4"),
        ((2, 4, 16, 16), (2,), {}, "expected N × 3"),
        ((0, 3, 16, 16), (0,), {}, "expected N × 3"),
        ((2, 3, 16, 16), (3,), {}, "one timestep per image"),
        ((2, 3, 16, 16), (2,), {"patch_batch_size": 0}, "at least 1"),
        ((2, 3, 16, 16), (2,), {"rows": slice(0, 9)}, "do not fit 2 images"),
        ((2, 3, 16, 16), (2,), {"rows": slice(0, 2), "patch_batch_size": 2}, "not both"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_config: ModelConfig, x_t: tuple[int, ...], t: tuple[int, ...], chunks: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        PatchUNet(tiny_config)(torch.zeros(x_t), torch.zeros(t, dtype=torch.int64), **chunks)


@pytest.mark.cuda
def test_gives_the_same_on_a_gpu() -> None:
    model, x_t, t = build(**CONFIGS["released shape"])
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with torch.no_grad():
            expected = model(x_t, t)
            model.cuda()
            for patch_batch_size in (None, 5):
                out = model(x_t.cuda(), t.cuda(), patch_batch_size)
                torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-4)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
