"""What the paper's two conditionings are for, switched off one by one; and the alternating grid, which moves the seams."""

import pytest
import torch
from torch import Tensor

from pbbench.config import DiffusionConfig, ModelConfig, SamplingConfig, parse_experiment
from pbbench.errors import InputError
from pbbench.model.diffusion import Diffusion
from pbbench.model.patching import merge, patch_position, shift, split
from pbbench.model.sampling import sample
from pbbench.model.unet import PatchUNet
from pbbench.training.setup import build_accelerator
from pbbench.training.train import train_step

SMALL = {"dim": 16, "dim_mults": (1, 2), "image_size": 16, "patch_divider": 2}


def network(**fields: object) -> PatchUNet:
    torch.manual_seed(0)
    return PatchUNet(ModelConfig(**(SMALL | fields)))  # type: ignore[arg-type]


@pytest.fixture
def x_t() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


T = torch.tensor([10, 700])


def test_without_position_equal_patches_get_equal_answers(x_t: Tensor) -> None:
    """A patch repeated over the image: told where it lies the network may answer differently, else it cannot."""
    repeated = x_t[:, :, :8, :8].repeat(1, 1, 2, 2)
    for told in (True, False):
        first, *others = split(network(position_conditioning=told)(repeated, T), 2).chunk(4)
        same = all(torch.allclose(first, other, atol=1e-6) for other in others)
        assert same is not told


def test_without_global_content_a_patch_does_not_see_the_rest(x_t: Tensor) -> None:
    changed = x_t.clone()
    changed[:, :, 8:, 8:] += 1
    for shown in (True, False):
        model = network(global_content=shown)
        before, after = (model(x, T)[:, :, :8, :8] for x in (x_t, changed))
        assert torch.allclose(before, after, atol=1e-6) is not shown


def test_an_ablated_network_has_no_idle_parameters(x_t: Tensor) -> None:
    for fields in ({"position_conditioning": False}, {"global_content": False}, {"alternating_grid": True}):
        model = network(**fields)
        grids = (0, 1) if "alternating_grid" in fields else (0,)
        sum(model(x_t, T, grid=grid).square().mean() for grid in grids).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None and p.grad.any() for p in model.parameters()), fields


@pytest.mark.parametrize("fields", [{"position_conditioning": False}, {"global_content": False}, {"alternating_grid": True}])
@pytest.mark.parametrize("grid", [0, 1])
def test_any_chunk_gives_the_same(fields: dict[str, bool], grid: int, x_t: Tensor) -> None:
    if grid and "alternating_grid" not in fields:
        return
    model = network(**fields).eval()
    with torch.no_grad():
        together = model(x_t, T, grid=grid)
        for chunk in (1, 2, 3):
            torch.testing.assert_close(model(x_t, T, patch_batch_size=chunk, grid=grid), together)
        pieces = [model(x_t, T, rows=slice(n, n + 2), grid=grid) for n in range(0, 8, 2)]
        torch.testing.assert_close(shift(merge(torch.cat(pieces), 2), 2, -grid), together)


def test_shifting_there_and_back(x_t: Tensor) -> None:
    for d in (1, 2, 4):
        moved = shift(x_t, d, 1)
        assert not torch.equal(moved, x_t)
        assert torch.equal(shift(moved, d, -1), x_t)
        assert torch.equal(moved[0, 0, 0, 0], x_t[0, 0, 8 // d, 8 // d])
    assert shift(x_t, 2, 0) is x_t


def test_the_two_grids_have_places_of_their_own() -> None:
    places = torch.cat([patch_position(slice(0, 4), 1, 2, torch.device("cpu"), grid=grid, grids=2) for grid in (0, 1)])
    assert torch.equal(places, torch.eye(8))


def test_on_the_other_grid_the_pixels_across_a_border_meet() -> None:
    """Without global content, what lies across a border reaches a pixel only on the shifted grid."""
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([500])
    changed = x.clone()
    changed[:, :, :, 8] += 1  # the first column beyond the border between the patches
    model = network(alternating_grid=True, global_content=False).eval()
    with torch.no_grad():
        for grid, reached in ((0, False), (1, True)):
            before, after = (model(image, t, grid=grid)[:, :, :, 7] for image in (x, changed))
            assert torch.allclose(before, after, atol=1e-6) is not reached


def test_sampling_and_training_use_both_grids(x_t: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = network(alternating_grid=True), []
    forward = PatchUNet.forward

    def spy(self: PatchUNet, *args: object, grid: int = 0, **named: object) -> Tensor:
        seen.append(grid)
        return forward(self, *args, grid=grid, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(PatchUNet, "forward", spy)
    diffusion = Diffusion(DiffusionConfig(num_train_timesteps=50), "cpu")
    for sampler in ("ddpm", "ddim"):
        seen.clear()
        config = SamplingConfig(sampler=sampler, num_inference_steps=4)  # type: ignore[arg-type]
        assert sample(model, diffusion, config, range(1), device="cpu").shape == (1, 3, 16, 16)
        assert seen == [1, 0, 1, 0]


@pytest.mark.parametrize("grid", [0, 1])
def test_the_gradient_of_a_chunked_step_is_that_of_the_plain_loss(grid: int, x_t: Tensor) -> None:
    model, noise, t = network(alternating_grid=True), torch.randn(2, 3, 16, 16), torch.tensor([3, 40])
    diffusion = Diffusion(DiffusionConfig(num_train_timesteps=50), "cpu")
    x = diffusion.q_sample(x_t, t, noise)
    (model(x, t, grid=grid) - noise).abs().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    accelerator = build_accelerator(parse_experiment({"model": SMALL}, "test"), "cpu")

    class Keep:
        def step(self) -> None: ...
        def zero_grad(self, set_to_none: bool) -> None: ...

    train_step(
        model, x_t, t, noise, diffusion=diffusion, optimizer=Keep(), accelerator=accelerator, patch_batch_size=3, grid=grid
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_what_is_refused(x_t: Tensor) -> None:
    with pytest.raises(InputError, match="alternating_grid"):
        network()(x_t, T, grid=1)
    with pytest.raises(InputError, match="position_conditioning"):
        parse_experiment({"model": {"alternating_grid": True, "position_conditioning": False}}, "test")
