"""The fused operators against lean's aten code in float64, forward and gradients: on a GPU, or in Triton's interpreter.

Without TRITON_INTERPRET they are tests of a GPU, as every test marked ``cuda``; ``test_kernels_without_gpu.py`` runs this file
once more in the interpreter, in a process of its own, because Triton reads that variable when it is imported. Sizes are small:
the interpreter takes some 20 ms a program. ``small_tiles`` divides such small maps the way large ones are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pbbench.model import kernels, lean
from pbbench.model.kernels import tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), *([] if INTERPRETED else [pytest.mark.cuda])]

STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}
"""What rounding the exact result once may change, in parts of the largest; float32 sums a little. The interpreter cuts bfloat16
off instead of rounding it."""
LAYOUTS = [torch.contiguous_format, torch.channels_last]
both_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
all_dtypes = pytest.mark.parametrize("dtype", list(STEP), ids=str)


@pytest.fixture(autouse=True)
def _operators() -> Iterator[None]:
    if not INTERPRETED:
        assert kernels.usable(torch.empty(1, 1, 1, 1, device=DEVICE))
    with kernels.everywhere():
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of more than 64 elements are up to 4 parts of one or more tiles of 64 or 32; pixels of a channel up to 2 spans."""
    for name, value in {"WHOLE": 64, "TILE": 64, "PARTS": 4, "SPANS": 2, "PROGRAMS": 4}.items():
        monkeypatch.setattr(tiles, name, value)


def random_map(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, mean: float = 3.0) -> Tensor:
    """Far from mean 0, where E[x²] − E[x]² would lose what the variance needs."""
    return (torch.randn(shape) * 2 + mean).to(DEVICE, dtype).to(memory_format=layout)


def assert_equals_float64(function: Callable[..., Tensor], inputs: list[Tensor | None], pull: Tensor) -> Tensor:
    """The function of float32 or 16-bit inputs and its gradients are those of float64, rounded once; returns its value."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    out, expected = function(*leaves), function(*exact)
    assert_rounded(out, expected)
    wanted = [[x for x in group if x is not None] for group in (leaves, exact)]
    ours, theirs = torch.autograd.grad(out, wanted[0], pull), torch.autograd.grad(expected, wanted[1], pull.double())
    for leaf, mine, other in zip(wanted[0], ours, theirs, strict=True):
        assert mine.dtype == leaf.dtype
        assert mine.shape == leaf.shape
        assert_rounded(mine, other)
    return out.detach()


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    largest = exact.abs().max().item()
    assert (found.double() - exact).abs().max().item() <= STEP[found.dtype] * largest + 1e-5


# norm_silu


def norm_parts(rows: int, channels: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """weight and bias in float32, as autocast leaves them, and the halves of a modulation in the map's dtype."""
    affine = [torch.randn(channels, device=DEVICE) for _ in range(2)]
    return affine, list(torch.randn(rows, 2 * channels, device=DEVICE).to(dtype).chunk(2, 1))


def check_norm(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: torch.memory_format, modulated: bool, residual: bool
) -> None:
    x = random_map(shape, dtype, layout)
    affine, modulation = norm_parts(*shape[:2], dtype)
    more = random_map(shape, dtype, layout) if residual else None

    def function(x: Tensor, weight: Tensor, bias: Tensor, modulation: Any, more: Any) -> Tensor:
        return lean.norm_silu(x, weight, bias, modulation, groups, 1e-5, more)

    inputs = [x, *affine, torch.cat(modulation, 1) if modulated else None, more]
    y = assert_equals_float64(function, inputs, random_map(shape, dtype, layout, 0.0))
    assert y.stride() == x.stride()


@both_layouts
@all_dtypes
@pytest.mark.parametrize(
    ("shape", "groups", "modulated", "residual"),
    [((2, 12, 3, 5), 2, True, False), ((1, 6, 1, 1), 3, False, True), ((1, 5, 4, 1), 1, True, True)],
)
def test_norm_silu(
    shape: tuple[int, ...], groups: int, modulated: bool, residual: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    check_norm(shape, groups, dtype, layout, modulated, residual)


@both_layouts
@all_dtypes
@pytest.mark.parametrize(
    ("shape", "groups", "modulated", "residual"),
    [((1, 10, 9, 5), 2, False, True), ((2, 35, 2, 1), 1, True, False)],
)
def test_norm_silu_in_parts(
    shape: tuple[int, ...],
    groups: int,
    modulated: bool,
    residual: bool,
    dtype: torch.dtype,
    layout: torch.memory_format,
    small_tiles: None,
) -> None:
    cut = tiles.whole_or_parts(shape[1] // groups, shape[2] * shape[3], layout == torch.channels_last, 1)
    assert 1 < cut.parts <= 4
    check_norm(shape, groups, dtype, layout, modulated, residual)


@pytest.mark.parametrize("divided", [False, True])
def test_the_statistics_are_those_of_torch(divided: bool, request: pytest.FixtureRequest) -> None:
    if divided:
        request.getfixturevalue("small_tiles")
    x = random_map((2, 8, 5, 5), torch.float32, torch.channels_last, mean=300.0)
    weight = torch.ones(8, device=DEVICE)
    _, mean, rstd = kernels.norm_silu(x, weight, weight, None, None, None, 2, 1e-5)
    exact = x.double().reshape(2, 2, -1)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (exact.var(2, correction=0) + 1e-5).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("divided", [False, True])
def test_norm_silu_again_needs_only_the_statistics(divided: bool, request: pytest.FixtureRequest) -> None:
    if divided:
        request.getfixturevalue("small_tiles")
    x = random_map((2, 6, 5, 5), torch.float32, torch.contiguous_format)
    affine, modulation = norm_parts(2, 6, torch.float32)
    y, mean, rstd = kernels.norm_silu(x, *affine, *modulation, None, 2, 1e-5)
    again = kernels.norm_silu_again(x, *affine, *modulation, mean, rstd, 2)
    torch.testing.assert_close(again, y, rtol=1e-6, atol=1e-6)
    assert not torch.equal(kernels.norm_silu_again(x, *affine, *modulation, mean + 1, rstd, 2), again)


def test_recomputed_takes_it_from_there() -> None:
    x, convolution = random_map((1, 4, 3, 3), torch.float32, LAYOUTS[0]).requires_grad_(), torch.nn.Conv2d(4, 4, 3).to(DEVICE)
    affine, modulation = norm_parts(1, 4, torch.float32)
    gradients = []
    for again in (False, True):
        y = lean.norm_silu(x, *affine, torch.cat(modulation, 1), 2, 1e-5)
        with lean.recomputed(y) if again else torch.enable_grad():
            out = convolution(y)
        gradients.append(torch.autograd.grad(out.sin().sum(), [x, *convolution.parameters()]))
    for kept, made in zip(*gradients, strict=True):
        torch.testing.assert_close(made, kept)


def test_maps_are_read_as_they_lie(small_tiles: None) -> None:
    """A slice of another map's channels, a residual in the other layout, one gradient for all pixels; one that is copied."""
    both = random_map((2, 12, 3, 5), torch.float32, torch.channels_last)
    affine, _ = norm_parts(2, 6, torch.float32)
    more = random_map((2, 6, 3, 5), torch.float32, torch.contiguous_format)

    def function(x: Tensor, weight: Tensor, bias: Tensor, more: Tensor) -> Tensor:
        return lean.norm_silu(x, weight, bias, None, 2, 1e-5, more)

    everywhere_the_same = torch.randn(2, 6, 1, 1, device=DEVICE).expand(2, 6, 3, 5)
    assert_equals_float64(function, [both[:, 3:9], *affine, more], everywhere_the_same)
    turned = random_map((2, 6, 5, 3), torch.float32, torch.contiguous_format).transpose(2, 3)
    assert_equals_float64(function, [turned, *affine, more], everywhere_the_same)


# channel_norm


def channel_parameters(channels: int) -> list[Tensor]:
    return [torch.randn(1, channels, 1, 1, device=DEVICE) for _ in range(2)]


def normalise(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    return lean.channel_norm(x, scale, shift, residual=residual)


@both_layouts
@all_dtypes
@pytest.mark.parametrize(("shape", "residual"), [((2, 5, 3, 7), True), ((3, 24, 1, 1), False), ((1, 8, 4, 4), False)])
def test_channel_norm(shape: tuple[int, ...], residual: bool, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = random_map(shape, dtype, layout)
    inputs = [x, *channel_parameters(shape[1]), random_map(shape, dtype, layout) if residual else None]
    y = assert_equals_float64(normalise, inputs, random_map(shape, dtype, layout, 0.0))
    assert y.stride() == x.stride()
    with torch.no_grad():
        held = x.clone()
        out = lean.channel_norm(held, *inputs[1:3], overwrite=True, residual=inputs[3])
        assert out.data_ptr() == held.data_ptr()
        assert torch.equal(out, y)


@both_layouts
def test_channel_norm_sums_what_its_programs_leave(layout: torch.memory_format, small_tiles: None) -> None:
    """Tiles of 8 pixels, four programs of several tiles each."""
    shape = (3, 7, 5, 9)
    inputs = [random_map(shape, torch.float32, layout), *channel_parameters(7), None]
    assert_equals_float64(normalise, inputs, random_map(shape, torch.float32, layout, 0.0))


# The softmaxes of linear attention


def check_softmax(function: Callable[..., Tensor], x: Tensor) -> None:
    """The gradient is that of the rounded result, which is what is kept."""
    leaf, pull = x.detach().requires_grad_(), torch.randn(x.shape).to(x)
    y = function(leaf)
    (dx,) = torch.autograd.grad(y, leaf, pull)
    assert_rounded(y, function(x.double()))
    parts = (y.detach().double() * pull.double()).unflatten(1, (-1, 6))
    total = parts.sum(2, keepdim=True) / 0.4 if function is over_heads else parts.sum((3, 4), keepdim=True)
    assert_rounded(dx, (parts - y.double().unflatten(1, (-1, 6)) * total).flatten(1, 2))
    assert y.stride() == x.stride()
    laid = function(leaf, contiguous=True)
    assert laid.is_contiguous()
    assert torch.equal(laid, y)
    torch.testing.assert_close(torch.autograd.grad(laid, leaf, pull.contiguous())[0], dx)  # summed in another order
    with torch.no_grad():
        held = x.clone()
        out = function(held, overwrite=True)
        assert out.data_ptr() == held.data_ptr()
        assert torch.equal(out, y)


def over_heads(x: Tensor, **options: bool) -> Tensor:
    return lean.softmax_heads(x, 6, factor=0.4, **options)


@both_layouts
@all_dtypes
@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (3, 18, 1, 1)])
def test_softmaxes(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = random_map(shape, dtype, layout) * 3
    check_softmax(lean.softmax_pixels, x)
    check_softmax(over_heads, x)


@both_layouts
@all_dtypes
def test_softmax_of_pixels_in_spans(dtype: torch.dtype, layout: torch.memory_format, small_tiles: None) -> None:
    shape = (1, 6, 7, 19)
    cut = tiles.lines_or_parts(6, 133, layout == torch.channels_last, 1)
    assert cut.spans == 2
    assert cut.span > cut.pixels
    x = random_map(shape, dtype, layout) * 3
    x[:, :, 5] -= 100  # the largest of a span is not that of all
    check_softmax(lean.softmax_pixels, x)


def test_softmaxes_in_a_slice_of_the_convolutions_result() -> None:
    qk = random_map((2, 24, 3, 4), torch.float32, torch.channels_last)
    expected = qk.clone()
    expected[:, :12] = over_heads(qk[:, :12].double()).float()
    expected[:, 12:] = lean.softmax_pixels(qk[:, 12:].double()).float()
    with torch.no_grad():
        over_heads(qk[:, :12], overwrite=True)
        lean.softmax_pixels(qk[:, 12:], overwrite=True)
    torch.testing.assert_close(qk, expected)


# All of them


@pytest.mark.parametrize("divided", [False, True])
def test_results_repeat_to_the_bit(divided: bool, request: pytest.FixtureRequest) -> None:
    if divided:
        request.getfixturevalue("small_tiles")
    x = random_map((2, 8, 4, 5), torch.float32, torch.channels_last)
    affine, modulation = norm_parts(2, 8, torch.float32)

    def run() -> list[Tensor]:
        y, mean, rstd = kernels.norm_silu(x, *affine, *modulation, x, 2, 1e-5)
        made = [y, mean, rstd, *kernels.norm_silu_backward(y, x, *affine, *modulation, mean, rstd, 2)]
        return [*made, *kernels.channel_norm_backward(y, x, affine[0], 1e-5), kernels.softmax_pixels(x)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments for it."""
    x = random_map((2, 8, 3, 4), torch.bfloat16, torch.channels_last)
    affine, modulation = norm_parts(2, 8, torch.bfloat16)
    y, mean, rstd = kernels.norm_silu(x, *affine, *modulation, x, 2, 1e-5)
    scale, shift = channel_parameters(8)
    return [
        (kernels.norm_silu, (x, *affine, *modulation, y, 2, 1e-5)),
        (kernels.norm_silu, (x, *affine, None, None, None, 2, 1e-5)),
        (kernels.norm_silu_again, (x, *affine, *modulation, mean, rstd, 2)),
        (kernels.norm_silu_backward, (y, x, *affine, *modulation, mean, rstd, 2)),
        (kernels.norm_silu_backward, (y, x, *affine, None, None, mean, rstd, 2)),
        (kernels.channel_norm, (x, scale, shift, y, 1e-5)),
        (kernels.channel_norm_, (x.clone(), scale, shift, y, 1e-5)),
        (kernels.channel_norm_backward, (y, x, scale, 1e-5)),
        (kernels.softmax_pixels, (x[:, 2:],)),
        (kernels.softmax_pixels, (x[:, 2:], True)),
        (kernels.softmax_pixels_, (x.clone(),)),
        (kernels.softmax_pixels_backward, (y, x)),
        (kernels.softmax_heads, (x, 4, 0.5)),
        (kernels.softmax_heads, (x, 4, 0.5, True)),
        (kernels.softmax_heads_, (x.clone(), 4, 0.5)),
        (kernels.softmax_heads_backward, (y, x, 4, 0.5)),
    ]


def test_the_fakes_are_as_the_operators() -> None:
    for operator, arguments in calls():
        torch.library.opcheck(operator, arguments)


def made_bytes(function: Callable[[], Any]) -> int:
    """Bytes of all tensors that were made meanwhile, those within an operator included."""
    if not INTERPRETED:
        before = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
        function()
        return torch.cuda.memory_stats()["requested_bytes.all.allocated"] - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("divided", [False, True])
@both_layouts
def test_nothing_is_made_but_the_results(layout: torch.memory_format, divided: bool, request: pytest.FixtureRequest) -> None:
    """And a few numbers for each part where a group is divided."""
    if divided:
        request.getfixturevalue("small_tiles")
    x = random_map((2, 16, 8, 8), torch.bfloat16, layout)
    affine, modulation = norm_parts(2, 16, torch.bfloat16)
    scale, shift = channel_parameters(16)
    both = torch.cat(modulation, 1)
    one_map, statistics = x.nbytes, 2 * 2 * 2 * 4
    parts = 2 * 2 * 4 * 2 * 4 if divided else 0
    spans = 2 * 16 * 2 * 2 * 4 if divided else 0
    with torch.no_grad():
        made = {
            "norm": made_bytes(lambda: lean.norm_silu(x, *affine, both, 2, 1e-5, x)),
            "channel": made_bytes(lambda: lean.channel_norm(x, scale, shift, residual=x)),
            "heads": made_bytes(lambda: lean.softmax_heads(x, 4)),
            "channel_": made_bytes(lambda: lean.channel_norm(x, scale, shift, overwrite=True)),
            "heads_": made_bytes(lambda: lean.softmax_heads(x, 4, overwrite=True)),
            "pixels_": made_bytes(lambda: lean.softmax_pixels(x, overwrite=True)),
        }
    assert made["norm"] <= one_map + statistics + parts
    assert (made["channel"], made["heads"]) == (one_map, one_map)
    assert (made["channel_"], made["heads_"]) == (0, 0)
    assert made["pixels_"] <= spans
