"""How long training and sampling steps take per divider, patches a pass and recomputation, on this device.

    python benchmarks/speed.py [--dim 32] [--image-size 64 128] [--batch-size 4] [--dividers 1 2 4 8] [--seconds 150]
    python benchmarks/speed.py --dim 128 --image-size 128 --batch-size 8 1 --dividers 4 --out results/speed/paper

All variants of a step are built first and then take turns, one step each, round after round, so that a machine that slows
down slows all of them; the first round warms up and is not counted. **Only ratios mean something**: medians are held against
the same divider with all patches in one pass, against the plain version of that pass (``tests/support/plain_unet.py``: the
same network written without any savings) and against d = 1. Every variant's weights and Adam's state exist at once.

Sampling and training are timed in a process each, as they are run. On a CPU what a process has allocated before decides how
quickly it gets memory: the C library maps blocks above 32 MiB afresh, page by page, unless freed ones lie at hand. Stacked
passes feel it most; with MALLOC_MMAP_MAX_=0 in the environment nothing is mapped afresh.

Writes speed.csv (every variant's median, quartiles and ratios), speed.md and environment.json.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import results_folder
from paper_network import RECOMPUTE, STEPS, Row, planned
from pbbench.errors import InputError
from pbbench.records import environment
from pbbench.records.files import write_json, write_text
from turns import in_turns

FEWEST_ROUNDS = 3
PLAIN = "all, plain"
"""All patches in one pass of the network that saves nothing."""


def variants(dim: int, size: int, batch: int, dividers: Sequence[int], chunks: Sequence[Any] = ("all", "index")) -> list[Row]:
    """What is timed at one image size: each step, divider and patches a pass that fit; recomputation with one patch index a
    pass; the plain network beside all patches in one pass. Settings that come to the same number of patches a pass are one
    variant, under the first name."""
    found: list[Row] = []
    for d in dividers:
        seen = set()
        for passes in chunks:
            try:
                _, cell = planned(size, batch, d, passes, dim=dim)
            except InputError:
                continue  # the image does not divide so far
            if cell.patch_batch_size in seen:
                continue
            seen.add(cell.patch_batch_size)
            base = {"dim": dim, "image_size": size, "batch_size": batch, "patch_divider": d, "passes": passes}
            base |= {"patch_batch_size": cell.patch_batch_size, "recompute": "none"}
            found += [{"step": step} | base for step in STEPS]
            if passes == "all":
                found += [{"step": step} | base | {"passes": PLAIN} for step in STEPS]
            if passes == "index" or d == 1:
                found += [{"step": "train"} | base | {"recompute": how} for how in RECOMPUTE]
    return found


def build(variant: Row, device: str) -> Callable[[], None]:
    """The variant's step, to be called again and again; it returns when the device has done its work."""
    import torch

    from pbbench.sweep import workload

    shape = (variant[name] for name in ("image_size", "batch_size", "patch_divider", "patch_batch_size"))
    experiment, cell = planned(*shape, dim=variant["dim"], recompute=variant["recompute"])
    make = workload.training_workload if variant["step"] == "train" else workload.sampling_workload
    with plain_network() if variant["passes"] == PLAIN else nullcontext():
        run = make(experiment, cell, torch.device(device)).run
    return run if device == "cpu" else lambda: (run(), torch.cuda.synchronize())[0]


@contextmanager
def plain_network() -> Iterator[None]:
    """Workloads built in this context run the plain network on the same weights."""
    from torch import nn

    from pbbench.model.patching import split
    from pbbench.model.reference import reference_name
    from pbbench.sweep import workload

    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    from plain_unet import plain_unet

    class Plain(nn.Module):
        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network, self.config = network, network.config

        def set_recompute(self, recompute: str) -> Plain:
            return self

        def forward(self, x_t: Any, t: Any, patch_batch_size: Any = None, rows: Any = None) -> Any:
            weights = {reference_name(name): parameter for name, parameter in self.network.named_parameters()}
            images = plain_unet(weights, x_t, t, self.config.patch_divider, self.config.resnet_block_groups)
            return images if rows is None else split(images, self.config.patch_divider, rows)

    lean = workload.build_model
    workload.build_model = lambda *args: Plain(lean(*args))  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        workload.build_model = lean
        sys.path.pop()


def measure(chosen: Sequence[Row], device: str, seconds: float) -> list[Row]:
    """All variants in turns, for so many seconds."""
    times = in_turns({number: build(variant, device) for number, variant in enumerate(chosen)}, seconds, FEWEST_ROUNDS)
    rows = []
    for variant, took in zip(chosen, times.values(), strict=True):
        low, median, high = statistics.quantiles(took, n=4)
        rows.append(variant | {"rounds": len(took), "median_seconds": median, "quartile1": low, "quartile3": high})
    return [row | _ratios(row, rows) for row in rows]


def _ratios(row: Row, rows: Sequence[Row]) -> Row:
    """Time over that of all patches in one pass, of the plain network, of d = 1, and of the same variant without
    recomputation."""
    median = row["median_seconds"]

    def over(*, plain: bool = False, **other: Any) -> float | None:
        wanted = row | other
        keys = ("step", "dim", "image_size", "batch_size", "patch_divider", "patch_batch_size", "recompute")
        match = [
            r["median_seconds"] for r in rows if all(r[key] == wanted[key] for key in keys) and (r["passes"] == PLAIN) == plain
        ]
        return median / match[0] if match else None

    d, batch = row["patch_divider"], row["batch_size"]
    return {
        "time_over_all_patches": over(patch_batch_size=batch * d * d, recompute="none"),
        "time_over_plain": over(patch_batch_size=batch * d * d, recompute="none", plain=True),
        "time_over_d1": over(patch_divider=1, patch_batch_size=batch, recompute="none"),
        "time_over_no_recompute": over(recompute="none"),
    }


def markdown(rows: Sequence[Row], device: str) -> str:
    """The ratios for people."""
    lines = [
        "# Speed: training and sampling steps",
        "",
        f"dim {rows[0]['dim']}, widths × 1, 2, 4, 8, float32, on {device}: "
        f"medians of {min(r['rounds'] for r in rows)} rounds in which all variants take turns. Times count as ratios only: "
        "*speed* is relative to all patches in one pass at the same divider, *against plain* to the same pass of a network "
        "written without any savings (above 1 is faster); *over d = 1* is the time against the undivided image.",
    ]
    for step, title in STEPS.items():
        if all(r["step"] != step for r in rows):
            continue
        lines += ["", f"## {title}", ""]
        lines += ["| image | batch | d | patches a pass | recompute | ms per image | speed | against plain | over d = 1 |"]
        lines += ["|---|---:|---:|---|---|---:|---:|---:|---:|"]
        for r in rows:
            if r["step"] == step:
                speeds = [f"{1 / r[key]:.2f}" if r[key] else "–" for key in ("time_over_all_patches", "time_over_plain")]
                shape = (
                    f"{r['image_size']}² | {r['batch_size']} | {r['patch_divider']} | {r['passes']} ({r['patch_batch_size']})"
                )
                per_image = f"{1e3 * r['median_seconds'] / r['batch_size']:.1f}"
                over_d1 = f"{r['time_over_d1']:.2f}" if r["time_over_d1"] else "–"
                lines.append(f"| {shape} | {r['recompute']} | {per_image} | {' | '.join(speeds)} | {over_d1} |")
    return "\n".join([*lines, "", *growth(rows)]) + "\n"


def growth(rows: Sequence[Row]) -> list[str]:
    """How time grows with the image's pixels and what recomputing costs, in words."""
    text = ["## How the time grows", ""]
    sizes = sorted({r["image_size"] for r in rows})
    largest = max(r["batch_size"] for r in rows)
    for step, title in STEPS.items():
        for passes in dict.fromkeys(r["passes"] for r in rows):
            of = {
                (r["image_size"], r["patch_divider"]): r["median_seconds"]
                for r in rows
                if r["step"] == step and r["passes"] == passes and r["recompute"] == "none" and r["batch_size"] == largest
            }
            for small, large in pairwise(sizes):
                factors = [f"d = {d}: {of[large, d] / of[small, d]:.1f}" for s, d in of if s == small and (large, d) in of]
                if factors:
                    pixels = (large / small) ** 2
                    text.append(
                        f"- {title}, {passes}: {small}² → {large}², {pixels:g} × the pixels: time × {', '.join(factors)}"
                    )
    for how in RECOMPUTE:
        costs = [r["time_over_no_recompute"] for r in rows if r["recompute"] == how]
        if costs:
            text.append(
                f"- recompute = {how}: {statistics.median(costs):.2f} of the time without "
                f"(from {min(costs):.2f} to {max(costs):.2f})"
            )
    return text


def main(words: Sequence[str] | None = None) -> None:
    parser = results_folder.parser(__doc__, "results/speed")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--image-size", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4])
    parser.add_argument("--dividers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--chunks", nargs="+", default=["all", "index"], help="patches a pass: all, index or numbers")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--seconds", type=float, default=150, help="all rounds together, building not counted")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(words)
    machine = environment.probe(asked.device)
    device = machine["device"]
    shapes = product(asked.image_size, asked.batch_size)
    every = [v for size, batch in shapes for v in variants(asked.dim, size, batch, asked.dividers, asked.chunks)]
    chosen = [variant for variant in every if variant["step"] in asked.steps]
    if not chosen:
        parser.error("no image size divides by any of the dividers")
    rows: list[Row] = []
    for step in asked.steps:
        own = [variant for variant in chosen if variant["step"] == step]
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows += process.submit(measure, own, device, asked.seconds / len(asked.steps)).result()
    results_folder.write_csv(asked.out / "speed.csv", rows)
    write_text(asked.out / "speed.md", markdown(rows, results_folder.machine_name(machine)))
    write_json(asked.out / "environment.json", machine)
    print(f"{asked.out}: {len(rows)} variants, {min(r['rounds'] for r in rows)} rounds")


if __name__ == "__main__":
    main()
