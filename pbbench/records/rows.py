"""What a run writes and a report reads: one cell file per cell, each holding rows, in one versioned schema.

A row is one cell × phase × cold or warm × repeat. Bytes are integers; nothing unknown is 0: it is None, and ``reasons``
says why (column → reason). No torch here, so that a report can be made anywhere.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

SCHEMA_VERSION = 1

Status = Literal["ok", "out_of_memory", "killed", "crashed", "timed_out", "nan_loss"]
Phase = Literal["load", "train_step", "forward", "backward", "optimizer", "sample_step", "sample", "quality"]


class Row(BaseModel):
    """One measured row. Units stand in the names: bytes are integers, seconds and rates are floats."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    cell: str
    """The cell's id, which names its file."""
    variant: str = ""
    """Which of the sweep's variants it is of; empty: the experiment itself."""
    status: Status = "ok"
    phase: Phase
    temperature: Literal["cold", "warm"] | None = None
    """cold: the first run in a fresh process; warm: after the warm-up; None where the phase has no such difference."""
    repeat: int = 0
    device: str | None = None
    image_size: str | None = None
    """height×width in pixels."""
    dim: int | None = None
    dim_mults: str | None = None
    patch_divider: int | None = None
    patch_batch_size: int | None = None
    """Effective: patches (image × patch index) in one pass."""
    batch_size: int | None = None
    """Images per process and micro-batch."""
    gradient_accumulation_steps: int | None = None
    mixed_precision: str | None = None
    peak_allocated_bytes: int | None = None
    """torch.cuda.max_memory_allocated over the phase."""
    peak_reserved_bytes: int | None = None
    """torch.cuda.max_memory_reserved over the phase."""
    peak_process_bytes: int | None = None
    """NVML: GPU memory of this process."""
    peak_device_bytes: int | None = None
    """NVML: used memory of the whole GPU."""
    peak_rss_bytes: int | None = None
    """Resident memory of the process in host RAM (VmHWM)."""
    peak_live_bytes: int | None = None
    """Live tensor storage, each storage rounded up to 512 bytes, counted at torch's dispatcher."""
    parameter_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    ema_bytes: int | None = None
    input_bytes: int | None = None
    activation_bytes: int | None = None
    other_bytes: int | None = None
    """What is in none of the six above; the seven sum to peak_live_bytes."""
    predicted_allocated_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    seconds_per_step: float | None = None
    images_per_second: float | None = None
    flops_per_image: int | None = None
    """Floating-point operations (a multiply-add is two) per image in this phase."""
    joules_per_image: float | None = None
    """Energy of the whole GPU over the phase, by NVML's counter, per image: other processes' work on it counts, too."""
    frechet_inception_distance: float | None = None
    kernel_inception_distance_mean: float | None = None
    random_features_frechet_distance: float | None = None
    """Frechet distance of a fixed-seed random convolutional extractor: not FID and not comparable with it."""
    few_images_inception_frechet_distance: float | None = None
    """As FID, from no more images than the extractor has features: biased upward, so not FID."""
    unverified_inception_frechet_distance: float | None = None
    """As FID, with a weights file that is not the published one: not FID."""
    patch_frechet_inception_distance: float | None = None
    """As FID, between patches at the images' own resolution."""
    random_features_patch_frechet_distance: float | None = None
    """As random_features_frechet_distance, between patches at the images' own resolution."""
    extractor: str | None = None
    distance_floor: float | None = None
    """The first distance of this row, of as many real images that are not among the reference."""
    precision: float | None = None
    recall: float | None = None
    random_features_precision: float | None = None
    random_features_recall: float | None = None
    """Precision and recall among the features of the random extractor: not comparable with Inception's."""
    seam_score: float | None = None
    seam_excess: float | None = None
    """Grey levels of 255: the root-mean-square step across patch borders beyond that of the reference at the same lines."""
    held_out_loss: float | None = None
    num_images: int | None = None
    """Samples scored."""
    images_seen: int | None = None
    """Training images that went into the weights (steps × accumulation × batch × processes)."""
    sampler: str | None = None
    num_inference_steps: int | None = None
    seed: int | None = None
    reasons: dict[str, str] = Field(default_factory=dict)
    """Why a column is null: column → reason."""

    @field_validator("reasons")
    @classmethod
    def _known(cls, reasons: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in reasons if name not in cls.model_fields]
        if unknown:
            raise ValueError(f"reasons name unknown columns: {', '.join(unknown)}")
        return reasons


COLUMNS = tuple(Row.model_fields)
CATEGORIES = ("parameter", "gradient", "optimizer", "ema", "input", "activation", "other")
