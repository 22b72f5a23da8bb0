"""What the paper's network needs to sample and to train, per image size, batch, divider and patches a pass: one command.

    python benchmarks/memory_table.py [--out results/memory]

pbbench's steps are traced on fake tensors (``sweep.planning.forecast``), so no GPU is needed and nothing is computed; beside
them stand the figures of the released code (``reference_memory.json``, see README.md), counted in the same way. Neither
holds an average of the weights: the trace has one in training, and its bytes are taken off here.

Writes memory.csv (bytes), memory.md (MiB, with the rule that follows), memory.png and .svg, rivals.csv and rivals.md,
environment.json and README.md.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import memory_rule
import results_folder
import rivals
from memory_rule import index_rows, mib
from paper_network import STEPS, Row, planned
from pbbench.records import environment
from pbbench.records.files import write_json, write_text
from results_folder import write_csv

SIZES, BATCHES, DIVIDERS = (128, 256, 512, 1024), (1, 8, 32), (1, 2, 4, 8)
PARTS = ("weights", "gradients", "optimizer", "activations")
REFERENCE = Path(__file__).with_name("reference_memory.json")


def cells(sizes: Sequence[int] = SIZES, batches: Sequence[int] = BATCHES, dividers: Sequence[int] = DIVIDERS) -> list[tuple]:
    """(image size, batch, divider, passes). At d = 1 "index" is "all"; above 256² only "index" is traced."""
    return [
        (size, batch, d, passes)
        for size in sizes
        for batch in batches
        for d in dividers
        for passes in ("all", "index")
        if not (passes == "index" and d == 1) and not (passes == "all" and d > 1 and size > 256)
    ]


def rows_of(key: tuple[int, int, int, str]) -> list[Row]:
    """A cell's two rows, sample and train, in bytes. Parts sum to the peak; activations include the inputs."""
    from pbbench.sweep.planning.forecast import forecast

    size, batch, d, passes = key
    experiment, cell = planned(size, batch, d, passes)
    found = forecast(experiment, cell)
    released = {(r["image_size"], r["batch_size"], r["patch_divider"]): r for r in json.loads(REFERENCE.read_text())}
    rows = []
    for step, live in (("sample", found.sample_step.live), ("train", found.train_step.live)):
        part = live.by_category
        reference = released.get((size, batch, d), {})
        rows.append(
            {
                "step": step, "image_size": size, "batch_size": batch, "patch_divider": d, "passes": passes,
                "patch_batch_size": cell.patch_batch_size, "peak_bytes": live.peak_bytes - part["ema"],
                "weights_bytes": part["parameter"], "gradients_bytes": part["gradient"], "optimizer_bytes": part["optimizer"],
                "activations_bytes": part["input"] + part["activation"] + part["other"], "inputs_bytes": part["input"],
                "reference_stacked_bytes": reference.get(f"{step}_peak_bytes_stacked"),
                "reference_one_patch_bytes": reference.get(f"{step}_peak_bytes_one_patch"),
            }
        )  # fmt: skip
    return rows


def one_thread() -> None:
    """A worker's start: the traces are Python's work alone, one process per core."""
    import torch

    torch.set_num_threads(1)


def markdown(rows: Sequence[Row]) -> str:
    """The table for people, one section per step and image size."""
    lines = [
        "# Memory of the paper's network",
        "",
        "dim 128, widths × 1, 2, 4, 8, float32; peak of live tensor bytes of one warm step, in MiB (2²⁰ bytes), "
        "without an average of the weights. *Reference*: the released code, all patches in one pass. *All*, *index*: pbbench "
        "with all patches in one pass, and with one patch index of every image at a time. The split is that of *index* and "
        "sums to it; activations include the inputs. *Ratio*: index against the reference.",
        "",
        *memory_rule.lines(rows),
    ]
    for step, title in STEPS.items():
        for size in sorted({r["image_size"] for r in rows}):
            chosen = [r for r in rows if r["step"] == step and r["image_size"] == size]
            stacked = {(r["batch_size"], r["patch_divider"]): r["peak_bytes"] for r in chosen if r["passes"] == "all"}
            lines += ["", f"## {title}, {size} × {size}", ""]
            lines += ["| batch | d | reference | all | index | weights | gradients | optimizer | activations | ratio |"]
            lines += ["|" + "---:|" * 10]
            for (_, batch, d), r in sorted(index_rows(chosen, step).items()):
                reference, peak = r["reference_stacked_bytes"], r["peak_bytes"]
                split = " | ".join(mib(r[f"{part}_bytes"]) for part in PARTS)
                ratio = f"{peak / reference:.2f}" if reference else "–"
                peaks = f"{mib(reference)} | {mib(stacked.get((batch, d)))} | **{mib(peak)}**"
                lines += [f"| {batch} | {d} | {peaks} | {split} | {ratio} |"]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    out: Path = results_folder.parser(__doc__, "results/memory").parse_args(words).out
    started, cores = time.monotonic(), os.cpu_count() or 1
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), one_thread) as pool:
        # The searches go first: each is a chain of traces. Then the cells.
        beside = rivals.submit(pool)
        found = list(pool.map(rows_of, cells()))
        rows = [row for pair in found for row in pair]
        compared = [future.result() for future in beside]
    rows.sort(key=lambda r: (r["step"], r["image_size"], r["batch_size"], r["patch_divider"], r["passes"]))
    write_csv(out / "memory.csv", rows)
    write_text(out / "memory.md", markdown(rows))
    write_csv(out / "rivals.csv", compared)
    write_text(out / "rivals.md", rivals.markdown(compared))
    memory_rule.save_figure(rows, out)
    machine = environment.probe("cpu")
    write_json(out / "environment.json", machine)
    seconds, used = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = used.ru_utime + used.ru_stime
    write_text(
        out / "README.md",
        "# Memory of the paper's network, reference against pbbench\n\n"
        "```sh\npython benchmarks/memory_table.py --out results/memory\n```\n\n"
        f"Took {seconds:.0f} s, {busy:.0f} s of processor time, on {cores} cores ({machine['cpu']}), "
        f"torch {machine['torch']}; no GPU, no network.\n\n"
        "- [memory.md](memory.md): the table and the rule that follows; [memory.csv](memory.csv): the same in bytes\n"
        "- [rivals.md](rivals.md), [rivals.csv](rivals.csv): what else fits in the same memory\n"
        "- [memory.png](memory.png), [memory.svg](memory.svg): the training peaks at 128 × 128\n"
        "- [environment.json](environment.json): machine, versions, commit\n",
    )
    print(f"{out}: {len(rows)} rows and {len(compared)} rivals in {seconds:.0f} s ({busy:.0f} s of processor time)")


if __name__ == "__main__":
    main()
