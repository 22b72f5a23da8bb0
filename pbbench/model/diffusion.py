"""The Gaussian diffusion: schedule, forward process, training target and loss, posterior.

Coefficients are computed in float64, cast to float32 once, and stand grouped under the distribution they serve
(the layout of improved-diffusion). Steps count from 0: t = 0 is the least noisy image, t = T − 1 nearly pure noise.
Equation numbers: [D] Ho et al. 2020 (DDPM), [I] Nichol and Dhariwal 2021, [V] Salimans and Ho 2022.

Shapes: images N C H W, t N (int64), coefficients T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pbbench.errors import InputError
from pbbench.experiment.settings import DiffusionConfig


# [I] equation 17
def cosine_betas(num_train_timesteps: int, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """The cosine schedule's betas, clipped to [0, ``largest``]: T, float64."""
    steps = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    curve = torch.cos((steps + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - curve[1:] / curve[:-1]).clamp(0, largest)


class Diffusion:
    """Forward process and posterior of a ``DiffusionConfig``.

    Attributes (T, float32): ``betas``, ``alphas_cumprod`` and the coefficients below; ``timesteps`` (T, int64) are the
    timesteps the network is asked about, 0 … T − 1 unless ``respaced``.
    """

    def __init__(
        self, config: DiffusionConfig, device: torch.device | str | None = None, timesteps: Sequence[int] | None = None
    ) -> None:
        self.config = config
        betas = cosine_betas(config.num_train_timesteps)
        # The product of the clipped betas, not the formula's own curve: 2.4e-9 against 3.7e-33 at the end.
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.timesteps = torch.arange(config.num_train_timesteps)
        if timesteps is not None:  # a shorter chain through the same marginals ([I] section 4)
            self.timesteps = torch.tensor(sorted(timesteps))
            alphas_cumprod = alphas_cumprod[self.timesteps]
            betas = 1 - alphas_cumprod / F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)

        self.betas = betas.float()
        self.alphas_cumprod = alphas_cumprod.float()
        self.alphas_cumprod_float64 = alphas_cumprod  # for solvers that derive coefficients of their own

        # q(x_t | x_0)
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt().float()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt().float()

        # x_0 from x_t and the noise
        self.sqrt_recip_alphas_cumprod = (1 / alphas_cumprod).sqrt().float()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas_cumprod - 1).sqrt().float()

        # q(x_{t−1} | x_t, x_0)
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        self.posterior_variance = posterior_variance.float()
        # The variance at t = 0 is 0; its logarithm is clipped.
        self.posterior_log_variance_clipped = posterior_variance.clamp(min=1e-20).log().float()
        self.posterior_mean_coef1 = (betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)).float()
        self.posterior_mean_coef2 = ((1 - alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - alphas_cumprod)).float()

        if device is not None:
            self.to(device)

    def __len__(self) -> int:
        """T: steps of the chain."""
        return self.timesteps.shape[0]

    def to(self, device: torch.device | str) -> Diffusion:
        """Move every coefficient; returns itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def respaced(self, timesteps: Sequence[int]) -> Diffusion:
        """The chain that visits only these timesteps and has the same marginals there ([I] section 4, strided sampling)."""
        return Diffusion(self.config, self.betas.device, timesteps)

    # [D] equation 4
    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0): sqrt(ᾱ_t)·x_0 + sqrt(1 − ᾱ_t)·noise."""
        return (_at(self.sqrt_alphas_cumprod, t) * x_start).addcmul_(_at(self.sqrt_one_minus_alphas_cumprod, t), noise)

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should say: the noise, x_start or v, by ``prediction_type``."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return x_start
        # [V] section 4: v = α·ε − σ·x
        return (_at(self.sqrt_alphas_cumprod, t) * noise).addcmul_(-_at(self.sqrt_one_minus_alphas_cumprod, t), x_start)

    # [D] equation 14, with the absolute or the squared error
    def loss(self, model_output: Tensor, target: Tensor, total: int | None = None) -> Tensor:
        """The error's sum divided by ``total``: a scalar.

        ``total`` None is the number of elements, which makes the mean. A chunk of patches is given the number of elements
        of the *whole* batch, so that the losses (and gradients) of the chunks add up to those of one pass.
        """
        if model_output.shape != target.shape:
            raise InputError(
                f"the model's output {tuple(model_output.shape)} and its target {tuple(target.shape)} differ in shape; "
                "training needs out_channels equal to channels"
            )
        error = F.l1_loss if self.config.loss_type == "l1" else F.mse_loss
        return error(model_output, target, reduction="sum") / (total or target.numel())

    def predict_x_start(self, model_output: Tensor, x_t: Tensor, t: Tensor, *, overwrite: bool = False) -> Tensor:
        """x_0 as the network's output implies it, not clipped; with ``overwrite`` in the output's own storage."""
        x = model_output if overwrite else model_output.clone()
        if self.config.prediction_type == "sample":
            return x
        if self.config.prediction_type == "epsilon":  # [D] equation 15 (before)
            return x.mul_(-_at(self.sqrt_recipm1_alphas_cumprod, t)).addcmul_(_at(self.sqrt_recip_alphas_cumprod, t), x_t)
        # [V] section 4: x = α·z − σ·v
        return x.mul_(-_at(self.sqrt_one_minus_alphas_cumprod, t)).addcmul_(_at(self.sqrt_alphas_cumprod, t), x_t)

    # [D] equations 6 and 7
    def posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t−1} | x_t, x_0): mean N C H W (with ``overwrite`` in x_start's storage), variance and its clipped logarithm
        N 1 1 1."""
        mean = torch.mul(x_start, _at(self.posterior_mean_coef1, t), out=x_start if overwrite else None)
        mean.addcmul_(_at(self.posterior_mean_coef2, t), x_t)
        return mean, _at(self.posterior_variance, t), _at(self.posterior_log_variance_clipped, t)


def _at(coefficients: Tensor, t: Tensor) -> Tensor:
    """The coefficient of each image's timestep: N 1 1 1."""
    return coefficients[t].view(-1, 1, 1, 1)
