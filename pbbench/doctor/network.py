"""Does the network run on this machine's GPU? A training pass of a tiny one, down to maps of one pixel and of one row, in
every precision: ``python -m pbbench.doctor.network DEVICE`` prints JSON, precision → why it failed, or null. A process of its
own: an operator that a GPU refuses can leave CUDA unusable.
"""

from __future__ import annotations

import json
import sys

import torch

from pbbench.errors import one_line
from pbbench.experiment.settings import ModelConfig, Precision
from pbbench.model.placement import arranged
from pbbench.model.sampling import autocast
from pbbench.model.unet import PatchUNet

PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
SIZES = ((8, 8), (8, 32))
"""Of images in 4 × 4 patches: the deepest maps are one pixel, and one row of four."""


def failures(device: torch.device) -> dict[str, str | None]:
    """Precision → what a pass of one image, forward and backward, raised; None: nothing."""
    found: dict[str, str | None] = {}
    for precision in PRECISIONS:
        found[precision] = None
        for size in SIZES:
            try:
                with device:
                    config = ModelConfig(dim=8, dim_mults=(1, 2), image_size=size, patch_divider=4, resnet_block_groups=2)
                    model = arranged(PatchUNet(config))
                    with autocast(device, precision):
                        out = model(torch.randn(1, 3, *size), torch.tensor([500]), rows=slice(0, 1))
                    out.float().square().sum().backward()
                if not torch.isfinite(out).all():
                    raise RuntimeError(f"the output at {size[0]}×{size[1]} is not finite")
            except Exception as error:
                found[precision] = one_line(error)[:200]
                break
    return found


if __name__ == "__main__":
    print(json.dumps(failures(torch.device(sys.argv[1]))))
