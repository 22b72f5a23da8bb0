"""From noise to images: samplers as free functions of a model; ``SAMPLERS`` is the place to add one.

``sample_step`` is one ancestral step of DDPM, ours, and the function that memory measurements run. DDIM and DPM-Solver++ go
through diffusers' multistep solver, which is handed the clipped x_start, whatever the network predicts.

**Noise comes from (seed, image index, step)** and nothing else: image 7 of seed 0 is the same image in a batch of 1 or 64, on
one process or eight, whatever the patches per pass (its noise to the bit, its pixels within rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pbbench.errors import InputError
from pbbench.experiment.settings import Precision, SamplingConfig, resolve_patch_batch_size
from pbbench.model.diffusion import Diffusion
from pbbench.model.unet import PatchUNet


def sample_noise(
    seed: int, indices: Sequence[int], step: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise of the images ``indices`` at one step: N × shape, float32. Step 0 is x_T.

    A counter-based generator (Philox, Salmon et al. 2011) per image, with (seed, index) as its key and the step in the
    counter's highest word: streams cannot overlap and need no state, and are drawn on the CPU to be the same on every device.
    """
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in enumerate(indices):
        stream = np.random.Philox(
            key=np.array([seed, index], dtype=np.uint64), counter=np.array([0, 0, 0, step], dtype=np.uint64)
        )
        np.random.Generator(stream).standard_normal(dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise).to(device)


def inference_timesteps(
    num_train_timesteps: int, num_inference_steps: int, spacing: Literal["trailing", "linspace"]
) -> list[int]:
    """The timesteps a sampler visits, descending. All start at T − 1, where training ends and x_T is nearly pure noise.

    ``trailing``: equal strides whose last one ends at x_0; for DDIM and DPM-Solver++, whose final step may be as long as any
    (Lin et al. 2023, section 3.3; "leading", a common default, would start 50 steps at 980). ``linspace``: T − 1 … 0 with
    both ends; for ancestral sampling, whose last network call should see the least noise (Nichol and Dhariwal 2021, section 4).
    """
    T, K = num_train_timesteps, num_inference_steps
    if not 1 <= K <= T:
        raise InputError(f"num_inference_steps is {K}; it must be from 1 to num_train_timesteps ({T})")
    if spacing == "trailing" or K == 1:
        return [(2 * T * k + K) // (2 * K) - 1 for k in range(K, 0, -1)]  # T·k/K, rounded
    return [(2 * (T - 1) * k + K - 1) // (2 * (K - 1)) for k in range(K - 1, -1, -1)]  # (T − 1)·k/(K − 1), rounded


def autocast(device: torch.device | str, mixed_precision: Precision) -> torch.autocast:
    """The network in float16 or bfloat16; with "no", a context that does nothing."""
    dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=mixed_precision != "no")


def _predict_x_start(model: PatchUNet, diffusion: Diffusion, x_t: Tensor, t: Tensor, patch_batch_size: int | None) -> Tensor:
    """x_0 as the network sees it, clipped to the range of images as released. ``t`` counts the chain's steps."""
    model_output = model(x_t, diffusion.timesteps[t], patch_batch_size=patch_batch_size)
    return diffusion.predict_x_start(model_output, x_t, t, overwrite=True).clamp_(-1, 1)


# Ho et al. 2020, algorithm 2, with the posterior's variance ("fixed small")
@torch.no_grad()
def sample_step(
    model: PatchUNet,
    diffusion: Diffusion,
    x_t: Tensor,
    t: int | Tensor,
    noise: Tensor | Callable[[], Tensor] | None,
    patch_batch_size: int | None = None,
) -> Tensor:
    """One ancestral step x_t → x_{t−1}, N C H W. Of the images' size it makes one tensor, which it returns.

    Args:
        t: the chain's step, one number or one per image (N, int64). At 0 no noise is added.
        noise: like x_t, or what draws it, then called when the network is done; None only where every t is 0.
        patch_batch_size: patches per pass; None: all.
    Raises: InputError where a number t is no step of the chain (a tensor is not looked at: that would wait for the device).
    """
    if isinstance(t, int) and not 0 <= t < len(diffusion):
        raise InputError(f"t is {t}; the chain's steps are 0 to {len(diffusion) - 1}")
    steps = torch.full((x_t.shape[0],), t, device=x_t.device) if isinstance(t, int) else t
    x_start = _predict_x_start(model, diffusion, x_t, steps, patch_batch_size)
    mean, _, log_variance = diffusion.posterior(x_start, x_t, steps, overwrite=True)
    if noise is None:
        return mean
    deviation = (0.5 * log_variance).exp() * (steps > 0).view(-1, 1, 1, 1)  # N 1 1 1
    return mean.addcmul_(deviation, noise() if callable(noise) else noise)


@torch.no_grad()
def sample(
    model: PatchUNet,
    diffusion: Diffusion,
    config: SamplingConfig,
    indices: Sequence[int],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw the images with these indices, as one batch of ``model.config.size``: N C H W, in [−1, 1].

    Args:
        model, diffusion: on ``device``.
        indices: which images of ``config.seed``; the same index gives the same image in any batch.
        dtype: of the weights and so of the images; the noise is drawn in float32 whatever it is.
        progress: called after each network step with (done, total).
    Raises: InputError without indices.
    """
    if len(indices) == 0:
        raise InputError("no image indices to sample; ask for at least one image")
    num_steps = num_inference_steps(config, len(diffusion))
    patches = resolve_patch_batch_size(config.patch_batch_size, len(indices), model.config.patch_divider)

    def draw(step: int) -> Tensor:
        shape = (model.config.channels, *model.config.size)
        return sample_noise(config.seed, indices, step, shape, device).to(dtype)

    with autocast(device, config.mixed_precision):
        for done, x in enumerate(SAMPLERS[config.sampler].way(model, diffusion, num_steps, draw, patches), start=1):  # noqa: B007 (the last)
            if progress is not None:
                progress(done, num_steps)
    return x.clamp_(-1, 1)


def num_inference_steps(config: SamplingConfig, num_train_timesteps: int) -> int:
    """Network calls per image: the setting's, else the sampler's own number; never more than the chain has steps."""
    default = SAMPLERS[config.sampler].default_steps or num_train_timesteps
    return min(config.num_inference_steps or default, num_train_timesteps)


# The samplers. Each is a generator that yields x after every network call, the last time x_0; ``draw(0)`` is x_T, ``draw(k)``
# the noise of the k-th step.


def ancestral(
    model: PatchUNet, diffusion: Diffusion, num_steps: int, draw: Callable[[int], Tensor], patches: int
) -> Iterator[Tensor]:
    """``sample_step`` down the chain, or one that visits fewer timesteps."""
    chain = diffusion
    if num_steps < len(diffusion):
        chain = diffusion.respaced(inference_timesteps(len(diffusion), num_steps, "linspace"))
    x = draw(0)
    for done, t in enumerate(reversed(range(num_steps)), start=1):
        x = sample_step(model, chain, x, t, partial(draw, done) if t > 0 else None, patches)
        yield x


def multistep(
    model: PatchUNet, diffusion: Diffusion, num_steps: int, draw: Callable[[int], Tensor], patches: int, *, order: Literal[1, 2]
) -> Iterator[Tensor]:
    """diffusers' solver, without noise on the way."""
    solver = multistep_solver(diffusion, order)
    timesteps = inference_timesteps(len(diffusion), num_steps, "trailing")
    solver.set_timesteps(timesteps=timesteps)
    x = draw(0)
    for t in timesteps:
        steps = torch.full((len(x),), t, device=x.device)
        x = solver.step(_predict_x_start(model, diffusion, x, steps, patches), t, x, return_dict=False)[0]
        yield x


# Lu et al. 2022 (DPM-Solver++), algorithm 2; its first order is DDIM with η = 0 (section 4.1)
def multistep_solver(diffusion: Diffusion, order: Literal[1, 2]) -> Any:
    """diffusers' multistep DPM-Solver++ over ``diffusion``'s schedule, to be given x_start.

    DDIM is its first order; diffusers' own DDIM takes strides of T // K and so misses the timesteps it is asked about
    wherever K does not divide T. x_start is clipped before it gets here: with the cosine schedule the first step would
    otherwise multiply the network's error by 20,000 (1 / sqrt(ᾱ_T)).
    """
    from diffusers import DPMSolverMultistepScheduler  # seconds to import, and DDPM does not need it

    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=len(diffusion),
        trained_betas=diffusion.betas.tolist(),
        solver_order=order,
        prediction_type="sample",
        final_sigmas_type="zero",
    )
    # From float32 betas, 1 − ᾱ cancels near t = 0: hand over what was computed in float64.
    solver.alphas_cumprod = diffusion.alphas_cumprod_float64.cpu()
    return solver


@dataclass(frozen=True)
class Sampler:
    way: Callable[[PatchUNet, Diffusion, int, Callable[[int], Tensor], int], Iterator[Tensor]]
    default_steps: int | None
    """Network calls per image where none are asked for; None: one per timestep of training."""
    words: str = ""
    """What the setting's help says beside the name."""


SAMPLERS = {
    "ddpm": Sampler(ancestral, None, "ancestral, as released"),
    "ddim": Sampler(partial(multistep, order=1), 50),
    "dpm++": Sampler(partial(multistep, order=2), 20, "DPM-Solver++ 2M"),
}
"""``sampling.sampler`` → what it is. The setting, which knows no torch, names the same ones (a test compares them)."""


def to_uint8(x: Tensor, rounding: Literal["round", "reference"] = "round") -> Tensor:
    """[−1, 1] to 0 … 255: to the nearest, or ("reference") truncated as released. Any shape, uint8."""
    scaled = (x.float() + 1) * 127.5
    return (scaled.round() if rounding == "round" else scaled).clamp(0, 255).to(torch.uint8)
