"""What the paper's two conditionings are for, switched off one by one; and the border context, which is ours."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pbbench.experiment.settings import ModelConfig
from pbbench.memory.tracer.live import trace
from pbbench.model.patching import network_input, split
from pbbench.model.unet import PatchUNet

SMALL = {"dim": 16, "dim_mults": (1, 2), "image_size": 16, "patch_divider": 2}
SWITCHED = [{"position_conditioning": False}, {"global_content": False}, {"border_context": True}]
SWITCHED += [{"border_context": True, "global_content": False}]


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


@pytest.mark.parametrize("distance", [1, 3, 4])
def test_with_border_context_a_patch_sees_three_pixels_past_its_border(distance: int, x_t: Tensor) -> None:
    """Without global content, so that nothing else tells of the other patches."""
    changed = x_t.clone()
    changed[:, :, :8, 7 + distance] += 1  # beside the first patch; the patch below lies at a corner
    changed[:, :, 8 + distance - 1 :, :] += 1
    for border, reached in ((False, False), (True, distance <= 3)):
        model = network(border_context=border, global_content=False).eval()
        with torch.no_grad():
            before, after = (model(image, T)[:, :, :8, :8] for image in (x_t, changed))
        assert torch.allclose(before, after, atol=1e-6) is not reached


@pytest.mark.parametrize("with_content", [True, False])
def test_the_border_is_cut_from_the_padded_image(with_content: bool, x_t: Tensor) -> None:
    d, size, border = 4, 4, 3
    padded = F.pad(x_t, (border,) * 4)
    pieces = []
    for k in range(d * d):
        top, left = k // d * size, k % d * size
        patch = padded[:, :, top : top + size + 2 * border, left : left + size + 2 * border]
        content = F.pad(F.adaptive_avg_pool2d(x_t, (size, size)), (border,) * 4)
        pieces.append(torch.cat((patch, content), 1) if with_content else patch)
    expected = torch.cat(pieces)
    for rows in (slice(0, 32), slice(3, 8), slice(31, 32)):
        assert torch.equal(network_input(x_t, None, rows, d, with_content=with_content, border=border), expected[rows])


def test_border_context_on_a_whole_image_is_the_plain_network(x_t: Tensor) -> None:
    """Its border is the image's edge, beyond which both see zeros; and the weights are the same."""
    plain, other = network(patch_divider=1), network(patch_divider=1, border_context=True)
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(x_t, T), plain(x_t, T))


def test_border_context_costs_no_memory() -> None:
    config = SMALL | {"dim": 32, "image_size": 32}
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 700])
    peaks = []
    for border in (False, True):
        model = network(**config | {"border_context": border}).eval().requires_grad_(False)
        with torch.no_grad():
            peaks.append(trace(lambda: model(x_t, t, patch_batch_size=2), modules={"model": model}).peak_bytes)  # noqa: B023
    assert peaks[1] <= peaks[0]


@pytest.mark.parametrize("fields", SWITCHED)
def test_a_switched_network_has_no_idle_parameters(fields: dict[str, bool], x_t: Tensor) -> None:
    model = network(**fields)
    model(x_t, T).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("fields", SWITCHED)
def test_any_chunk_gives_the_same(fields: dict[str, bool], x_t: Tensor) -> None:
    model = network(**fields).eval()
    with torch.no_grad():
        together = model(x_t, T)
        for chunk in (1, 2, 3):
            torch.testing.assert_close(model(x_t, T, patch_batch_size=chunk), together)
        for n in range(0, 8, 2):
            torch.testing.assert_close(model(x_t, T, rows=slice(n, n + 2)), split(together, 2, slice(n, n + 2)))
