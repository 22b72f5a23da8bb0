"""Samples as images: batches in uint8, a folder of PNG files, and the grid of what the averaged weights draw so far.

The image of an index is the same whatever the batch: its noise comes from (seed, image index, step). Several processes share
the images out by whole batches, the batches that one process would draw, so that not even the rounding depends on their number.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbbench.errors import InputError, writing_to
from pbbench.experiment.experiment import Experiment, merge, parse_experiment
from pbbench.experiment.settings import SamplingConfig
from pbbench.model.diffusion import Diffusion
from pbbench.model.placement import cast_weights
from pbbench.model.sampling import sample, to_uint8
from pbbench.model.unet import PatchUNet
from pbbench.processes import joined_processes
from pbbench.records.files import write_bytes


def generate(
    model: PatchUNet,
    diffusion: Diffusion,
    config: SamplingConfig,
    num_images: int,
    device: torch.device,
    progress: Callable[[dict[str, Any]], None] = lambda state: None,
) -> list[Tensor]:
    """Images 0 … num_images − 1 of ``config.seed`` as uint8 tensors (C, H, W) on the CPU."""
    return [image for _, image in draw(model, diffusion, config, num_images, device, progress=progress)]


def draw(
    model: PatchUNet,
    diffusion: Diffusion,
    config: SamplingConfig,
    num_images: int,
    device: torch.device,
    *,
    wanted: range | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda state: None,
) -> Iterator[tuple[int, Tensor]]:
    """The images ``wanted`` (None: all) of 0 … num_images − 1, as (index, uint8 tensor of C, H, W on the CPU). The batches that
    hold them are drawn whole."""
    wanted, size = range(num_images) if wanted is None else wanted, config.batch_size
    first = wanted.start // size * size if wanted else num_images
    batches = [range(start, min(start + size, num_images)) for start in range(first, wanted.stop, size)]
    total, done = sum(map(len, batches)), 0
    started = time.perf_counter()
    for indices in batches:
        x = sample(model, diffusion, config, indices, device=device)  # N, C, H, W
        for index, image in zip(indices, to_uint8(x, config.to_uint8).cpu().unbind(), strict=True):
            if index in wanted:
                yield index, image
        done += len(indices)
        rate = done / (time.perf_counter() - started)
        progress({"step": done, "num_steps": total, "images_per_second": rate, "seconds_left": (total - done) / rate})


def sample_settings(experiment: Experiment, overrides: Iterable[dict[str, Any]]) -> Experiment:
    """A checkpoint's experiment with options laid on. Raises InputError for a value that does not fit."""
    values = experiment.model_dump(mode="json")
    for override in overrides:
        values = merge(values, override)
    changed = parse_experiment(values, "options laid on the checkpoint's settings")
    if changed.model != experiment.model or changed.diffusion != experiment.diffusion:
        raise InputError("a checkpoint's model and diffusion cannot be changed when sampling; only sampling.* can")
    return changed


def sample_to_folder(
    checkpoint: Path, num_images: int, out: Path, overrides: Iterable[dict[str, Any]], device_name: str
) -> Path:
    """Write ``num_images`` PNG files, 000000.png and on, into ``out``, which must be empty or new. Returns ``out``.

    To be called by every process of a torchrun; each draws and writes its share, each file once and whole.
    """
    from rich.console import Console
    from rich.progress import Progress

    from pbbench.training.checkpoint import load_model

    with joined_processes() as processes:
        device = processes.device(device_name)
        model, experiment = load_model(checkpoint, device)
        experiment = sample_settings(experiment, overrides)
        cast_weights(model, experiment.sampling.mixed_precision)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out} is not an empty folder; choose another, nothing is written over")
        with writing_to(out):
            out.mkdir(parents=True, exist_ok=True)
        processes.wait_for_all()  # every process has looked at the folder before one writes to it
        diffusion = Diffusion(experiment.diffusion, device)
        with Progress(console=Console(stderr=True), transient=True, disable=processes.rank > 0) as bar:
            task = bar.add_task("sampling", total=num_images)

            def told(state: dict[str, Any]) -> None:
                bar.update(task, completed=state["step"], total=state["num_steps"])

            wanted = processes.share(num_images, experiment.sampling.batch_size)
            images = draw(model, diffusion, experiment.sampling, num_images, device, wanted=wanted, progress=told)
            for index, image in images:
                save_png(image, out / f"{index:06}.png")
        processes.wait_for_all()
    return out


def save_images(images: Iterable[Tensor], folder: Path) -> None:
    """uint8 (C, H, W) as 000000.png and on."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        save_png(image, folder / f"{index:06}.png")


def save_png(image: Tensor, path: Path) -> None:
    """One uint8 (C, H, W) image of one or three channels, whole or not at all. Raises StorageError where it cannot be
    written. Not flushed to disk one by one: an image is quickly drawn again, and thousands of flushes are slow."""
    encoded, aside = _png(image), path.with_name(f".{path.name}.{os.getpid()}")
    with writing_to(path):
        try:
            aside.write_bytes(encoded)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def save_sample_grid(path: Path, model: PatchUNet, diffusion: Diffusion, experiment: Experiment, accelerator: Any) -> None:
    """Draw ``training.num_grid_samples`` images as ``experiment.sampling`` says and save them, in rows, as a PNG.

    Every process draws its share, so that none waits long; noise comes from the image's index, so the grid does not depend
    on their number. To be called by all processes; the main one writes.
    """
    settings, count, device = experiment.sampling, experiment.training.num_grid_samples, accelerator.device
    share = math.ceil(count / accelerator.num_processes)  # some draw beyond the grid's end; those are dropped
    first = share * accelerator.process_index
    drawn = []
    for start in range(first, first + share, settings.batch_size):
        indices = range(start, min(start + settings.batch_size, first + share))
        drawn.append(to_uint8(sample(model, diffusion, settings, indices, device=device), settings.to_uint8))
    gathered = accelerator.gather(torch.cat(drawn))  # uint8, processes · share, C, H, W
    if accelerator.is_main_process:
        write_grid(path, gathered[:count].cpu())


def write_grid(path: Path, images: torch.Tensor) -> None:
    """uint8 images N C H W, nearly square, one grey pixel between them. One channel is grey, three are colour."""
    N, C, H, W = images.shape
    columns = math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    canvas = torch.full((C, rows * (H + 1) + 1, columns * (W + 1) + 1), 128, dtype=torch.uint8)
    for n, image in enumerate(images):
        top, left = n // columns * (H + 1) + 1, n % columns * (W + 1) + 1
        canvas[:, top : top + H, left : left + W] = image
    write_bytes(path, _png(canvas if C in (3, 4) else canvas[:1]))


def _png(image: Tensor) -> bytes:
    """uint8 (C, H, W): one channel is grey."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().numpy()
    encoded = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(encoded, "PNG")
    return encoded.getvalue()
