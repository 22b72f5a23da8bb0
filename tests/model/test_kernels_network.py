"""The whole network through the fused operators, channels_last and cast weights, against the same in aten: on a GPU, or in
Triton's interpreter (``test_kernels_without_gpu.py`` runs this file there)."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from pbbench.experiment.settings import ModelConfig
from pbbench.model import kernels
from pbbench.model.placement import arranged, cast_weights, small_weights_cast
from pbbench.model.unet import PatchUNet

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), *([] if INTERPRETED else [pytest.mark.cuda])]

NETWORKS = {
    "few and many pixels": {"dim": 8, "dim_mults": [1, 2], "image_size": [16, 8], "patch_divider": 2},
    "down to one pixel": {"dim": 8, "dim_mults": [1, 2], "image_size": 4, "patch_divider": 2},
}


def network(config: dict[str, Any]) -> tuple[PatchUNet, Tensor, Tensor]:
    torch.manual_seed(0)
    model = PatchUNet(ModelConfig(**{"resnet_block_groups": 2, **config})).to(DEVICE)
    for parameter in model.parameters():  # a fresh norm's scale of 1 would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randn(1, 3, *model.config.size, device=DEVICE), torch.tensor([700], device=DEVICE)


def passed(model: PatchUNet, x_t: Tensor, t: Tensor, dtype: torch.dtype, **how: Any) -> Tensor:
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
        return model(x_t, t, **how)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_aten(name: str, layout: str) -> None:
    model, x_t, t = network(NETWORKS[name])
    pull = torch.randn_like(x_t)
    with kernels.nowhere():
        expected = model(x_t, t)
        (expected * pull).sum().backward()
        sampled = model.eval()(x_t, t, patch_batch_size=3)
    theirs = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with kernels.everywhere():
        fused = arranged(copy.deepcopy(model)) if layout == "channels_last" else copy.deepcopy(model)
        found = fused(x_t, t)
        (found * pull).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(fused(x_t, t, patch_batch_size=3), sampled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for n, p in fused.named_parameters():
        wanted = theirs[n]
        assert p.grad is not None
        assert wanted is not None
        torch.testing.assert_close(p.grad, wanted, rtol=1e-3, atol=1e-4 * (1 + wanted.abs().max().item()), msg=n)


def test_weights_cast_together_are_those_that_autocast_makes() -> None:
    """To the bit: outputs and float32 gradients of a training pass; the output of a sampling pass with weights cast for
    good."""
    model, x_t, t = network(NETWORKS["few and many pixels"])
    model = arranged(model)
    gradients, outputs = [], []
    for together in (False, True):
        with kernels.everywhere(), pytest.MonkeyPatch.context() as patch:
            if not together:
                patch.setattr("pbbench.model.placement.SMALL", 0)
            out = passed(model, x_t, t, torch.bfloat16)
            out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert torch.equal(*outputs)
    for alone, with_others in zip(*gradients, strict=True):
        assert with_others is not None
        assert with_others.dtype == torch.float32
        assert torch.equal(alone, with_others)
    with torch.no_grad(), kernels.everywhere():
        kept = passed(model, x_t, t, torch.bfloat16)
        cast = cast_weights(copy.deepcopy(model), "bf16")
        assert torch.equal(passed(cast, x_t, t, torch.bfloat16), kept)
    sixteen = {n for n, p in cast.named_parameters() if p.dtype == torch.bfloat16}
    assert sixteen == {n for n, _ in cast.named_parameters() if "norm" not in n}


def test_where_nothing_is_to_be_cast_the_parameters_stay() -> None:
    model, _, _ = network(NETWORKS["few and many pixels"])
    before = dict(model.named_parameters())
    with kernels.everywhere(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        with small_weights_cast(model):
            assert not isinstance(model.stem.weight, torch.nn.Parameter)
        model.set_recompute("full")
        with small_weights_cast(model):  # a level runs again in backward, outside of the context
            assert isinstance(model.stem.weight, torch.nn.Parameter)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
    with torch.autocast(DEVICE, dtype=torch.bfloat16), kernels.nowhere(), small_weights_cast(model):
        assert isinstance(model.stem.weight, torch.nn.Parameter)
