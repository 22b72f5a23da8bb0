"""The sections of an experiment about the network and what is done with it: every setting stated once, with its default,
meaning and check. No torch here.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _patch_batch_size(value: object) -> object:
    """Accept 8, "8", "index" or "all"; everything else is refused with the three forms named."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if value in ("index", "all") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"{value!r} is not a positive whole number, 'index' (one patch index at a time) or 'all'")


PatchBatchSize = Annotated[int | Literal["index", "all"], BeforeValidator(_patch_batch_size)]
Precision = Literal["no", "fp16", "bf16"]
Recompute = Literal["none", "cheap", "full"]
Positive = Annotated[int, Field(gt=0)]
Side = Annotated[int, Field(gt=0, le=65_536)]
NonNegative = Annotated[int, Field(ge=0)]

STALE_SHARE = 0.05
"""Of the averaged weights' start: more than this left at the end of the budget is warned of."""


def resolve_patch_batch_size(setting: PatchBatchSize | None, batch_size: int, patch_divider: int) -> int:
    """The number of patches (image × patch index) in one pass: ``index`` is one patch index of every image,
    ``all`` (or None) every patch; a number above N·d² is clipped to it."""
    total = batch_size * patch_divider**2
    if setting is None or setting == "all":
        return total
    return min(batch_size if setting == "index" else int(setting), total)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The patch U-Net (Arakawa et al. 2023, section 3; the network of Ho et al. 2020 with linear attention)."""

    dim: Positive = 128
    """Base width: channels at full resolution; a multiple of resnet_block_groups."""
    dim_mults: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Width of each level as a multiple of dim; the first is 1. Each level but the last halves the resolution."""
    image_size: Side | tuple[Side, Side] = 128
    """Pixels: one number for a square, or [height, width]; both divisible by patch_divider · 2^(levels − 1)."""
    channels: Positive = 3
    """Channels of an image."""
    out_channels: Positive | None = None
    """Channels of the output; absent: as many as the image has."""
    patch_divider: Positive = 4
    """d: the image is divided into d × d patches; 1 is the ordinary, whole-image model."""
    init_dim: Positive | None = None
    """Channels after the first convolution; absent: dim // 3 · 2."""
    resnet_block_groups: Positive = 8
    """Groups of every group normalisation."""
    position_conditioning: bool = True
    """Tell the network where a patch lies (the paper's first conditioning); false for an ablation."""
    global_content: bool = True
    """Show the network the whole image at the patch's size (the paper's second conditioning); false for an ablation."""
    border_context: bool = False
    """Let the first convolution see past a patch's border: where its 7 × 7 window reaches over, it reads the noisy image's
    pixels instead of zeros. Same weights, memory and time; not in the paper."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of one patch in pixels."""
        height, width = self.size
        return height // self.patch_divider, width // self.patch_divider

    @property
    def num_patches(self) -> int:
        return self.patch_divider**2

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.dim_mults[0] != 1:
            raise ValueError(f"dim_mults starts with {self.dim_mults[0]}; it must start with 1 (the decoder ends at width dim)")
        if self.dim % self.resnet_block_groups or self.dim < 4 or self.dim % 2:
            step = self.resnet_block_groups if self.resnet_block_groups % 2 == 0 else 2 * self.resnet_block_groups
            nearest = max(step, 4, round(self.dim / step) * step)
            raise ValueError(
                f"dim {self.dim} does not fit: it must be even, at least 4 and divisible by resnet_block_groups "
                f"({self.resnet_block_groups}); for example {nearest}"
            )
        d, levels = self.patch_divider, len(self.dim_mults)
        unit = d * 2 ** (levels - 1)
        if any(side % unit for side in self.size):
            raise ValueError(
                f"image_size {_size_text(self.size)} does not fit patch_divider {d} with {levels} levels (dim_mults): height "
                f"and width must be divisible by {unit} (divider · 2^(levels − 1)); {_what_fits(self.size, d, levels)}"
            )
        return self


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}" if size[0] == size[1] else f"{size[0]}×{size[1]}"


def _what_fits(size: tuple[int, int], d: int, levels: int) -> str:
    """The sizes, dividers and depths that would fit, each with the other two left as they are."""
    unit, smallest = d * 2 ** (levels - 1), min(size)
    sizes = tuple(max(unit, round(side / unit) * unit) for side in size)
    parts = [f"image_size {_size_text(sizes)} would fit"]
    dividers = [e for e in range(1, smallest + 1) if all(side % (e * 2 ** (levels - 1)) == 0 for side in size)]
    if dividers:
        parts.append(f"or patch_divider {', '.join(map(str, dividers))}")
    depths = [n for n in range(1, levels) if all(side % (d * 2 ** (n - 1)) == 0 for side in size)]
    if depths:
        parts.append(f"or at most {depths[-1]} levels")
    return " ".join(parts)


class DiffusionConfig(Section):
    """The Gaussian diffusion (Ho et al. 2020; cosine schedule of Nichol and Dhariwal 2021)."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    """T: steps of the forward process."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """What the network predicts: the noise, x_start, or v (Salimans and Ho 2022)."""
    loss_type: Literal["l1", "l2"] = "l1"
    """Mean absolute or mean squared error."""


class DataConfig(Section):
    """Where images come from. Preprocessing as released: shorter side resized, random flip, centre crop, [−1, 1]."""

    source: str = "synthetic"
    """"synthetic" (built-in scenes), a folder of images (nested or not), or a zip of them."""
    num_images: Positive | None = None
    """Use so many images, a choice that the names alone decide; absent: all of them (of the synthetic ones, 10,000)."""
    num_held_out: NonNegative = 256
    """Images kept out of training for the held-out denoising loss; at most a tenth of the set."""
    horizontal_flip: bool = True
    """Flip each training image left to right with probability one half."""
    seed: NonNegative | None = None
    """Which scenes the built-in ones are; absent: the experiment's seed."""
    num_workers: NonNegative = 2
    """Processes that decode images for training; 0 decodes in the training process."""


class TrainingConfig(Section):
    batch_size: Positive = 32
    """Images per process and micro-batch."""
    num_steps: Positive = 100_000
    """Optimizer steps: the training budget."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Stop at the first step after so many seconds of training, checkpoints and grids included; absent: num_steps alone."""
    patch_batch_size: PatchBatchSize = "index"
    """Patches per pass: a number, "index" (one patch index of every image) or "all". Gradients are the same."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Adam's step size."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the exponential moving average of the weights."""
    ema_warmup: bool = False
    """The decay of the average's update after n others is at most (1 + n) / (10 + n), so that the weights it starts from are
    soon forgotten (the ``num_updates`` of TensorFlow's tf.train.ExponentialMovingAverage); false, as released: ema_decay."""
    ema_update_every: Positive = 10
    """Optimizer steps between two updates of the average."""
    ema_update_phase: NonNegative = 0
    """Which steps those are: with ema_update_every 10, 0 is after steps 10, 20, ..., and 1 after 1, 11, ..., as released."""
    ema_start_step: NonNegative = 2000
    """Before this step the average is a plain copy of the weights; the first update starts from the copy that was due last."""
    ema_device: Literal["same", "cpu"] = "same"
    """Where the average is kept: beside the weights, or in the host's memory (each update copies the weights there)."""
    ema_dtype: Literal["float32", "bfloat16"] = "float32"
    """How the average is kept. bfloat16 halves it; each update is rounded up or down at random, so that steps far smaller than
    the last digit still count in the mean. Checkpoints hold float32 either way."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches per optimizer step."""
    mixed_precision: Precision = "no"
    """Autocast: no (float32), fp16 (with loss scaling) or bf16."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Clip the gradient's norm to this; absent: no clipping, as released."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping it, with the same gradients: none; cheap (norms, SiLU, attention); full
    (each level of the network, by activation checkpointing, and the cheap parts within it)."""
    save_every: Positive = 2000
    """Steps between checkpoints (the last step is always saved)."""
    keep_checkpoints: Positive = 2
    """The last checkpoints that stay; older ones are removed."""
    keep_every: Positive | None = None
    """Steps between checkpoints that stay for good, each written whether or not save_every falls on it; absent: none does."""
    sample_every: NonNegative = 2000
    """Steps between sample grids; 0: none."""
    num_grid_samples: Positive = 36
    """Images of a sample grid."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers to report the loss to; each needs its extra."""

    @model_validator(mode="after")
    def _phase_is_below_the_period(self) -> TrainingConfig:
        every, phase = self.ema_update_every, self.ema_update_phase
        if phase >= every:
            raise ValueError(f"ema_update_phase {phase} does not fit: it must be below ema_update_every, which is {every}")
        return self

    def ema_updates(self, step: int) -> int:
        """How often the average has been updated once ``step`` optimizer steps are done; the plain copies do not count."""
        every, phase, first = self.ema_update_every, self.ema_update_phase, max(self.ema_start_step, 1)
        return max(0, (step - phase) // every - (first - 1 - phase) // every)

    def ema_decay_after(self, updates: int) -> float:
        """The decay of the update that so many went before."""
        return min(self.ema_decay, (1 + updates) / (10 + updates)) if self.ema_warmup else self.ema_decay

    def stale_average(self) -> str | None:
        """One line where, at the end of the budget, the average still gives more than a twentieth of its weight to what it
        started from: samples would then show weights that were hardly trained. None where it does not."""
        if self.num_steps < self.ema_start_step:
            return None  # a plain copy to the end
        updates = self.ema_updates(self.num_steps)
        share = math.prod(self.ema_decay_after(n) for n in range(updates))
        if share <= STALE_SHARE:
            return None
        return (
            f"the averaged weights, which are what is sampled, will be {share:.0%} those of step {self.ema_start_step} ("
            f"ema_decay {self.ema_decay:g} over {updates:,} updates); set training.ema_warmup=true, or a smaller ema_decay"
        )


class SamplingConfig(Section):
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm"
    """ddpm (ancestral, as released), ddim, or dpm++ (DPM-Solver++ 2M)."""
    num_inference_steps: Positive | None = None
    """Network calls per image; absent: num_train_timesteps for ddpm, 50 for ddim, 20 for dpm++."""
    batch_size: Positive = 32
    """Images denoised together."""
    patch_batch_size: PatchBatchSize = "index"
    """Patches per pass: a number, "index" or "all". The images are the same."""
    mixed_precision: Precision = "no"
    """Autocast while sampling."""
    seed: NonNegative = 0
    """Noise comes from (seed, image index, step), whatever the batch, chunk or number of processes."""
    to_uint8: Literal["round", "reference"] = "round"
    """Rounding to 8 bits; "reference" truncates, as released."""


class QualityConfig(Section):
    metrics: Annotated[tuple[Literal["fid", "kid", "prc", "patch"], ...], Field(min_length=1)] = ("fid", "kid", "prc", "patch")
    """Frechet distance, kernel distance, precision and recall, and the Frechet distance of patches at full resolution (four
    more passes of the extractor an image)."""
    num_images: Annotated[int, Field(ge=2)] = 10_000
    """Samples drawn and scored per divider."""
    num_reference_images: Annotated[int, Field(ge=2)] = 50_000
    """Training images that samples are compared with, at most."""
    kid_subset_size: Positive = 1000
    """Images per subset of the kernel distance; clipped to the smaller set."""
    save_samples: bool = False
    """Keep every scored sample as samples/<cell>/000000.png and on."""
    reference_grid: bool = True
    """Show some reference images beside the samples in the report; false where they may not be published."""
    inception_weights: str | None = None
    """File with torch-fidelity's Inception weights; absent: PBBENCH_INCEPTION_WEIGHTS, the cache, or the download."""
    batch_size: Positive = 64
    """Images per pass of the feature extractor."""
