"""The held-out loss: repeatable, independent of how it is batched, and on predictors whose loss is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pbbench.data.images import open_images, to_x_start
from pbbench.errors import InputError
from pbbench.experiment.settings import DiffusionConfig, ModelConfig
from pbbench.model.diffusion import Diffusion
from pbbench.model.unet import PatchUNet
from pbbench.quality.held_out import band_edges, held_out_loss, stratified_timesteps


class Says:
    """A stand-in for a network: answers with a function of (x_t, t)."""

    def __init__(self, answer: Any) -> None:
        self.config, self.answer = ModelConfig(dim=8, dim_mults=(1, 2), image_size=16, patch_divider=2), answer

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, patch_batch_size: int | None = None) -> torch.Tensor:
        return self.answer(x_t, t)


def test_same_number_however_it_is_computed(tiny_config: ModelConfig) -> None:
    model, diffusion = PatchUNet(tiny_config), Diffusion(DiffusionConfig())
    images = open_images("synthetic", (16, 16), 10)
    whole = held_out_loss(model, diffusion, images, seed=3)
    parts = held_out_loss(model, diffusion, images, seed=3, batch_size=3, patch_batch_size=5)
    assert parts["mean"] == pytest.approx(whole["mean"], rel=1e-5)
    assert [b["loss"] for b in parts["bands"]] == pytest.approx([b["loss"] for b in whole["bands"]], rel=1e-5)
    assert held_out_loss(model, diffusion, images, seed=3) == whole
    assert held_out_loss(model, diffusion, images, seed=4)["mean"] != whole["mean"]
    assert whole["num_images"] == 10
    assert [(b["t_min"], b["t_max"]) for b in whole["bands"]] == [(0, 249), (250, 499), (500, 749), (750, 999)]


@pytest.mark.parametrize(("loss_type", "expected"), [("l1", math.sqrt(2 / math.pi)), ("l2", 1.0)])
def test_answering_nothing_costs_the_noise(loss_type: Any, expected: float) -> None:
    """Predicting no noise at all: E|ε| = √(2/π), E ε² = 1, in every band."""
    found = held_out_loss(
        Says(lambda x, t: torch.zeros_like(x)),
        Diffusion(DiffusionConfig(loss_type=loss_type)),
        open_images("synthetic", (16, 16), 32),
        seed=0,
    )
    assert [band["loss"] for band in found["bands"]] == pytest.approx([expected] * 4, rel=0.02)
    assert found["mean"] == pytest.approx(sum(band["loss"] for band in found["bands"]) / 4)


def test_a_perfect_answer_costs_nothing() -> None:
    """All images alike and the network asked for x_start: it can know the answer, pixel values included."""
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    model = Says(lambda x, t: to_x_start(image).expand_as(x))
    found = held_out_loss(model, Diffusion(DiffusionConfig(prediction_type="sample")), [image] * 5, seed=0)
    assert found["mean"] < 1e-7


def test_bands_see_their_own_timesteps() -> None:
    """With the target x_start, x_t itself is a good answer where t is small and a bad one where it is large."""
    model, diffusion = Says(lambda x, t: x), Diffusion(DiffusionConfig(prediction_type="sample"))
    losses = [b["loss"] for b in held_out_loss(model, diffusion, open_images("synthetic", (16, 16), 8), seed=0)["bands"]]
    assert losses == sorted(losses)
    assert losses[3] > 3 * losses[0]


@pytest.mark.parametrize(("num_images", "T", "bands"), [(1, 1000, 4), (7, 1000, 4), (300, 1000, 3), (50, 10, 10), (5, 2, 1)])
def test_timesteps_are_stratified(num_images: int, T: int, bands: int) -> None:  # noqa: N803
    edges = band_edges(T, bands)
    t = stratified_timesteps(num_images, edges, seed=1)
    assert t.shape == (bands, num_images)
    assert edges[0] == 0
    assert edges[-1] == T
    for row, low, high in zip(t, edges, edges[1:], strict=False):
        stratum = (high - low) / num_images
        ideal = low + stratum * (torch.arange(num_images) + 0.5)
        assert (row.sort().values + 0.5 - ideal).abs().max() <= stratum / 2 + 1  # one in each stratum, floor apart


def test_ranks_short_runs_in_every_band(tiny_config: ModelConfig) -> None:
    """Less after 20 steps of training than before, and still less after 80: in each band, not only on average."""
    images = open_images("synthetic", (16, 16), 96)
    train, held_out = to_x_start(images.batch(range(64))), images.subset(64, 96)
    model, diffusion = PatchUNet(tiny_config), Diffusion(DiffusionConfig())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    found = []
    for step in range(81):
        if step in (0, 20, 80):
            found.append(held_out_loss(model, diffusion, held_out, seed=0))
        n, t, noise = torch.randint(64, (16,)), torch.randint(1000, (16,)), torch.randn(16, 3, 16, 16)
        loss = diffusion.loss(model(diffusion.q_sample(train[n], t, noise), t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    means = [run["mean"] for run in found]
    assert means[0] > 1.05 * means[1] > 1.05**2 * means[2]
    for none, short, longer in zip(*([band["loss"] for band in run["bands"]] for run in found), strict=True):
        assert none > short > longer


def test_bad_input(tiny_config: ModelConfig) -> None:
    model, diffusion = PatchUNet(tiny_config), Diffusion(DiffusionConfig())
    images = open_images("synthetic", (16, 16), 4)
    with pytest.raises(InputError, match="32×32 with 3 channels; the model takes 16×16"):
        held_out_loss(model, diffusion, open_images("synthetic", (32, 32), 4), seed=0)
    with pytest.raises(InputError, match="0 bands do not fit 1000"):
        held_out_loss(model, diffusion, images, seed=0, bands=0)
    with pytest.raises(InputError, match="images are empty"):
        held_out_loss(model, diffusion, [], seed=0)
