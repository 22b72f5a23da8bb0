"""A run folder as a sweep writes it, made up without a GPU or training: what the report's tests read.

The figures are those of a real run in kind: on CUDA the peaks of the paper's network at 128 × 128 and batch 32 (the table in
the README), on a CPU a small network. Everything else follows from the arguments, so that two calls give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pbbench.records import CATEGORIES, CellResult, Row, write_cell, write_json, write_text

MIB = 2**20
# MiB of live tensors at the peak: (phase, divider) → (all patches in one pass, one patch index at a time).
PEAKS = {
    ("sample_step", 1): (3325, 3325),
    ("sample_step", 2): (3326, 1213),
    ("sample_step", 4): (3333, 685),
    ("sample_step", 8): (3360, 553),
    ("train_step", 1): (19420, 19420),
    ("train_step", 2): (19413, 6462),
    ("train_step", 4): (19474, 3103),
    ("train_step", 8): (19743, 2264),
}
WEIGHTS = 484
QUALITY = {1: (41.2, 0.1712, 1.00), 2: (44.9, 0.1741, 1.08), 4: (52.7, 0.1809, 1.24), 8: (71.3, 0.1986, 1.61)}
NO_GPU = "no CUDA device was used"


def measure_cell(
    divider: int,
    all_patches: bool,
    *,
    device: str = "cpu",
    batch_size: int = 32,
    precision: str = "no",
    repeat: int = 0,
    failed: tuple[str, str] | None = None,
    predicted: bool = False,
) -> CellResult:
    """One measured cell; ``failed``: (status, phase) of the first phase that did not end well."""
    total = batch_size * divider**2
    passes = total if all_patches else batch_size
    scale = (0.02 if device == "cpu" else 1.0) * batch_size / 32 * (1.0 if precision == "no" else 0.6)
    name = f"d{divider}-p{passes}-b{batch_size}-{precision}" + (f"-r{repeat}" if repeat else "")
    axes = {"patch_divider": divider, "patch_batch_size": passes, "batch_size": batch_size, "mixed_precision": precision}
    base: dict[str, Any] = {"cell": name, "repeat": repeat, "device": device, "image_size": "128×128", "dim": 128, "seed": 0}
    base |= {**axes, "dim_mults": "1,2,4,8", "gradient_accumulation_steps": 1}
    reasons = {f"peak_{k}_bytes": NO_GPU for k in ("allocated", "reserved", "process", "device")} if device == "cpu" else {}
    phases = [("load", None)] + [(p, t) for p in ("sample_step", "train_step") for t in ("cold", "warm")]
    phases += [(p, "warm") for p in ("forward", "backward", "optimizer")]
    rows: list[Row] = []
    broken = False
    for phase, temperature in phases:
        if failed and (phase == failed[1] or broken):
            if not broken:
                rows.append(
                    Row(
                        **base,
                        phase=phase,
                        temperature=temperature,
                        status=failed[0],
                        reasons={"seconds_per_step": "the phase failed"},
                    )
                )  # type: ignore[arg-type]
            broken = True
            continue
        values: dict[str, Any] = {}
        step = phase if phase in ("sample_step", "train_step") else "train_step" if phase != "load" else None
        if step:
            weights = int(WEIGHTS * scale * MIB)
            live = int(PEAKS[step, divider][0 if all_patches else 1] * scale * MIB) // 512 * 512 + 4096 * repeat
            parts = {"parameter": weights, "gradient": 0, "optimizer": 0, "ema": 0, "other": 2 * 512}
            if step == "train_step":
                parts |= {"gradient": weights, "optimizer": 2 * weights, "ema": weights // 8}
            parts["input"] = batch_size * 3 * 128 * 128 * 4 // (50 if device == "cpu" else 1)
            parts["activation"] = live - sum(parts.values())
            values = {f"{k}_bytes": parts[k] for k in CATEGORIES} | {
                "peak_live_bytes": live,
                "peak_rss_bytes": live + 600 * MIB,
            }
            if device != "cpu":
                extra = 300 * MIB if temperature == "cold" else 30 * MIB
                values |= {"peak_allocated_bytes": live + extra, "peak_reserved_bytes": live + extra + 200 * MIB}
                values |= {"peak_process_bytes": live + extra + 700 * MIB, "peak_device_bytes": live + extra + 900 * MIB}
                if predicted:
                    values |= {"predicted_allocated_bytes": live + 10 * MIB, "predicted_reserved_bytes": live + 150 * MIB}
            speed = (30 if step == "train_step" else 110) * (1.0 if all_patches else 0.92) * divider**0.15 * (1 + 0.01 * repeat)
            if device == "cpu":
                speed /= 20
            values |= {"images_per_second": speed, "seconds_per_step": batch_size / speed, "flops_per_image": 10**11}
        rows.append(Row(**base, phase=phase, temperature=temperature, reasons=dict(reasons), **values))  # type: ignore[arg-type]
    error: dict[str, Any] = {}
    if failed:
        error = {
            "phase": failed[1],
            "type": "OutOfMemoryError",
            "message": "CUDA out of memory.\nTried to allocate 20_000 MiB & more",
        }
        if failed[0] == "out_of_memory":
            error |= {"requested": 20000 * MIB, "free": 300 * MIB, "allocated": 70000 * MIB, "reserved": 71000 * MIB}
    modules = [["downs.0.block1", 100 * MIB], ["ups.2.attention", 60 * MIB]]
    details = (
        {}
        if failed
        else {"by_module": {"sample_step": modules, "train_step": modules}, "meters": ["live tensors at torch's dispatcher"]}
    )
    status: Any = failed[0] if failed else "ok"
    return CellResult(
        id=name, kind="measure", status=status, axes=axes | {"repeat": repeat}, rows=rows, error=error, details=details
    )


def quality_cell(divider: int, *, device: str = "cpu", status: Any = "ok", genuine: bool = False) -> CellResult:
    """One trained and scored divider; ``genuine``: real Inception features, hence FID."""
    name = f"d{divider}-quality"
    distance, loss, seam = QUALITY[divider]
    axes = {"patch_divider": divider, "patch_batch_size": None, "batch_size": 32, "mixed_precision": "no", "repeat": 0}
    row = Row(
        cell=name,
        phase="quality",
        status=status,
        device=device,
        patch_divider=divider,
        batch_size=32,
        mixed_precision="no",
        seed=0,
    )
    details: dict[str, Any] = {}
    error: dict[str, Any] = {}
    if status == "ok":
        column = "frechet_inception_distance" if genuine else "random_features_frechet_distance"
        setattr(row, column, distance)
        row.extractor = "inception-v3-compat" if genuine else "random-features"
        row.precision, row.recall, row.held_out_loss, row.num_images = 0.6, 0.4, loss, 1000
        row.images_seen, row.sampler, row.num_inference_steps = 32 * 500, "ddim", 50
        row.seam_score = seam if divider > 1 else None
        row.reasons = {} if divider > 1 else {"seam_score": "d = 1 has no patch borders"}
        if not genuine:
            row.reasons["frechet_inception_distance"] = "no Inception weights: pass --inception-weights FILE"
        details = {"grid": f"samples/d{divider}.png", "num_images": 1000, "num_reference_images": 10000, "loss": 0.17}
        details |= {
            "reference": "synthetic scenes, 32×32",
            "held_out": {
                "mean": loss,
                "bands": [{"t_min": 250 * i, "t_max": 250 * i + 249, "loss": x} for i, x in enumerate((0.4, 0.2, 0.1, 0.05))],
            },
        }
        details |= {"metrics": {column: distance, "num_images": 1000}, "train_seconds": 81.5, "score_seconds": 12.25}
    else:
        error = {"phase": "quality", "type": "FloatingPointError", "message": "the loss was nan at step 17"}
        row.reasons = {"held_out_loss": "training ended with a NaN loss"}
    return CellResult(id=name, kind="quality", status=status, axes=axes, rows=[row], error=error, details=details)


def grid_image(seed: int, side: int = 32, count: int = 6) -> Image.Image:
    """A square grid of coloured tiles."""
    random = np.random.default_rng(seed)
    canvas = np.full((count * (side + 2) + 2, count * (side + 2) + 2, 3), 255, np.uint8)
    rows, columns = np.mgrid[0:side, 0:side] / side
    for i in range(count):
        for j in range(count):
            a, b = random.uniform(0, 255, (2, 3))
            tile = a * rows[..., None] + b * (1 - columns[..., None])
            canvas[2 + i * (side + 2) :, 2 + j * (side + 2) :][:side, :side] = np.clip(tile, 0, 255)
    return Image.fromarray(canvas)


def make_run(
    run: Path,
    *,
    device: str = "cpu",
    dividers: tuple[int, ...] = (1, 2, 4, 8),
    batch_sizes: tuple[int, ...] = (32,),
    precisions: tuple[str, ...] = ("no",),
    repeats: int = 1,
    scored: bool = True,
    genuine: bool = False,
    predicted: bool = False,
    samples: bool = True,
    reference: bool = True,
    failed: dict[str, tuple[str, str]] | None = None,
    quality_status: dict[int, str] | None = None,
) -> Path:
    """Write the run folder. ``failed``: measured cell → (status, phase); ``quality_status``: divider → status."""
    failed, quality_status = failed or {}, quality_status or {}
    for precision in precisions:
        for batch_size in batch_sizes:
            for divider in dividers:
                for all_patches in (True, False) if divider > 1 else (True,):
                    for repeat in range(repeats):
                        kinds: dict[str, Any] = {
                            "device": device,
                            "batch_size": batch_size,
                            "precision": precision,
                            "repeat": repeat,
                        }
                        cell = measure_cell(divider, all_patches, predicted=predicted, **kinds)
                        if cell.id in failed:
                            cell = measure_cell(divider, all_patches, failed=failed[cell.id], **kinds)
                        write_cell(run, cell)
    if scored:
        for divider in dividers:
            write_cell(run, quality_cell(divider, device=device, status=quality_status.get(divider, "ok"), genuine=genuine))
    if samples and scored:
        (run / "samples").mkdir(parents=True, exist_ok=True)
        for divider in dividers:
            grid_image(divider).save(run / "samples" / f"d{divider}.png")
        if reference:
            grid_image(99).save(run / "samples" / "reference.png")
    gpu = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "560.35", "cuda": "12.8", "cudnn": 91002}
    environment: dict[str, Any] = {
        "device": device,
        "torch": "2.15.0",
        "python": "3.11.9",
        "platform": "Linux",
        "cpu": "a CPU",
        "cores": 2,
    }
    environment |= gpu if device != "cpu" else dict.fromkeys(gpu)
    environment |= {
        "allocator": {"PYTORCH_ALLOC_CONF": None},
        "commit": "0123abc",
        "dirty": False,
        "time": "2026-11-23T12:00:00+00:00",
    }
    environment["reasons"] = {} if device != "cpu" else dict.fromkeys(gpu, NO_GPU)
    write_json(run / "environment.json", environment)
    settings = ['name = "made"', "seed = 0", "[model]", "dim = 128", "image_size = 128", "[data]", 'source = "synthetic"']
    settings += ["[training]", f"batch_size = {batch_sizes[0]}", "num_steps = 500", "[sampling]", 'sampler = "ddim"']
    write_text(run / "experiment.toml", "\n".join(settings) + "\n")
    return run
