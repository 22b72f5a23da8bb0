"""Does the network run on this machine's GPU? A training pass of a tiny one, down to maps of one pixel and of one row, in
every precision, held against the CPU's: ``python -m pbbench.doctor.network DEVICE`` prints JSON, ``failed``: precision → why,
or null; ``not_fused``: why the fused operators are left out, or null. A process of its own: an operator that a GPU refuses can
leave CUDA unusable.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings

import torch
from torch import Tensor

from pbbench.errors import one_line
from pbbench.experiment.settings import ModelConfig, Precision
from pbbench.model import kernels
from pbbench.model.placement import arranged
from pbbench.model.sampling import autocast
from pbbench.model.unet import PatchUNet

PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
SIZES = ((8, 8), (8, 32))
"""Of images in 4 × 4 patches: the deepest maps are one pixel, and one row of four."""


TOLERANCE = 0.2
"""Of all values' norm. bfloat16 on a CPU: 0.05 for the worst of 30 random networks; what is wrong is further off."""


def failures(device: torch.device) -> dict[str, str | None]:
    """Precision → what a pass of one image, forward and backward, raised or got wrong; None: nothing."""
    found: dict[str, str | None] = {}
    for precision in PRECISIONS:
        found[precision] = None
        for size in SIZES:
            try:
                _try(size, precision, device)
            except Exception as error:
                found[precision] = one_line(error)[:200]
                break
    return found


def _try(size: tuple[int, int], precision: Precision, device: torch.device) -> None:
    torch.manual_seed(0)
    config = ModelConfig(dim=32, dim_mults=(1, 2), image_size=size, patch_divider=4)
    model, x_t = PatchUNet(config), torch.randn(1, 3, *size)
    found = _pass(arranged(copy.deepcopy(model).to(device)), x_t.to(device), precision)
    with kernels.nowhere():
        expected = _pass(model, x_t, "no")
    for what, ours, right in zip(("output", "gradient"), found, expected, strict=True):
        if not (ours.cpu() - right).norm() <= TOLERANCE * right.norm():  # "not": it may be NaN
            raise RuntimeError(f"the {what} at {size[0]}×{size[1]} is not what the CPU computes")


def _pass(model: PatchUNet, x_t: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """The output for one patch, and the gradient of the first convolution."""
    with autocast(x_t.device, precision):
        out = model(x_t, torch.tensor([500], device=x_t.device), rows=slice(0, 1))
    return out.detach(), torch.autograd.grad(out.sum(), model.stem.weight)[0]


def not_fused(device: torch.device) -> str | None:
    """Why the fused operators do not run there; None: they do."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if kernels.usable(torch.empty(1, device=device)):
            return None
    if said:
        return str(said[-1].message)
    return "Triton is not installed, or the GPU is older than Ampere, so steps take aten's kernels and longer"


if __name__ == "__main__":
    asked = torch.device(sys.argv[1])
    print(json.dumps({"not_fused": not_fused(asked), "failed": failures(asked)}))
