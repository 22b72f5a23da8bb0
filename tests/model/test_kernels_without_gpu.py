"""What can be known of the fused operators without a GPU: that they are right in Triton's interpreter, that the compiler takes
them for Hopper, when they are taken, what their fakes say, and how maps are divided."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hopper_compiler import Compiled, compiled_for_hopper, resources
from packaging.version import Version
from steps_on_fake_tensors import measured, sampling, training
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pbbench.model import kernels, lean
from pbbench.model.kernels import choice, tiles
from pbbench.sweep.workload import sampling_workload, training_workload

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


# In the interpreter


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """Both files of tests. The interpreter of Triton 3.6 counts its loops in a way that NumPy 2.4 has given up."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with NumPy {numpy.__version__}")
    files = [str(Path(__file__).with_name(name)) for name in ("test_kernels.py", "test_kernels_network.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    assert "skipped" not in done.stdout


# Compiled for Hopper


def every_operator(rows: int, channels: int, side: int, dtype: torch.dtype, layout: torch.memory_format, plain: bool) -> None:
    """Launch all; plain: without scale, shift and residual."""
    x = torch.empty(rows, channels, side, side, dtype=dtype).to(memory_format=layout)
    weight, scale = torch.empty(channels), torch.empty(1, channels, 1, 1)
    modulation = (None, None) if plain else torch.empty(rows, 2 * channels, dtype=dtype).chunk(2, 1)
    residual = None if plain else x
    _, mean, rstd = kernels.norm_silu(x, weight, weight, *modulation, residual, 8, 1e-5)
    kernels.norm_silu_again(x, weight, weight, *modulation, mean, rstd, 8)
    kernels.norm_silu_backward(x, x, weight, weight, *modulation, mean, rstd, 8)
    kernels.channel_norm(x, scale, scale, residual, 1e-5)
    kernels.channel_norm_backward(x, x, scale, 1e-5)
    qk = torch.empty(rows, 256, side, side, dtype=dtype).to(memory_format=layout)
    q, k = qk.chunk(2, 1)
    kernels.softmax_pixels(k)
    kernels.softmax_pixels_backward(k, k)
    kernels.softmax_heads(q, 32, 32**-0.5)
    kernels.softmax_heads_backward(q, q, 32, 32**-0.5)


def assert_fit_for_hopper(found: list[Compiled], folder: Path) -> None:
    for kernel in found:
        used = resources(kernel, folder)
        assert used["REG"] * 32 * kernel.constants["num_warps"] <= 2**16, kernel.name
        assert used["STACK"] <= 32, (kernel.name, kernel.constants, used)  # no tile is spilled to memory
        assert used["SHARED"] <= 48 * 1024, kernel.name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_compiler_takes_every_kernel(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Maps of the first level, in parts, and of the last one of a small patch; every map is loaded 16 bytes at a time."""
    pytest.importorskip("triton")
    from pbbench.model.kernels import programs
    from pbbench.model.kernels.programs import channel, norm, softmax

    with compiled_for_hopper(tmp_path / "cache") as found:
        every_operator(8, 128, 128, dtype, LAYOUTS[layout], plain=False)
        if layout == "contiguous":
            kernels.softmax_pixels_backward(*(torch.empty(1, 128, 256, 256, dtype=dtype) for _ in range(2)))
            kernels.softmax_pixels(torch.empty(1, 128, 256, 256, dtype=dtype))
        large = len(found)
        every_operator(8, 512, 4, dtype, LAYOUTS[layout], plain=False)
    assert_fit_for_hopper(found, tmp_path)
    for kernel in found[:large]:
        assert 16 in kernel.vectors, (kernel.name, kernel.vectors)
    public = {
        f"{module.__name__}.{name}"
        for module in (norm, channel, softmax)
        for name, value in vars(module).items()
        if hasattr(value, "warmup") and not name.startswith("_") and value.fn.__module__ == module.__name__
    }
    assert public == {kernel.name for kernel in found}
    assert all(name.startswith(programs.__name__) for name in public)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "side", "dtype"), [(24, 7, torch.float16), (1024, 1, torch.bfloat16), (8, 1, torch.float32)]
)
def test_the_compiler_takes_odd_maps(channels: int, side: int, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    with compiled_for_hopper(tmp_path / "cache") as found:
        every_operator(1, channels, side, dtype, torch.contiguous_format, plain=True)
    assert_fit_for_hopper(found, tmp_path)


# Where they are taken


def test_who_takes_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty(1, 8, 2, 2)
    with FakeTensorMode():
        fake, fake_cpu = torch.empty(1, 8, 2, 2, device="cuda"), torch.empty(1, 8, 2, 2)
        double = torch.empty(1, 8, 2, 2, device="cuda", dtype=torch.float64)
    monkeypatch.setattr(choice, "_triton_is_here", lambda: True)
    assert kernels.usable(fake)
    assert not any(kernels.usable(x) for x in (real, fake_cpu, double))
    with kernels.everywhere():
        assert all(kernels.usable(x) for x in (real, fake, fake_cpu))
        assert not kernels.usable(double)
        with kernels.nowhere():
            assert not kernels.usable(fake)
        assert kernels.usable(real)
    assert not kernels.usable(real)
    monkeypatch.setattr(choice, "_triton_is_here", lambda: False)
    assert not kernels.usable(fake)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of Triton's kind, as far as ``_works_on`` looks; ``error`` is what its first launch raises."""
    stand_in = SimpleNamespace(device=torch.device("meta"), capability=(9, 0), error=None)

    def launched(*_: Any) -> None:
        if stand_in.error is not None:
            raise stand_in.error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: stand_in.capability)
    monkeypatch.setattr("pbbench.model.kernels.softmax.softmax_heads", launched)
    stand_in.works = lambda: choice._works_on.__wrapped__(stand_in.device)
    return stand_in


def test_a_card_without_a_compiler_has_aten(card: SimpleNamespace) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert card.works()
    card.error = RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")
    with pytest.warns(UserWarning, match=r"Triton does not work on meta, .*: Failed to find C compiler\.$"):
        assert not card.works()
    card.error = torch.OutOfMemoryError("out of memory")  # says nothing about Triton
    with pytest.raises(torch.OutOfMemoryError):
        card.works()
    card.error, card.capability = None, (7, 5)
    assert not card.works()


# Fakes


def test_fakes_lie_as_the_maps_do() -> None:
    """On a fake GPU, without Triton: shapes, dtypes and strides of what the operators return."""
    with FakeTensorMode(), torch.device("cuda"):
        for layout in LAYOUTS.values():
            x = torch.empty(2, 16, 4, 6, dtype=torch.bfloat16).to(memory_format=layout)
            weight, modulation = torch.empty(16), torch.empty(2, 32, dtype=torch.bfloat16).chunk(2, 1)
            y, mean, rstd = kernels.norm_silu(x, weight, weight, *modulation, None, 8, 1e-5)
            assert (y.dtype, y.stride(), y.device.type) == (x.dtype, x.stride(), "cuda")
            assert mean.shape == rstd.shape == (2, 8)
            dx, dweight, _, dmodulation = kernels.norm_silu_backward(y, x, weight, weight, *modulation, mean, rstd, 8)
            assert (dx.stride(), dweight.dtype) == (x.stride(), torch.float32)
            assert (dmodulation.shape, dmodulation.dtype) == ((2, 32), torch.bfloat16)
            assert kernels.softmax_pixels(x[:, 4:8]).stride() == x[:, :4].clone(memory_format=layout).stride()
            assert lean.channel_norm(x, weight, weight, overwrite=True) is not x  # gradients are recorded
            with torch.no_grad():
                assert lean.channel_norm(x, weight, weight, overwrite=True) is x


@pytest.mark.parametrize("step", [sampling, training])
def test_all_patches_in_one_pass_hold_no_more_than_in_aten(step: Any) -> None:
    """Small maps in many rows, where summaries and copies of the attention weigh the most; float32."""
    model = {"dim": 128, "dim_mults": [1, 2, 4, 8], "image_size": 128, "patch_divider": 8}
    with kernels.everywhere():
        fused = step(model, 1, "all").peak_bytes
    assert fused <= step(model, 1, "all").peak_bytes


class Convolutions(TorchDispatchMode):
    """Counts the maps and weights that convolutions, forward and backward, do not find in channels_last."""

    turned = total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            for x in args[: 3 if "backward" in func.__name__ else 2]:
                self.total += 1
                self.turned += not x.is_contiguous(memory_format=torch.channels_last)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_convolutions_find_maps_and_weights_in_channels_last(precision: str) -> None:
    """But for one gradient a pass: the upsampling before the last level has that of a slice of (x, skip)."""
    model = {"dim": 8, "dim_mults": [1, 2, 2], "image_size": 32, "patch_divider": 2}
    experiment, cell = measured(model, 2, 3, {"mixed_precision": precision})
    for build, turned in ((sampling_workload, 0), (training_workload, 3)):  # 8 patches, three passes
        with FakeTensorMode(), kernels.everywhere():
            step = build(experiment, cell, torch.device("cpu"))
            with Convolutions() as found:
                step.run()
        assert found.total > 100
        assert found.turned == turned


# On CUDA without them


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel: those whose results are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = any(value.alias_info is None or value.alias_info.is_write for value in func._schema.returns)
        self.count += made and "empty" not in func.__name__
        return func(*args, **(kwargs or {}))


class Context:
    """What an autograd.Function is given; gradients of fake CUDA tensors cannot go through autograd without a GPU."""

    needs_input_grad = (True,) * 8

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def launches(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Of one norm_silu and one channel_norm, forward and backward, on aten's kernels of a GPU."""
    with FakeTensorMode(), torch.device("cuda"), kernels.nowhere():
        x, weight, scale = torch.empty(shape, dtype=dtype), torch.empty(shape[1]), torch.empty(1, shape[1], 1, 1)
        modulation = torch.empty(shape[0], 2 * shape[1], dtype=dtype)
        with Launches() as counted:
            context = Context()
            lean._NormSiLU.backward(context, lean._NormSiLU.forward(context, x, weight, weight, modulation, 8, 1e-5, None))
            context = Context()
            lean._ChannelNorm.backward(context, lean._ChannelNorm.forward(context, x, scale, scale, 1e-5, None))
    return counted.count


@pytest.mark.parametrize("shape", [(8, 128, 128, 128), (128, 128, 32, 32), (512, 1024, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_launch_at_most_twice_what_float32_does(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = launches(torch.float32, shape)
    assert exact < launches(dtype, shape) <= 2 * exact
    monkeypatch.setattr(lean, "CUDA_PIECE", lean.PIECE)  # in a CPU's pieces it would be far more
    if math.prod(shape) > 4 * lean.PIECE:
        assert launches(dtype, shape) > 4 * exact


# How maps are divided


@pytest.mark.parametrize("along_channels", [False, True])
@pytest.mark.parametrize("maps", [1, 2])
def test_parts_cover_a_group_once(along_channels: bool, maps: int) -> None:
    sizes = [1, 2, 3, 6, 16, 31, 64, 100, 128, 256, 1024, 4096]
    for channels in sizes:
        for pixels in (*sizes, 16_384, 65_536, 10**6):
            cut = tiles.whole_or_parts(channels, pixels, along_channels, maps)
            assert cut.parts <= tiles.PARTS
            assert_covered(cut, channels, pixels)
            assert (cut.parts == 1) == (tiles.power_of_two(channels) * tiles.power_of_two(pixels) <= tiles.WHOLE)
            lines = tiles.lines_or_parts(channels, pixels, along_channels, maps)
            assert lines.spans <= tiles.SPANS
            assert_covered(lines, channels, pixels)


def assert_covered(cut: tiles.Tiles, channels: int, pixels: int) -> None:
    """Every part has something, all of them everything, and a tile fits the registers of a program."""
    assert (cut.channel_parts - 1) * cut.channels < channels <= cut.channel_parts * cut.channels
    assert (cut.spans - 1) * cut.span < pixels <= cut.spans * cut.span
    assert cut.span % cut.pixels == 0
    assert cut.elements <= tiles.WHOLE


def test_how_maps_lie() -> None:
    x = torch.randn(2, 6, 4, 5)
    assert tiles.lies(x) == (120, 20, 1)
    assert tiles.lies(x.to(memory_format=torch.channels_last)) == (120, 1, 6)
    assert tiles.lies(x[:, 2:4]) == (120, 20, 1)
    assert tiles.lies(torch.empty(2, 1, 1, 1).expand(2, 6, 4, 5)) == (1, 0, 0)
    assert tiles.lies(x.transpose(2, 3)) is None
    assert tiles.lies(x[..., :3]) is None
    assert tiles.lies(x[..., :1]) == (120, 20, 5)
    for turned in (x.transpose(2, 3), x[..., :3], x[:, :, :1, :1]):
        copy, lie = tiles.evenly_spaced(turned)
        assert torch.equal(copy.as_strided((2, 6, turned[0, 0].numel()), lie), turned.flatten(2))
        assert tiles.lies(tiles.result(turned)) is not None
