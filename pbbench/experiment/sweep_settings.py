"""The sections of an experiment about a sweep: the axes of its grid, what is held equal, and what a scheduler is asked for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from pbbench.experiment.settings import NonNegative, PatchBatchSize, Positive, Precision, Section
from pbbench.experiment.sizes import byte_count
from pbbench.experiment.variants import checked_variants


def _memory(value: object) -> object:
    """Accept "8GiB" and the like, or a whole number of bytes."""
    if isinstance(value, str):
        return byte_count(value)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError(f"{value!r} is not an amount of memory, such as 8GiB, or a whole number of bytes")


class Fitted(Section):
    """How one divider of the experiment, or of a variant, trains in a given memory."""

    batch_size: Positive
    gradient_accumulation_steps: Positive
    patch_batch_size: Positive
    predicted_bytes: Positive
    """Of a training step: peak live bytes on a CPU, reserved bytes on CUDA. More than was given: nothing fits, and this is the
    setting that needs least."""

    def training(self) -> dict[str, int]:
        """What of it is laid over the section training."""
        return self.model_dump(exclude={"predicted_bytes"})


def place_name(variant: str, patch_divider: int) -> str:
    """The key of ``sweep.fitted``."""
    return f"{variant}/{patch_divider}"


SHIPPED = "shipped"
"""Among ``sweep.checkpoints``: the trained divider that comes with pbbench."""


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
    quality_from: str | None = None
    """A preset whose network, data, training, sampling and scoring quality cells have in the place of the experiment's: where
    the network that is measured takes too long to train until it ranks. Rows and reports say of which network each figure
    is."""
    seeds: tuple[NonNegative, ...] = ()
    """Train each divider once per seed, on the same images, and show the spread; empty: once, with the experiment's seed."""
    equal: Literal["images", "seconds", "memory"] = "images"
    """What is held equal between trainings: the images seen (training.num_steps), the seconds of training, or, with the images,
    the memory of a training step. "memory": every training sees the same images in the same optimizer batches; for each divider
    (of each variant) the quickest way to take an optimizer step that is predicted to fit is chosen among micro-batch × gradient
    accumulation, their product unchanged, and patches a pass. Gradients are the same within rounding, so what differs is the
    time, and the quality, at equal memory. Precision and recompute stay the experiment's or the variant's own. Each divider is
    measured as it is trained: patch_batch_sizes does not apply."""
    equal_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds of each training, where they are held equal."""
    equal_memory: Annotated[int, BeforeValidator(_memory)] | None = None
    """Memory of each training step, where it is held equal: text as "8GiB", or bytes. It is held against predictions: peak live
    bytes on a CPU; on CUDA reserved bytes, without CUDA's workspaces and context, which no prediction knows."""
    fitted: dict[str, Fitted] = Field(default_factory=dict)
    """What a sweep has chosen where the memory is held equal: "variant/divider" → settings. Written by the sweep into the run's
    experiment.toml and taken from there when it is resumed; given anywhere else it is found anew."""
    variants: Annotated[dict[str, dict[str, Any]], AfterValidator(checked_variants)] = Field(default_factory=dict)
    """Name → settings laid over the experiment (sections model, diffusion, training, sampling), for ablations and rivals: each
    is measured, trained and scored beside the experiment itself, at the sweep's dividers or at its own ``dividers``."""
    checkpoints: dict[str, str] = Field(default_factory=dict)
    """Divider (as text) → checkpoint folder to load instead of training; or "shipped": the trained divider that comes with
    pbbench, where network, objective, data and training are those of the preset; trained otherwise."""
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
        if (self.equal == "memory") != (self.equal_memory is not None):
            raise ValueError('equal = "memory" and equal_memory go together: give both or neither')
        axes = [name for name in ("batch_sizes", "mixed_precisions") if getattr(self, name)]
        if self.equal == "memory" and axes:
            own = "training.batch_size and training.mixed_precision say how"
            given = " and no ".join(axes)
            raise ValueError(f'with equal = "memory" each divider is measured as it is trained: give no {given}; {own}')
        if self.fitted and self.equal != "memory":
            raise ValueError('fitted belongs to equal = "memory"; leave it out')
        folders = [given for given in self.checkpoints.values() if given != SHIPPED]
        if self.quality_from is not None and (self.variants or folders or self.equal != "images"):
            raise ValueError("with quality_from trainings are of another experiment: give no variants, checkpoints or equal")
        if folders and (self.seeds or self.equal != "images"):
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
