"""What must hold for every network, image, divider and chunk: checked on random ones, the same ones on every run.

Outputs and gradients are compared in float64, where nothing hides behind rounding; peaks are live bytes on fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_unet import plain_unet
from steps_on_fake_tensors import MIB, few_chunks, measured, sampling, training
from torch import Tensor

from pbbench.experiment.settings import ModelConfig
from pbbench.model.patching import merge, network_input, row_chunks, split, write_rows
from pbbench.model.reference import reference_name
from pbbench.model.unet import PatchUNet

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def some(count: int) -> Any:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@st.composite
def networks(draw: st.DrawFn, max_rows: int = 12, largest_width: int = 24) -> tuple[dict[str, Any], int, int]:
    """A network's configuration, a number of images, and patches per pass (at times more than there are)."""
    groups = draw(st.sampled_from([1, 2, 4]))
    d, levels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    unit = d * 2 ** (levels - 1)
    images = draw(st.integers(1, max(1, min(3, max_rows // d**2))))
    config = {
        "dim": 4 * groups * draw(st.integers(1, max(1, largest_width // (4 * groups)))),
        "dim_mults": [1, *(draw(st.sampled_from([1, 2, 3])) for _ in range(levels - 1))],
        "image_size": [unit * draw(st.integers(1, 4)), unit * draw(st.integers(1, 4))],
        "patch_divider": d,
        "channels": draw(st.integers(1, 3)),
        "resnet_block_groups": groups,
    }
    return config, images, draw(st.integers(1, images * d**2 + 1))


# Patches


@some(100)
@given(st.data())
def test_splitting_and_merging_are_each_others_inverse(data: st.DataObject) -> None:
    N, C, d, h, w = (data.draw(st.integers(1, 5)) for _ in range(5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]))
    images = torch.arange(N * C * d * h * d * w).view(N, C, d * h, d * w).to(dtype)
    patches = split(images, d)
    assert patches.shape == (N * d * d, C, h, w)
    assert torch.equal(merge(patches, d), images)
    written = torch.empty_like(images)
    for rows in row_chunks(N * d * d, data.draw(st.integers(1, N * d * d + 1))):
        assert torch.equal(split(images, d, rows), patches[rows])
        write_rows(written, patches[rows], rows, d)
        if dtype.is_floating_point:
            whole = network_input(images, None, slice(0, N * d * d), d)
            assert torch.equal(network_input(images, None, rows, d), whole[rows])
            assert torch.equal(whole[:, :C], patches)
    assert torch.equal(written, images)


# Outputs and gradients


@some(25)
@given(networks(), st.sampled_from(["none", "cheap", "full"]), st.integers(0, 10**6))
def test_chunked_equals_stacked_equals_the_plain_network(drawn: Any, recompute: Any, seed: int) -> None:
    config, images, patches = drawn
    torch.manual_seed(seed)
    with float64():
        model = PatchUNet(ModelConfig(**config)).set_recompute(recompute)
        d, groups = model.config.patch_divider, model.config.resnet_block_groups
        for parameter in model.parameters():  # a fresh norm's scale of 1 would hide a mistake
            parameter.data += 0.1 * torch.randn_like(parameter)
        x_t, t = torch.randn(images, model.config.channels, *model.config.size), torch.randint(0, 1000, (images,))
        pull = torch.randn_like(x_t)

        weights = {reference_name(name): p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        expected = plain_unet(weights, x_t, t, d, groups)
        (expected * pull).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(x_t, t), expected, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(model(x_t, t, patches), expected, rtol=1e-7, atol=1e-7)
        (model(x_t, t) * pull).sum().backward()
        assert_gradients(model, weights)
        model.zero_grad()
        for rows in row_chunks(images * d * d, patches):
            (model(x_t, t, rows=rows) * split(pull, d, rows)).sum().backward()
        assert_gradients(model, weights)


def assert_gradients(model: PatchUNet, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        expected = weights[reference_name(name)].grad
        assert parameter.grad is not None
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-7 * (1 + expected.abs().max().item()), msg=name)


@some(12)
@given(networks(), st.sampled_from(list(PRECISIONS)), st.integers(0, 10**6))
def test_in_16_bits_chunks_equal_the_stack_and_both_approximate_float32(drawn: Any, precision: str, seed: int) -> None:
    config, images, patches = drawn
    config = {**config, "dim": 32, "resnet_block_groups": 4, "image_size": [2 * side for side in config["image_size"]]}
    torch.manual_seed(seed)
    model = PatchUNet(ModelConfig(**config))
    x_t, t = torch.randn(images, model.config.channels, *model.config.size), torch.randint(0, 1000, (images,))
    with torch.no_grad():
        exact = model(x_t, t)
        with torch.autocast("cpu", dtype=PRECISIONS[precision]):
            stacked, chunked = model(x_t, t), model(x_t, t, patches)
    assert stacked.dtype == chunked.dtype == torch.float32
    allowed = (0.1 if precision == "bf16" else 0.0125) * exact.norm()
    assert 0 < (stacked - exact).norm() < allowed
    assert (chunked - stacked).norm() < allowed


# Peaks


@pytest.mark.slow
@some(12)
@given(networks(max_rows=12, largest_width=40), st.sampled_from(["no", "no", "bf16", "fp16"]))
def test_sampling_never_needs_more_for_fewer_patches_a_pass(drawn: Any, precision: str) -> None:
    config, images, patches = drawn
    total = images * config["patch_divider"] ** 2
    sizes = sorted({1, min(patches, total), total})
    with pytest.MonkeyPatch.context() as patch:
        few_chunks(patch)
        peaks = [sampling(config, images, size, mixed_precision=precision).peak_bytes for size in sizes]
    assert peaks == sorted(peaks), dict(zip(sizes, peaks, strict=True))


@pytest.mark.slow
@some(6)
@given(networks(max_rows=9, largest_width=24), st.sampled_from(["none", "cheap", "full"]), st.sampled_from(["no", "bf16"]))
def test_training_never_needs_more_for_smaller_chunks(drawn: Any, recompute: str, precision: str) -> None:
    """Among two chunks or more; against one chunk at most the gradients more, which then exist beside activations."""
    config, images, patches = drawn
    total = images * config["patch_divider"] ** 2
    sizes = sorted({1, min(patches, total), max(1, total // 2), total})
    with pytest.MonkeyPatch.context() as patch:
        few_chunks(patch)
        traces = {size: training(config, images, size, recompute=recompute, mixed_precision=precision) for size in sizes}
    peaks = [traces[size].peak_bytes for size in sizes if size < total]
    assert peaks == sorted(peaks), traces
    for peak in peaks:
        assert peak <= traces[total].peak_bytes + traces[total].by_category["parameter"]


@some(8)
@given(st.data())
def test_one_patch_index_at_a_time_divides_the_activations(data: st.DataObject) -> None:
    """At most the undivided network's over d², two images' batches, 1 MiB, and 0.25 MiB an image."""
    dim = 8 * data.draw(st.integers(1, 16))
    levels, d, images = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([2, 3, 4, 8])), data.draw(st.integers(1, 16))
    side = d * 2 ** (levels - 1) * data.draw(st.integers(1, 4))
    config = {"dim": dim, "dim_mults": [1, 2, 4, 8][:levels], "image_size": side}
    with pytest.MonkeyPatch.context() as patch:
        few_chunks(patch)
        whole = sampling({**config, "patch_divider": 1}, images, "index").by_category["activation"]
        divided = sampling({**config, "patch_divider": d}, images, "index").by_category["activation"]
    batch = measured({**config, "patch_divider": d}, images, "index")[0].model.channels * side**2 * 4 * images
    assert divided <= whole / d**2 + 2 * batch + MIB + 0.25 * MIB * images
