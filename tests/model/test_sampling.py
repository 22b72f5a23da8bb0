"""The samplers against diffusers, against a model whose answer is known, and against themselves cut differently."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.experiment.settings import DiffusionConfig, ModelConfig, SamplingConfig
from pbbench.model.diffusion import Diffusion
from pbbench.model.sampling import (
    SAMPLERS,
    inference_timesteps,
    multistep_solver,
    num_inference_steps,
    sample,
    sample_noise,
    sample_step,
    to_uint8,
)
from pbbench.model.unet import PatchUNet


class Gaussian:
    """The perfect network for pixels that are independent normals of mean 0.2 and deviation 0.25: E[x_0 | x_t], in float64."""

    mean, deviation = 0.2, 0.25

    def __init__(self, prediction_type: str = "epsilon", size: int = 8) -> None:
        self.config = SimpleNamespace(channels=3, size=(size, size), patch_divider=2)
        self.prediction_type = prediction_type
        self.alphas_cumprod = Diffusion(DiffusionConfig()).alphas_cumprod_float64

    def __call__(self, x_t: Tensor, t: Tensor, patch_batch_size: int | None = None, grid: int = 0) -> Tensor:
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        gain = a.sqrt() * self.deviation**2 / (a * self.deviation**2 + 1 - a)
        x_start = self.mean + gain * (x_t.double() - a.sqrt() * self.mean)
        noise = (x_t.double() - a.sqrt() * x_start) / (1 - a).sqrt()
        answers = {"sample": x_start, "epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x_start}
        return answers[self.prediction_type].float()


def draw(model: Any, indices: range = range(4), prediction_type: str = "epsilon", **settings: Any) -> Tensor:
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type))  # type: ignore[arg-type]
    return sample(model, diffusion, SamplingConfig(**settings), indices, device="cpu")


# Noise


def test_noise_depends_on_seed_index_and_step_only() -> None:
    together = sample_noise(3, range(10), 5, (3, 4, 4))
    assert together.shape == (10, 3, 4, 4)
    assert together.dtype == torch.float32
    assert torch.equal(together[[7, 2]], sample_noise(3, [7, 2], 5, (3, 4, 4)))
    others = [sample_noise(4, [7], 5, (3, 4, 4)), sample_noise(3, [8], 5, (3, 4, 4)), sample_noise(3, [7], 6, (3, 4, 4))]
    assert all((together[7] - other[0]).abs().min() > 1e-6 for other in others)


def test_noise_is_standard_normal() -> None:
    noise = sample_noise(0, range(64), 1, (3, 32, 32))
    assert abs(noise.mean().item()) < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert abs((noise[:-1] * noise[1:]).mean().item()) < 0.01  # neighbouring images are independent


def test_noise_stays_what_it_was() -> None:
    """Published samples can be drawn again only while the streams do not change."""
    torch.testing.assert_close(sample_noise(0, [7], 2, (3,)), torch.tensor([[2.1492836, 1.3676032, 0.20284122]]))


# Timesteps


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_timesteps_start_where_training_ends(spacing: Any) -> None:
    for num_steps in range(1, 301):
        timesteps = inference_timesteps(300, num_steps, spacing)
        assert timesteps[0] == 299
        assert len(set(timesteps)) == num_steps
        assert timesteps == sorted(timesteps, reverse=True)
        assert timesteps[-1] >= 0
    assert inference_timesteps(300, 300, spacing) == list(reversed(range(300)))


def test_timesteps_are_spaced_as_named() -> None:
    assert inference_timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert inference_timesteps(1000, 4, "linspace") == [999, 666, 333, 0]
    for wrong in (0, 1001):
        with pytest.raises(InputError, match="from 1 to"):
            inference_timesteps(1000, wrong, "trailing")


def test_the_setting_and_its_help_say_what_the_table_says() -> None:
    """The settings know no torch, so the names, the numbers of steps and the words stand in both."""
    fields = SamplingConfig.model_fields
    assert get_args(fields["sampler"].annotation) == tuple(SAMPLERS)
    for name, sampler in SAMPLERS.items():
        assert f"{name} ({sampler.words})" if sampler.words else name in str(fields["sampler"].description)
        assert f"{sampler.default_steps or 'num_train_timesteps'} for {name}" in str(fields["num_inference_steps"].description)
        config = SamplingConfig(sampler=name)  # type: ignore[arg-type]
        assert num_inference_steps(config, 1000) == (sampler.default_steps or 1000)
        assert num_inference_steps(config, 10) == 10


# Against diffusers, whose schedulers are given float64 coefficients


def float64(scheduler: Any) -> Any:
    from pbbench.model.diffusion import cosine_betas

    scheduler.betas = cosine_betas(1000)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    return scheduler


def hand_over(noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_ddpm_step_is_that_of_diffusers(t: int, prediction_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDPMScheduler

    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type))  # type: ignore[arg-type]
    theirs = float64(DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type))
    x_t, output, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    hand_over(noise, monkeypatch)
    expected = theirs.step(output, t, x_t).prev_sample

    def model(x: Tensor, t: Tensor, patch_batch_size: int | None = None, grid: int = 0) -> Tensor:
        return output.clone()

    for step in (t, torch.tensor([t, t])):
        ours = sample_step(model, diffusion, x_t, step, noise)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 10, 37])
def test_short_ddpm_is_that_of_diffusers(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDPMScheduler

    model = Gaussian("v_prediction")
    theirs = float64(DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"))
    timesteps = inference_timesteps(1000, num_steps, "linspace")
    theirs.set_timesteps(timesteps=timesteps)
    x = sample_noise(0, range(2), 0, (3, 8, 8))
    for done, t in enumerate(timesteps, start=1):
        hand_over(sample_noise(0, range(2), done, (3, 8, 8)), monkeypatch)
        x = theirs.step(model(x, torch.tensor([t, t])), t, x).prev_sample.float()
    ours = draw(model, range(2), "v_prediction", num_inference_steps=num_steps)
    torch.testing.assert_close(ours, x.clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [5, 50])
def test_ddim_is_that_of_diffusers_where_the_strides_divide(num_steps: int) -> None:
    from diffusers import DDIMScheduler

    model = Gaussian("v_prediction")
    theirs = float64(
        DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")
    )
    theirs.set_timesteps(num_steps)
    assert theirs.timesteps.tolist() == inference_timesteps(1000, num_steps, "trailing")
    x = sample_noise(0, range(2), 0, (3, 8, 8))
    for t in theirs.timesteps:
        x = theirs.step(model(x, t.repeat(2)), t, x, use_clipped_model_output=True).prev_sample.float()
    ours = draw(model, range(2), "v_prediction", sampler="ddim", num_inference_steps=num_steps)
    torch.testing.assert_close(ours, x.clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [7, 20])
def test_dpm_solver_is_that_of_diffusers(num_steps: int) -> None:
    """Thresholding at 1 is diffusers' way to clip x_start inside the solver."""
    from diffusers import DPMSolverMultistepScheduler

    model = Gaussian("v_prediction")
    theirs = float64(
        DPMSolverMultistepScheduler(
            1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", thresholding=True, sample_max_value=1.0
        )
    )
    theirs.set_timesteps(timesteps=inference_timesteps(1000, num_steps, "trailing"))
    x = sample_noise(0, range(2), 0, (3, 8, 8))
    for t in theirs.timesteps:
        x = theirs.step(model(x, t.repeat(2)), t, x).prev_sample
    ours = draw(model, range(2), "v_prediction", sampler="dpm++", num_inference_steps=num_steps)
    torch.testing.assert_close(ours, x.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_the_solver_works_from_float64_coefficients() -> None:
    """1 − ᾱ of float32 betas is off by a thousandth at t = 0."""
    diffusion = Diffusion(DiffusionConfig())
    solver = multistep_solver(diffusion, order=2)
    solver.set_timesteps(timesteps=[999, 500, 1, 0])
    a = diffusion.alphas_cumprod_float64[[999, 500, 1, 0]]
    torch.testing.assert_close(solver.sigmas[:4].double(), ((1 - a) / a).sqrt(), rtol=1e-6, atol=0)


# Against a known answer


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("sampler", "num_steps"), [("ddpm", 250), ("ddim", 300), ("dpm++", 25)])
def test_a_perfect_network_gives_the_data(sampler: str, num_steps: int, prediction_type: str) -> None:
    model = Gaussian(prediction_type, size=16)
    x = draw(model, range(16), prediction_type, sampler=sampler, num_inference_steps=num_steps)
    assert x.mean().item() == pytest.approx(Gaussian.mean, abs=0.01)
    assert x.std().item() == pytest.approx(Gaussian.deviation, rel=0.05)


def test_no_noise_is_added_at_the_last_step() -> None:
    model, diffusion = Gaussian(), Diffusion(DiffusionConfig())
    x_t = torch.randn(2, 3, 8, 8)
    quiet = sample_step(model, diffusion, x_t, 0, None)  # type: ignore[arg-type]
    assert torch.equal(sample_step(model, diffusion, x_t, 0, torch.randn_like(x_t)), quiet)  # type: ignore[arg-type]
    mixed = sample_step(model, diffusion, x_t, torch.tensor([0, 1]), torch.ones_like(x_t))  # type: ignore[arg-type]
    torch.testing.assert_close(mixed[0], quiet[0])
    assert not torch.equal(mixed[1], quiet[1])


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_step_outside_the_chain_is_refused(t: int) -> None:
    with pytest.raises(InputError, match="0 to 999"):
        sample_step(Gaussian(), Diffusion(DiffusionConfig()), torch.zeros(1, 3, 8, 8), t, None)  # type: ignore[arg-type]


# With the network


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_of_a_seed_are_the_same_however_they_are_drawn(sampler: str, tiny_config: ModelConfig) -> None:
    model = PatchUNet(tiny_config)
    settings: dict[str, Any] = {"sampler": sampler, "num_inference_steps": 4, "seed": 5}
    together = draw(model, range(5), patch_batch_size="all", **settings)
    assert together.shape == (5, 3, 16, 16)
    assert together.abs().max() <= 1
    assert not together.requires_grad
    pieces = [
        draw(model, range(2), patch_batch_size=3, **settings),
        draw(model, range(2, 3), patch_batch_size="index", **settings),
        draw(model, range(3, 5), patch_batch_size=1, **settings),
    ]
    torch.testing.assert_close(torch.cat(pieces), together, rtol=1e-4, atol=1e-4)
    assert (draw(model, range(5), **{**settings, "seed": 6}) - together).abs().max() > 0.01


def test_height_and_width_may_differ(tiny_config: ModelConfig) -> None:
    model = PatchUNet(tiny_config.model_copy(update={"image_size": (8, 16)}))
    assert draw(model, range(1), num_inference_steps=2).shape == (1, 3, 8, 16)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_progress_counts_network_calls(sampler: str) -> None:
    seen: list[tuple[int, int]] = []
    config = SamplingConfig(sampler=sampler, num_inference_steps=3)  # type: ignore[arg-type]
    sample(
        Gaussian(),  # type: ignore[arg-type]
        Diffusion(DiffusionConfig()),
        config,
        range(1),
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_mixed_precision_is_close_and_not_equal(tiny_config: ModelConfig) -> None:
    model = PatchUNet(tiny_config)
    exact = draw(model, range(2), sampler="ddim", num_inference_steps=2)
    rounded = draw(model, range(2), sampler="ddim", num_inference_steps=2, mixed_precision="bf16")
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float64_weights_draw_the_same_images_in_float64(sampler: str, tiny_config: ModelConfig) -> None:
    model, diffusion = PatchUNet(tiny_config), Diffusion(DiffusionConfig())
    config = SamplingConfig(sampler=sampler, num_inference_steps=3)  # type: ignore[arg-type]
    single = sample(model, diffusion, config, range(2), device="cpu")
    double = sample(model.double(), diffusion, config, range(2), device="cpu", dtype=torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, single.double(), rtol=1e-4, atol=1e-4)


def test_no_images_are_refused(tiny_config: ModelConfig) -> None:
    with pytest.raises(InputError, match="at least one image"):
        draw(PatchUNet(tiny_config), range(0))


def test_to_uint8_rounds_or_truncates() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(x, "reference").tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(x).dtype == torch.uint8
