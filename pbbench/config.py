"""The experiment: every setting of a run, stated once, with its default, meaning and check.

An experiment is a TOML file with the sections below. ``load_experiment`` merges, in this order: the defaults in this file,
a file or preset, and ``--set section.key=value`` overrides; then validates the whole. Unknown keys are refused by name.
No torch here: planning a sweep and printing help must stay quick.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pbbench.errors import InputError, one_line
from pbbench.variants import checked_variants, laid_over


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
    ema_update_every: Positive = 10
    """Optimizer steps between two updates of the average."""
    ema_start_step: NonNegative = 2000
    """Before this step the average is a plain copy of the weights."""
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
    sample_every: NonNegative = 2000
    """Steps between sample grids; 0: none."""
    num_grid_samples: Positive = 36
    """Images of a sample grid."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers to report the loss to; each needs its extra."""


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

    def steps(self, num_train_timesteps: int) -> int:
        """The number of network calls per image."""
        default = {"ddpm": num_train_timesteps, "ddim": 50, "dpm++": 20}[self.sampler]
        return min(self.num_inference_steps or default, num_train_timesteps)


class QualityConfig(Section):
    metrics: Annotated[tuple[Literal["fid", "kid", "prc", "patch"], ...], Field(min_length=1)] = ("fid", "kid", "prc", "patch")
    """Frechet distance, kernel distance, precision and recall, and the Frechet distance of patches at full resolution (four
    more passes of the extractor an image)."""
    num_images: Annotated[int, Field(ge=2)] = 10_000
    """Samples drawn and scored per divider."""
    num_reference_images: Annotated[int, Field(ge=2)] | None = None
    """Images of the data that samples are compared with; absent: all of them."""
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


class SweepConfig(Section):
    """Axes of the grid and how each cell is measured."""

    dividers: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8)
    patch_batch_sizes: Annotated[tuple[PatchBatchSize, ...], Field(min_length=1)] = ("index", "all")
    batch_sizes: tuple[Positive, ...] = ()
    """Batch sizes to measure; empty: training.batch_size."""
    mixed_precisions: tuple[Precision, ...] = ()
    """Precisions to measure; empty: training.mixed_precision."""
    repeats: Positive = 1
    """Fresh processes per measured cell."""
    warmup_steps: Positive = 2
    """Steps before the warm reading; the first of them is the cold reading."""
    measured_steps: Positive = 5
    """Steps timed and metered warm."""
    quality: bool = True
    """Train, sample and score each divider; false: memory and speed only."""
    seeds: tuple[NonNegative, ...] = ()
    """Train each divider once per seed, on the same images, and show the spread; empty: once, with the experiment's seed."""
    equal: Literal["images", "seconds"] = "images"
    """What is held equal between trainings: the images seen (training.num_steps), or the seconds of training."""
    equal_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds of each training, where they are held equal."""
    variants: Annotated[dict[str, dict[str, Any]], AfterValidator(checked_variants)] = Field(default_factory=dict)
    """Name → settings laid over the experiment (sections model, diffusion, training, sampling), for ablations and rivals: each
    is measured, trained and scored beside the experiment itself, at the sweep's dividers or at its own ``dividers``."""
    checkpoints: dict[str, str] = Field(default_factory=dict)
    """Divider (as text) → checkpoint folder to load instead of training."""
    memory_snapshots: bool = False
    """On CUDA also write torch's own memory snapshot of each step for its viewer, into snapshots/; a pickle."""
    cell_timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    """A cell that takes longer is stopped and recorded as timed_out; absent: no limit."""

    @field_validator("dividers", "batch_sizes", "patch_batch_sizes", "mixed_precisions", "seeds")
    @classmethod
    def _unique(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _comparable(self) -> SweepConfig:
        if (self.equal == "seconds") != (self.equal_seconds is not None):
            raise ValueError('equal = "seconds" and equal_seconds go together: give both or neither')
        if self.checkpoints and (self.seeds or self.equal != "images"):
            raise ValueError('checkpoints are trained already: give no seeds, and no equal but "images", with them')
        return self


class SlurmConfig(Section):
    """What ``--executor slurm`` asks of the scheduler for each cell; one GPU each, none where the device is the CPU."""

    partition: str | None = None
    """Absent: the cluster's default."""
    minutes_per_cell: Positive = 24 * 60
    """Time limit of a job. A cell that reaches it is queued again, up to three times, and its training goes on."""
    memory_gib: Positive | None = None
    """Host memory; absent: the cluster's default."""
    cpus_per_cell: Positive = 4
    max_parallel: Positive = 64
    """Cells that may run at the same time."""
    extra: dict[str, str | int] = Field(default_factory=dict)
    """Any other option of sbatch, by its long name: {account = "vision", qos = "low", constraint = "h200"}."""


class Experiment(Section):
    """One run, whole. ``seed`` governs weights, data order, timesteps and training noise."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    """Names the results folder: letters, digits, dots, dashes, underscores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU, else the CPU."""
    seed: NonNegative = 0
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    quality: QualityConfig = QualityConfig()
    sweep: SweepConfig = SweepConfig()
    slurm: SlurmConfig = SlurmConfig()

    @property
    def data_seed(self) -> int:
        """Of the built-in scenes and of the held-out loss's noise: what all trainings that are compared share."""
        return self.seed if self.data.seed is None else self.data.seed

    def with_divider(self, patch_divider: int) -> Experiment:
        """The same experiment at another divider, checked again. Raises InputError where the image does not divide."""
        return self.at(patch_divider)

    def at(self, patch_divider: int, variant: str = "", seed: int | None = None) -> Experiment:
        """The experiment at a divider, with a variant's settings laid over it, trained from ``seed`` on the same images;
        checked again. Of the variants only that one stays, so that doing it twice comes to the same. Raises InputError."""
        chosen = {variant: self.sweep.variants[variant]} if variant else {}
        values = merge(self.model_dump(mode="json"), laid_over(chosen.get(variant, {})))
        values["model"]["patch_divider"] = patch_divider
        values["sweep"]["variants"] = chosen
        if seed is not None:
            values["seed"], values["data"]["seed"] = seed, self.data_seed
        return _validated(values, f"{_named(variant)} at divider {patch_divider}" if variant else "--dividers")

    def to_toml(self) -> str:
        """The resolved experiment; loading it gives the same one (absent keys are those without a value)."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid onto ``base``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def parse_experiment(values: dict[str, Any], origin: str) -> Experiment:
    """Validate; raises InputError whose one line names the key, what is wrong and what would fit."""
    dividers = values.get("sweep", {}).get("dividers") if isinstance(values.get("sweep"), dict) else None
    if dividers and isinstance(dividers, list | tuple):  # a sweep's file need not name a divider of its own
        values = merge({"model": {"patch_divider": dividers[0]}}, values)
    experiment = _validated(values, origin)
    for name, variant in experiment.sweep.variants.items():
        alone = merge(experiment.model_dump(mode="json"), laid_over(variant))
        alone["model"]["patch_divider"] = variant.get("dividers", [experiment.model.patch_divider])[0]
        _validated(alone, f"{origin}: {_named(name)}")
    return experiment


def _named(variant: str) -> str:
    return f'sweep.variants."{variant}"'


def _validated(values: dict[str, Any], origin: str) -> Experiment:
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        innermost = [e for e in found if not any(o is not e and o["loc"][: len(e["loc"])] == e["loc"] for o in found)]
        raise InputError(f"{origin}: {'; '.join(_problem(e) for e in innermost[:4])}") from None


def _problem(error: Any) -> str:
    where = ".".join(
        str(part) for part in error["loc"] if not (isinstance(part, str) and ("[" in part or part in ("int", "str")))
    )
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(where.rpartition(".")[2], [k.rpartition(".")[2] for k in known_keys()], n=1)
        full = [k for k in known_keys() if close and k.rpartition(".")[2] == close[0]]
        section = [k for k in known_keys() if k.startswith(where.rpartition(".")[0] + ".")] or list(Experiment.model_fields)
        return f"unknown key {where}; " + (f"did you mean {full[0]}?" if full else f"known are {', '.join(section)}")
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    given = (
        "" if isinstance(error["input"], dict | BaseModel) or repr(error["input"]) in message else f" (got {error['input']!r})"
    )
    return f"{where}: {message}{given}" if where else f"{message}{given}"


def known_keys() -> list[str]:
    """Every setting as section.key, in the order of this file."""
    keys: list[str] = []
    for name, field in Experiment.model_fields.items():
        section = field.annotation
        nested = isinstance(section, type) and issubclass(section, BaseModel)
        keys += [f"{name}.{key}" for key in section.model_fields] if nested else [name]  # type: ignore[union-attr]
    return keys


def experiments_folder() -> Path:
    """The experiment files: beside the package in a clone, inside it when installed from a wheel."""
    inside = Path(__file__).parent / "experiments"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "experiments"


def preset_names() -> list[str]:
    return sorted(path.stem for path in experiments_folder().glob("*.toml"))


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A TOML file as a dict. Raises InputError where it is absent, unreadable or malformed."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read the experiment file {path}: {one_line(error)}") from None


def parse_override(text: str) -> dict[str, Any]:
    """``section.key=value`` as a nested dict; the value is read as TOML (quotes may be left off a word)."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {text!r}: expected section.key=value, for example training.num_steps=1000")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        parsed = value.strip()
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed


def load_experiment(
    file: str | os.PathLike[str] | None = None, preset: str | None = None, overrides: Iterable[dict[str, Any]] = ()
) -> Experiment:
    """The experiment of a file or a preset (not both; neither: the defaults), with overrides laid on in order."""
    if file is not None and preset is not None:
        raise InputError("--experiment and --preset exclude each other; give one")
    if preset is not None and preset not in preset_names():
        raise InputError(f"--preset {preset!r} is not known; there are {', '.join(preset_names())}")
    path = experiments_folder() / f"{preset}.toml" if preset else file
    values = read_toml(path) if path is not None else {}
    origin = str(file) if file is not None else f"preset {preset}" if preset else "settings"
    parse_experiment(values, origin)  # first alone, so that a mistake in the file is not blamed on an override
    given = list(overrides)
    for override in given:
        values = merge(values, override)
    return parse_experiment(values, "options laid on " + origin if given else origin)


def differences(old: Experiment, new: Experiment) -> list[str]:
    """The settings in which two experiments differ, as ``section.key: old → new``."""

    def flat(experiment: Experiment) -> dict[str, str]:
        dump = experiment.model_dump(mode="json")
        pairs = {k: v for k, v in dump.items() if not isinstance(v, dict)}
        pairs |= {f"{s}.{k}": v for s, section in dump.items() if isinstance(section, dict) for k, v in section.items()}
        return {key: json.dumps(value) for key, value in pairs.items()}

    before, after = flat(old), flat(new)
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in after if before.get(key) != after.get(key)]
