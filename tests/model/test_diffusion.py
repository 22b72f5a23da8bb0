"""The schedule, the forward process, the loss and the posterior, against diffusers and first principles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.experiment.settings import DiffusionConfig
from pbbench.model.diffusion import Diffusion, cosine_betas

PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def diffusion(**settings: object) -> Diffusion:
    return Diffusion(DiffusionConfig(**settings))  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """x_start, t, noise of four images."""
    return torch.rand(4, 3, 8, 8) * 2 - 1, torch.tensor([0, 1, 500, 999]), torch.randn(4, 3, 8, 8)


def test_schedule_is_that_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    ours, theirs = diffusion(), DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-5, atol=3e-8)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-9)
    assert ours.alphas_cumprod[-1].item() == pytest.approx(2.4e-9, rel=0.02)  # of the clipped betas, not of the formula
    assert cosine_betas(1000).dtype == torch.float64
    assert cosine_betas(1000)[-1] == 0.999
    assert len(ours) == 1000


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_target_implies_x_start(prediction_type: str) -> None:
    process = diffusion(prediction_type=prediction_type)
    x_start, t, noise = batch()
    x_t = process.q_sample(x_start, t, noise)
    implied = process.predict_x_start(process.target(x_start, t, noise), x_t, t)
    torch.testing.assert_close(implied[:3], x_start[:3], rtol=1e-4, atol=1e-5)
    if prediction_type != "epsilon":  # from the noise, x_start at T − 1 is a difference 20,000 times smaller than its terms
        torch.testing.assert_close(implied[3], x_start[3], rtol=1e-4, atol=1e-4)


def test_q_sample_and_v_are_those_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    process = diffusion(prediction_type="v_prediction")
    x_start, t, noise = batch()
    torch.testing.assert_close(process.q_sample(x_start, t, noise), theirs.add_noise(x_start, noise, t), rtol=1e-4, atol=1e-5)
    velocity = theirs.get_velocity(x_start, noise, t)
    torch.testing.assert_close(process.target(x_start, t, noise), velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [1, 500, 999])
def test_posterior_is_bayes_rule(t: int) -> None:
    """q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0): precisions add, in float64 from the betas."""
    betas = cosine_betas(1000)
    before = torch.prod(1 - betas[:t])  # ᾱ_{t−1}
    x_start, x_t = 0.3, -0.7
    precision = (1 - betas[t]) / betas[t] + 1 / (1 - before)
    mean = ((1 - betas[t]).sqrt() / betas[t] * x_t + before.sqrt() / (1 - before) * x_start) / precision

    at = torch.tensor([t])
    ours = diffusion().posterior(torch.full((1, 1, 1, 1), x_start), torch.full((1, 1, 1, 1), x_t), at)
    assert ours[0].item() == pytest.approx(mean.item(), rel=1e-5)
    assert ours[1].item() == pytest.approx(1 / precision.item(), rel=1e-5)
    assert ours[2].item() == pytest.approx(-precision.log().item(), rel=1e-5)


def test_posterior_at_the_first_step_is_x_start() -> None:
    x_start, _, x_t = batch()
    mean, variance, log_variance = diffusion().posterior(x_start, x_t, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(mean, x_start)
    assert variance.tolist() == torch.zeros(4, 1, 1, 1).tolist()
    assert torch.isfinite(log_variance).all()


@pytest.mark.parametrize(("loss_type", "power"), [("l1", 1), ("l2", 2)])
def test_loss_is_the_mean_and_its_parts_add_up(loss_type: str, power: int) -> None:
    process = diffusion(loss_type=loss_type)
    target, _, output = batch()
    whole = process.loss(output, target)
    assert whole.shape == ()
    assert whole.item() == pytest.approx((output - target).abs().pow(power).mean().item(), rel=1e-5)
    parts = [process.loss(output[rows], target[rows], total=target.numel()) for rows in (slice(0, 1), slice(1, 4))]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)  # type: ignore[union-attr]


def test_loss_of_different_shapes_is_refused() -> None:
    with pytest.raises(InputError, match="out_channels"):
        diffusion().loss(torch.zeros(2, 6, 8, 8), torch.zeros(2, 3, 8, 8))


def test_respaced_keeps_the_marginals() -> None:
    full = diffusion()
    short = full.respaced([999, 500, 0])
    assert short.timesteps.tolist() == [0, 500, 999]
    assert len(short) == 3
    torch.testing.assert_close(short.alphas_cumprod, full.alphas_cumprod[[0, 500, 999]])
    torch.testing.assert_close(torch.cumprod(1 - short.betas, 0)[:2], short.alphas_cumprod[:2])
    every = full.respaced(range(1000))
    torch.testing.assert_close(every.posterior_mean_coef1, full.posterior_mean_coef1, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(every.posterior_variance, full.posterior_variance, rtol=1e-5, atol=1e-7)


def test_every_coefficient_moves() -> None:
    moved = diffusion().to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    assert len(tensors) > 8
    assert all(value.is_meta for value in tensors)
