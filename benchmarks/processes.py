"""How much faster two processes draw and score images than one, each of one thread.

    taskset -c 0,1 python benchmarks/processes.py [--num-images 128] [--rounds 5] [--out results/processes]

In every round one process and two (``torchrun``) do the same work in turn: draw images from a checkpoint (random weights: the
time is that of trained ones) into PNG files, as ``pbbench sample`` does, and score two folders of built-in scenes, as
``pbbench fid`` does but with the random extractor: Inception takes so long an image on a CPU that it would hide all else.
**What is timed** is the work itself: the clock of the first process runs from when all have imported, loaded, joined and
worked on a few images to warm up, until all have ended. The time of scoring holds the decoding, and the distance with its
interval, which the first process computes alone. Images and figures must be the same whatever the number of processes, else
nothing is written. Writes processes.json and processes.md. **Only ratios mean something.**
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results_folder
from pbbench.records import environment

COUNTS = (1, 2)
BATCH = 8
SCORED = 8  # times as many images are scored, because that is quicker
SCORED_SIZE = (64, 64)
SETTINGS: dict[str, Any] = {
    "name": "benchmark",
    "model": {"dim": 16, "dim_mults": [1, 2, 4], "image_size": 32, "patch_divider": 2},
    "sampling": {"sampler": "ddim", "num_inference_steps": 8, "batch_size": BATCH},
}


def prepare(folder: Path, num_images: int) -> None:
    """A checkpoint and two folders of scenes."""
    import torch
    from PIL import Image

    from pbbench.data.synthetic import scenes
    from pbbench.experiment.experiment import parse_experiment
    from pbbench.training.checkpoint import write_checkpoint
    from pbbench.training.setup import build_network

    torch.set_num_threads(1)
    experiment = parse_experiment(SETTINGS, "benchmark")
    model = build_network(experiment)
    write_checkpoint(folder / "network", model=model, ema_model=model, experiment=experiment, step=1, images_seen=1)
    for seed, name in enumerate(("one", "two")):
        (folder / name).mkdir()
        for number, pixels in enumerate(scenes(seed, range(SCORED * num_images), SCORED_SIZE)):
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / name / f"{number:06}.png")


def job(folder: Path, num_images: int) -> None:
    """One process's part; the first leaves the times and what was made in ``folder``/done.json."""
    import torch

    from pbbench.model.diffusion import Diffusion
    from pbbench.processes import joined_processes
    from pbbench.quality.fid import score
    from pbbench.quality.score_sets import open_set
    from pbbench.training.checkpoint import load_model
    from pbbench.training.generate import draw, save_png

    torch.set_num_threads(1)
    device = torch.device("cpu")
    model, experiment = load_model(folder / "network", device)
    diffusion, drawn = Diffusion(experiment.diffusion, device), folder / "drawn"
    seconds = {}
    with joined_processes() as processes:

        def sample(count: int, wanted: range) -> None:
            for index, image in draw(model, diffusion, experiment.sampling, count, device, wanted=wanted):
                save_png(image, drawn / f"{index:06}.png")

        def scored(count: int | None) -> dict[str, Any]:
            sets = [open_set(str(folder / name), SCORED_SIZE, count, "cpu", processes, BATCH)[0] for name in ("one", "two")]
            return score(*sets, metrics=["fid"], extractor="random", batch_size=BATCH, processes=processes)

        drawn.mkdir(exist_ok=True)
        sample(BATCH, range(BATCH))
        scored(2 * BATCH)
        for name, work in (
            ("sample", lambda: sample(num_images, processes.share(num_images, BATCH))),
            ("score", lambda: scored(None)),
        ):
            processes.wait_for_all()
            started = time.perf_counter()
            found = work()
            processes.wait_for_all()
            seconds[name] = time.perf_counter() - started
        if processes.rank == 0:
            files = sorted(drawn.iterdir())[:num_images]
            images = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
            done = {"seconds": seconds, "made": {"images": images, "scores": found}}
            (folder / "done.json").write_text(json.dumps(done), encoding="utf-8")


def launch(count: int, folder: Path, num_images: int) -> dict[str, Any]:
    for path in (folder / "drawn").glob("*.png"):
        path.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), __file__]
    words = ["--job", str(folder), "--num-images", str(num_images)]
    subprocess.run([*command, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    found: dict[str, Any] = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    return found


def measure(num_images: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, num_images)
        done = [{count: launch(count, folder, num_images) for count in COUNTS} for _ in range(rounds)]
    made = [one["made"] for each in done for one in each.values()]
    if any(other != made[0] for other in made):
        raise SystemExit("images or figures depend on the number of processes: nothing is written")
    rows = []
    for work, images in (("sample", num_images), ("score", 2 * SCORED * num_images)):
        seconds = {count: [each[count]["seconds"][work] for each in done] for count in COUNTS}
        medians = {count: statistics.median(values) for count, values in seconds.items()}
        rows.append(
            {
                "work": work,
                "num_images": images,
                "seconds": {str(count): values for count, values in seconds.items()},
                "images_per_second": {str(count): images / median for count, median in medians.items()},
                "times_as_fast": medians[1] / medians[2],
            }
        )
    return {"rounds": rounds, "cores": len(os.sched_getaffinity(0)), "rows": rows}


def markdown(report: dict[str, Any]) -> str:
    model, sampling = SETTINGS["model"], SETTINGS["sampling"]
    what = {
        "sample": f"draw and write {model['image_size']} × {model['image_size']} (dim {model['dim']}, d = "
        f"{model['patch_divider']}, {sampling['num_inference_steps']} steps of {sampling['sampler'].upper()})",
        "score": f"decode and score {SCORED_SIZE[0]} × {SCORED_SIZE[1]} (random extractor, Fréchet distance with its interval)",
    }
    lines = [
        "# Two processes against one",
        "",
        f"Processes of one thread each on {report['cores']} core{'s' if report['cores'] > 1 else ''} (CPU, gloo), batches of "
        f"{BATCH}; the same images and figures.",
        "Start-up, imports and loading are not in the times: the clock runs from when all are warm to when all have ended.",
        f"Medians of {report['rounds']} rounds in turn. Made by `python benchmarks/processes.py`.",
        "",
        "| work | images | one process (images/s) | two | two ÷ one | seconds of each round, one | two |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in report["rows"]:
        one, two = (", ".join(f"{value:.2f}" for value in row["seconds"][str(count)]) for count in COUNTS)
        speeds = row["images_per_second"]
        lines.append(
            f"| {what[row['work']]} | {row['num_images']:,} | {speeds['1']:,.1f} | {speeds['2']:,.1f} "
            f"| **{row['times_as_fast']:.2f}** | {one} | {two} |"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = results_folder.parser(__doc__, "results/processes")
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # what torchrun starts
    options = parser.parse_args(words)
    if options.job:
        job(options.job, options.num_images)
        return
    report = measure(options.num_images, options.rounds)
    results_folder.publish(options.out, "processes", report, markdown(report), environment.probe("cpu"))
    print(markdown(report))


if __name__ == "__main__":
    main()
