"""The tutorial: one image through the six stops of the program, each done by hand beside the function that does it.

    load_image → q_sample → split → the network → merge → loss
                            └──── PatchUNet.forward ────┘

Read it from top to bottom with the four files of ``pbbench/model`` open: patching, layers, unet, diffusion. Every number is
checked, so what it says is true.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbbench.data.decode import decode
from pbbench.data.images import load_image, to_x_start
from pbbench.data.synthetic import scene
from pbbench.experiment.settings import DiffusionConfig, ModelConfig
from pbbench.model import diffusion as diffusion_module
from pbbench.model import layers, patching, unet
from pbbench.model.diffusion import Diffusion
from pbbench.model.patching import global_content, merge, row_chunks, split
from pbbench.model.unet import PatchUNet


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """An image file of 48 × 32 pixels (height × width)."""
    path = tmp_path / "scene.png"
    Image.fromarray(scene(seed=0, index=0, size=(48, 32))).save(path)
    return path


def test_one_image_through_the_program(photograph: Path) -> None:
    # The smallest model with every part: 2 × 2 patches of 16 × 16 pixels, two levels.
    config = ModelConfig(dim=8, dim_mults=(1, 2), image_size=32, patch_divider=2)
    model, d = PatchUNet(config), config.patch_divider
    diffusion = Diffusion(DiffusionConfig(prediction_type="epsilon", loss_type="l1"))

    # 1. load_image: the file as x_start, shorter side resized, centre cropped, scaled to [−1, 1].
    x_start = load_image(photograph, config.size)
    assert x_start.shape == (3, 32, 32)
    assert x_start.dtype == torch.float32
    pixels = torch.from_numpy(np.array(Image.open(photograph))[8:40])
    torch.testing.assert_close((x_start.permute(1, 2, 0) + 1) * 127.5, pixels.float())
    x_start = x_start[None]  # N C H W, a batch of one: 1 3 32 32

    # 2. q_sample: noise it to step t. x_t = sqrt(ᾱ)·x_start + sqrt(1 − ᾱ)·noise, and what is left of the image is ᾱ of it.
    t = torch.tensor([500])
    noise = torch.randn_like(x_start)
    x_t = diffusion.q_sample(x_start, t, noise)
    kept = diffusion.alphas_cumprod[500]
    assert kept.item() == pytest.approx(0.49, abs=0.01)  # halfway, the cosine schedule has half of it
    torch.testing.assert_close(x_t, kept.sqrt() * x_start + (1 - kept).sqrt() * noise)

    # 3. split: patch (i, j) gets the index k = i·d + j; row k·N + n is patch k of image n (here N = 1).
    patches = split(x_t, d)
    assert patches.shape == (4, 3, 16, 16)
    assert torch.equal(patches[1], x_t[0, :, :16, 16:])  # k = 1: first row, second column
    # Each patch is told what the whole noisy image looks like, at its own size, …
    content = global_content(x_t, d)
    assert content.shape == (1, 3, 16, 16)
    assert content[0, 0, 0, 0].item() == pytest.approx(x_t[0, 0, :2, :2].mean().item(), rel=1e-5, abs=1e-6)
    # … and where it lies, one-hot, joined with the timestep in one embedding.
    position = torch.eye(4)
    embedding = model.embedding(t.repeat(4), position)
    assert embedding.shape == (4, 4 * config.dim)

    # 4. the network, one U-Net for all patches: 6 channels in (patch, content), the predicted noise out.
    network_input = torch.cat((patches, content.repeat(4, 1, 1, 1)), dim=1)
    denoised = model._network(network_input, embedding)
    assert denoised.shape == (4, 3, 16, 16)

    # 5. merge: the patches back to their places. 3 to 5 are PatchUNet.forward.
    model_output = merge(denoised, d)
    assert model_output.shape == x_t.shape
    torch.testing.assert_close(model(x_t, t), model_output)
    # One patch per pass gives the same image, and holds the activations of one patch instead of four.
    torch.testing.assert_close(model(x_t, t, patch_batch_size=1), model_output, rtol=1e-4, atol=1e-5)

    # 6. loss: how far the output is from what was asked for, the noise.
    target = diffusion.target(x_start, t, noise)
    assert torch.equal(target, noise)
    loss = diffusion.loss(model_output, target)
    torch.testing.assert_close(loss, (model_output - noise).abs().mean())

    # Training takes the same way per chunk of patches, with backward after each: the parts of the loss add up.
    parts = [
        diffusion.loss(model(x_t, t, rows=rows), split(target, d, rows), total=target.numel()) for rows in row_chunks(4, 1)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), loss)


def test_the_way_is_short() -> None:
    """All that an image passes on its way, files whole, stays under 600 lines: short enough to read in one sitting."""
    files = [patching, layers, unet, diffusion_module]
    lines = sum(len(inspect.getsource(module).splitlines()) for module in files)
    lines += sum(len(inspect.getsource(function).splitlines()) for function in (load_image, to_x_start, decode))
    assert lines < 600
