"""What CUDA's attention kernels ask of q, k and v, asked of every size and divider: on the maps of one pixel, too."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from pbbench.errors import InputError
from pbbench.experiment.experiment import parse_experiment
from pbbench.model.unet import PatchUNet

ALIGNED = 8
"""Elements: 16 bytes in 16 bits, 32 in float32."""


def shapes():
    """(image size, divider, levels) of every network that fits."""
    for size, d, levels in itertools.product((8, 32, (8, 32)), (1, 2, 4, 8), (1, 2, 3, 4)):
        model = {"dim": 8, "dim_mults": [1, 2, 4, 8][:levels], "image_size": size, "patch_divider": d}
        try:
            yield parse_experiment({"model": model}, "the test").model
        except InputError:
            continue


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_size_and_divider_gives_strides_that_cuda_takes(monkeypatch, dtype):
    attend, seen = F.scaled_dot_product_attention, []

    def watched(*qkv):
        for x in qkv:
            *others, last = x.stride()
            assert last == 1, (x.shape, x.stride())
            assert all(stride % ALIGNED == 0 for stride in others), (x.shape, x.stride())
        seen.append(qkv[0].shape[2])
        return attend(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with FakeTensorMode():
        for config in shapes():
            model = PatchUNet(config)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                model(torch.empty(1, 3, *config.size), torch.zeros(1, dtype=torch.int64))
    assert 1 in seen  # a map of one pixel
    assert 4 in seen  # of one row
