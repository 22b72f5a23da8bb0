"""A run folder as a sweep writes it, made up without a GPU or training: what the report's tests read.

The figures are those of a real run in kind: on CUDA the peaks of the paper's network at 128 × 128 and batch 32 (the table in
the README), on a CPU a fiftieth of them. Everything follows from the arguments, so that two calls give the same bytes.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pbbench.records.cells import CellResult, write_cell
from pbbench.records.files import write_json, write_text
from pbbench.records.rows import CATEGORIES, Row

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
WEIGHTS = 484  # MiB
# Divider → Fréchet distance, held-out loss, seam score.
QUALITY = {1: (41.2, 0.1712, None), 2: (44.9, 0.1741, 1.08), 4: (52.7, 0.1809, 1.24), 8: (71.3, 0.1986, 1.61)}
FLOOR = 18.5
BANDS = [{"t_min": 250 * i, "t_max": 250 * i + 249, "loss": loss} for i, loss in enumerate((0.4, 0.2, 0.1, 0.05))]
NO_GPU = "read on CUDA devices only; this phase ran on cpu"


def measure_cell(
    divider: int,
    passes: int,
    *,
    device: str = "cpu",
    batch_size: int = 32,
    precision: str = "no",
    repeat: int = 0,
    predicted: bool = False,
    failed: dict[str, str] | None = None,
    variant: str = "",
) -> CellResult:
    """One measured cell; ``passes``: patches a pass; ``failed``: phase → status of what did not end well; ``variant``: a rival
    of so many patches a pass. Without one the cell is as those were before there were variants."""
    failed = failed or {}
    name = f"{variant}-" * bool(variant) + f"d{divider}-p{passes}-b{batch_size}-{precision}" + (f"-r{repeat}" if repeat else "")
    axes = {"patch_divider": divider, "patch_batch_size": passes, "batch_size": batch_size, "mixed_precision": precision}
    axes |= {"repeat": repeat} | ({"variant": variant} if variant else {})
    base: dict[str, Any] = {"cell": name, "device": device, "image_size": "128×128", "dim": 128, "dim_mults": "1,2,4,8"}
    base |= {**axes, "gradient_accumulation_steps": 1, "seed": 0}
    rows, details, error = [], {"by_module": {}, "step_seconds": {}, "ledger": {}}, {}
    for step in ("sample_step", "train_step"):
        rows.append(Row(**base, phase="load", temperature="cold", peak_rss_bytes=600 * MIB))
        if step in failed:
            message = "CUDA out of memory.\nTried to allocate 20_000 MiB & more"
            reasons = {"seconds_per_step": f"{failed[step]}: CUDA out of memory."}
            rows.append(Row(**base, phase=step, status=failed[step], reasons=reasons))  # type: ignore[arg-type]
            error = {"phase": step, "type": "OutOfMemoryError", "message": message}
            if failed[step] == "out_of_memory":
                error |= {"requested": 20000 * MIB, "free": 300 * MIB, "allocated": 70000 * MIB, "reserved": 71000 * MIB}
            continue
        parts = _parts(step, divider, passes, batch_size, precision, device)
        live = sum(parts.values()) + 4096 * repeat
        parts["activation"] += 4096 * repeat
        speed = (30 if step == "train_step" else 110) * divider**0.15 * (1 + 0.01 * repeat) / (20 if device == "cpu" else 1)
        speed *= 1.0 if passes == batch_size * divider**2 else 0.92
        split = {f"{category}_bytes": parts[category] for category in CATEGORIES} | {"peak_live_bytes": live}
        timed = {"images_per_second": speed, "seconds_per_step": batch_size / speed}
        for temperature in ("cold", "warm"):
            values, reasons = _meters(live, temperature, device)
            values |= timed | (split | {"flops_per_image": 10**11} if temperature == "warm" else {})
            if predicted and temperature == "warm":
                values |= {"predicted_allocated_bytes": live + 10 * MIB, "predicted_reserved_bytes": live + 150 * MIB}
            rows.append(Row(**base, phase=step, temperature=temperature, reasons=reasons, **values))  # type: ignore[arg-type]
        for inner in ("forward", "backward", "optimizer") if step == "train_step" else ("forward",):
            rows.append(Row(**base, phase=inner, temperature="warm", **split))  # type: ignore[arg-type]
        details["by_module"][step] = [
            ["downs.0.block1", parts["activation"] // 2],
            ["ups.2.attention", parts["activation"] // 4],
        ]
        details["step_seconds"][step] = [batch_size / speed * factor for factor in (1.0, 1.02, 0.99)]
        if device != "cpu":
            held = {
                "requested": 500 * MIB,
                "allocated": 501 * MIB,
                "reserved": live,
                "process": None,
                "device": live + 900 * MIB,
            }
            details["ledger"][step] = {"closing": held, "nvml": {"api": "v2", "samples": 9, "longest_gap_s": 0.0021}}
    status: Any = next(reversed(failed.values())) if failed else "ok"
    return CellResult(id=name, kind="measure", status=status, axes=axes, rows=rows, error=error, details=details)


def _parts(step: str, divider: int, passes: int, batch_size: int, precision: str, device: str) -> dict[str, int]:
    """What fills the peak, by category: the peak of the table, weights and their kin, and activations as the rest."""
    scale = (0.02 if device == "cpu" else 1.0) * batch_size / 32 * (1.0 if precision == "no" else 0.6)
    weights = int(WEIGHTS * scale * MIB)
    parts = dict.fromkeys(CATEGORIES, 0) | {"parameter": weights, "input": int(6 * scale * MIB), "other": 1024}
    if step == "train_step":
        parts |= {"gradient": weights, "optimizer": 2 * weights, "ema": weights // 8}
    least, most = PEAKS[step, divider][1], PEAKS[step, divider][0]
    total = batch_size * divider**2
    peak = least if passes <= batch_size else most if passes == total else (least + most) // 2
    parts["activation"] = int(peak * scale * MIB) // 512 * 512 - sum(parts.values())
    return parts


def _meters(live: int, temperature: str, device: str) -> tuple[dict[str, Any], dict[str, str]]:
    if device == "cpu":
        hidden = dict.fromkeys((f"peak_{kind}_bytes" for kind in ("allocated", "reserved", "process", "device")), NO_GPU)
        untraced = {"peak_live_bytes": "live tensors are counted on a warm step"} if temperature == "cold" else {}
        return {"peak_rss_bytes": live + 600 * MIB}, hidden | untraced
    allocated = live + (300 if temperature == "cold" else 30) * MIB
    values = {"peak_allocated_bytes": allocated, "peak_reserved_bytes": allocated + 200 * MIB, "peak_rss_bytes": 900 * MIB}
    return values | {"peak_device_bytes": allocated + 900 * MIB}, {"peak_process_bytes": "NVML hides it from this container"}


def _seams(score: float, wobble: list[float]) -> dict[str, Any]:
    square = (10 * (score - 1)) ** 2
    left_out = {"seam_score": [score * (1 + w) for w in wobble], "seam_excess_square": [square * (1 + w) for w in wobble]}
    return {"seam_score": score, "seam_excess": 10 * (score - 1), "seam_excess_square": square, "left_out": left_out}


def quality_cell(
    divider: int, *, device: str = "cpu", status: Any = "ok", genuine: bool = False, variant: str = "", seed: int | None = None
) -> CellResult:
    """One trained and scored divider; ``genuine``: real Inception features, hence FID. Each seed's figures are 1% above those
    of the seed before, and a variant's a tenth above the experiment's."""
    name = f"{variant}-" * bool(variant) + f"d{divider}-quality" + ("" if seed is None else f"-s{seed}")
    axes: dict[str, Any] = {"patch_divider": divider, "patch_batch_size": 32, "batch_size": 32, "mixed_precision": "no"}
    axes |= {"repeat": 0} | ({} if seed is None else {"seed": seed}) | ({"variant": variant} if variant else {})
    kept = {key: value for key, value in axes.items() if key != "seed"}  # a row's seed is that of its samples
    row = Row(cell=name, phase="quality", status=status, device=device, seed=0, image_size="128×128", dim=128, **kept)
    if status != "ok":
        error = {"phase": "train", "type": "NanLossError", "message": "the training loss was not a number at step 17"}
        row.reasons = {"held_out_loss": f"{status}: {error['message']}"}
        return CellResult(id=name, kind="quality", status=status, axes=axes, rows=[row], error=error)
    distance, loss, seam = QUALITY[divider]
    worse = (1 + 0.01 * (seed or 0)) * (1.1 if variant else 1)
    distance, loss, seam = distance * worse, loss * worse, seam and seam * worse
    column = "frechet_inception_distance" if genuine else "random_features_frechet_distance"
    kernel = "kernel_inception_distance_mean" if genuine else "random_features_kernel_distance_mean"
    row = row.model_copy(
        update={column: distance, "extractor": "inception-v3-compat" if genuine else "random features, seed 0"}
    )
    row.precision, row.recall, row.held_out_loss, row.seam_score = 0.6, 0.4, loss, seam
    row.num_images, row.images_seen, row.sampler, row.num_inference_steps = 1000, 32 * 500, "ddim", 50
    row.reasons = {"seam_score": "undefined without patch borders (d = 1)"} if seam is None else {}
    if not genuine:
        row.reasons |= {"frechet_inception_distance": "no Inception weights: pass --inception-weights FILE"}
    row.seam_excess = None if seam is None else 10 * (seam - 1)
    interval = [0.98 * distance, 1.03 * distance]
    wobble = [0.001 * math.sin(17 * group) for group in range(20)]
    row.distance_floor = FLOOR
    seams = {str(d): _seams(other if d == divider else 1.02, wobble) for d, (_, _, other) in QUALITY.items() if other}
    metrics = {
        column: distance,
        f"{column}_interval": interval,
        kernel: 0.0123,
        "floor": {column: FLOOR, f"{column}_interval": [0.9 * FLOOR, 1.1 * FLOOR]},
        "left_out": {
            column: [distance * (1 + w) for w in wobble],
            "held_out_loss": [loss * (1 + w) for w in wobble],
            **({} if seam is None else seams[str(divider)]["left_out"]),
        },
        **({} if seam is None else {"seam_excess_square": seams[str(divider)]["seam_excess_square"]}),
        "num_images": 1000,
        "notes": [],
        "reasons": {},
        "seed": 0,
    }
    details: dict[str, Any] = {"grid": f"samples/{name}.png", "metrics": metrics, "reference": "synthetic scenes, 128×128"}
    details |= {"num_reference_images": 10000, "num_held_out": 256, "loss": 0.17, "checkpoint": "trained"}
    details |= {"seams": seams}
    details |= {"held_out": {"mean": loss, "bands": BANDS, "num_images": 256, "seed": 0}}
    details |= {"train_seconds": 81.5, "sample_seconds": 40.25, "score_seconds": 12.25}
    return CellResult(id=name, kind="quality", status="ok", axes=axes, rows=[row], details=details)


def grid_image(seed: int, side: int = 32, columns: int = 6, rows: int = 6) -> Image.Image:
    """A grid of coloured tiles."""
    random = np.random.default_rng(seed)
    canvas = np.full((rows * (side + 2) + 2, columns * (side + 2) + 2, 3), 255, np.uint8)
    down, across = np.mgrid[0:side, 0:side] / side
    for i in range(rows):
        for j in range(columns):
            a, b = random.uniform(0, 255, (2, 3))
            tile = np.clip(a * down[..., None] + b * (1 - across[..., None]), 0, 255)
            canvas[2 + i * (side + 2) :, 2 + j * (side + 2) :][:side, :side] = tile
    return Image.fromarray(canvas)


def make_run(
    run: Path,
    *,
    device: str = "cpu",
    dividers: tuple[int, ...] = (1, 2, 4, 8),
    patch_batch_sizes: tuple[int | str, ...] = ("all", "index"),
    batch_sizes: tuple[int, ...] = (32,),
    precisions: tuple[str, ...] = ("no",),
    repeats: int = 1,
    scored: bool = True,
    genuine: bool = False,
    predicted: bool = False,
    failed: dict[str, dict[str, str]] | None = None,
    quality_status: dict[int, str] | None = None,
) -> Path:
    """Write the run folder. ``failed``: measured cell → phase → status; ``quality_status``: divider → status."""
    failed, quality_status = failed or {}, quality_status or {}
    axes = itertools.product(precisions, batch_sizes, dividers, patch_batch_sizes, range(repeats))
    for precision, batch_size, divider, setting, repeat in axes:
        total = batch_size * divider**2
        passes = total if setting == "all" else min(total, batch_size if setting == "index" else int(setting))
        given: dict[str, Any] = {"device": device, "batch_size": batch_size, "precision": precision, "repeat": repeat}
        cell = measure_cell(divider, passes, predicted=predicted, **given)
        write_cell(run, measure_cell(divider, passes, failed=failed[cell.id], **given) if cell.id in failed else cell)
    for divider in dividers if scored else ():
        cell = quality_cell(divider, device=device, status=quality_status.get(divider, "ok"), genuine=genuine)
        write_cell(run, cell)
        (run / "samples").mkdir(exist_ok=True)
        if cell.status == "ok":
            grid_image(divider).save(run / cell.details["grid"])
            grid_image(99).save(run / "samples" / "reference.png")
    gpu = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "560.35", "cudnn": 91002}
    environment: dict[str, Any] = {"device": device, "torch": "2.15.0", "cuda": "12.8", "python": "3.11.9", "platform": "Linux"}
    environment |= gpu if device != "cpu" else dict.fromkeys(gpu)
    environment |= {"cpu": "a CPU", "cpu_cores": 2, "memory_bytes": 8 * 2**30, "tf32": {"matmul": False, "cudnn": True}}
    environment |= {"allocator_settings": "default", "commit": "0123abc", "dirty": False, "time": "2026-11-23T12:00:00+00:00"}
    environment["reasons"] = {} if device != "cpu" else dict.fromkeys(gpu, "the run is on the CPU")
    write_json(run / "environment.json", environment)
    settings = ['name = "made"', "seed = 0", "[model]", "dim = 128", "image_size = 128", "[data]", 'source = "synthetic"']
    settings += ["[training]", f"batch_size = {batch_sizes[0]}", "num_steps = 500", "[sampling]", 'sampler = "ddim"']
    write_text(run / "experiment.toml", "\n".join(settings) + "\n")
    return run
