"""Training and sampling steps of the paper's network on a GPU: time, peak and launched operators, against the released code.

    python benchmarks/gpu.py [--out results/gpu] [--batches 8 32]     # on a GPU, alone on the card
    python benchmarks/gpu.py --counts [--json]                        # operators alone, on fake tensors: no GPU needed

128 × 128, dim 128, widths × 1, 2, 4, 8. A time means something only beside another of the same run: the table gives ratios to
the released code, whose own figures (``released_on_h200.json``) are of one H200; on another card ratios within the table are
what counts.

An operator counts where it launches a kernel: what only looks at memory another way (views), reserves it or reads a number does
not; a fused operator is one. Path "aten" is what runs on a CPU, "cuda" what a GPU runs: fused operators, channels_last,
weights cast together. The count of one patch index at a time is that of all its passes.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from paper_network import STEPS, Row, planned
from results_folder import parser, publish

IMAGE_SIZE, PRECISIONS = 128, ("no", "bf16")
RELEASED = Path(__file__).with_name("released_on_h200.json")
WAYS = [(1, "all"), *((d, passes) for d in (2, 4, 8) for passes in ("all", "index"))]
LAUNCH_NOTHING = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip


def counted(step: str, divider: int, precision: str, passes: str, path: str, batch: int = 8, every: bool = False) -> int:
    """Operators that launch a kernel in one warm step, on fake tensors. Of many chunks of patches two and three are counted,
    and what the third adds for each other one; ``every``: all of them."""
    chunks = 1 if passes == "all" else divider**2
    count = partial(_counted, step, divider, precision, passes, path, batch)
    if every or chunks <= 3:
        return count(chunks)
    two, three = count(2), count(3)
    return two + (chunks - 2) * (three - two)


def _counted(step: str, divider: int, precision: str, passes: str, path: str, batch: int, chunks: int) -> int:
    """Of the step with so many chunks only; training begins with the last one."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    import pbbench.model.unet as sampling_loop
    import pbbench.training.train as training_loop
    from pbbench.memory.prediction.fake import make_state
    from pbbench.model import kernels
    from pbbench.model.patching import row_chunks
    from pbbench.sweep import workload

    class Launches(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            space, name = func._schema.name.split("::")
            self.number += space not in ("prim", "prims") and name not in LAUNCH_NOTHING
            return func(*args, **(kwargs or {}))

    experiment, cell = planned(IMAGE_SIZE, batch, divider, passes)
    cell = dataclasses.replace(cell, mixed_precision=precision)
    build = {"sample": workload.sampling_workload, "train": workload.training_workload}[step]
    with FakeTensorMode(), kernels.everywhere() if path == "cuda" else nullcontext():
        work = build(experiment, cell, torch.device("cpu"))
        if work.optimizer is not None:
            make_state(work.optimizer)
        sampling_loop.row_chunks = lambda *given: row_chunks(*given)[:chunks]
        training_loop.row_chunks = lambda *given: row_chunks(*given)[-chunks:]
        try:
            with Launches() as launches:
                work.run()
        finally:
            sampling_loop.row_chunks = training_loop.row_chunks = row_chunks
    return launches.number


def counts() -> list[Row]:
    return [
        {
            "step": step,
            "divider": divider,
            "precision": precision,
            "passes": passes,
            "path": path,
            "operators": counted(step, divider, precision, passes, path),
        }
        for step in STEPS
        for divider, passes in WAYS
        for precision in PRECISIONS
        for path in ("aten", "cuda")
    ]


def measured(step: str, divider: int, precision: str, passes: str, batch: int, repeats: int = 10) -> Row:
    """Milliseconds of a warm step (median, and the least), and the allocator's peaks over it."""
    import torch

    from pbbench.sweep import workload

    device = torch.device("cuda")
    experiment, cell = planned(IMAGE_SIZE, batch, divider, passes)
    cell = dataclasses.replace(cell, mixed_precision=precision)
    work = {"sample": workload.sampling_workload, "train": workload.training_workload}[step](experiment, cell, device)
    for _ in range(3):
        work.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work.run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    found = {
        "step": step, "divider": divider, "batch": batch, "precision": precision, "passes": passes,
        "milliseconds": statistics.median(times), "least_milliseconds": min(times),
        "allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved(),
    }  # fmt: skip
    del work
    torch.cuda.empty_cache()
    return found


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Each row with its time over that of the released code in one pass, None where that was not measured."""
    facts = json.loads(RELEASED.read_text(encoding="utf-8"))["rows"]
    keys = ("step", "divider", "batch", "precision")
    known = {tuple(fact[key] for key in keys): fact["milliseconds"] for fact in facts}

    def ratio(row: Row) -> float | None:
        released = known.get(tuple(row[key] for key in keys))
        return None if released is None else row["milliseconds"] / released

    return [row | {"of_released": ratio(row)} for row in rows]


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Steps on a GPU",
        "",
        f"{found['gpu']}, torch {found['torch']}; 128 × 128, dim 128, widths × 1, 2, 4, 8. *Of released*: the time over "
        f"that of the "
        "released code in one pass on an H200 (`benchmarks/released_on_h200.json`).",
        "",
        "| step | d | batch | precision | passes | ms (least) | of released | allocated (MiB) | reserved (MiB) | operators |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    operators = {tuple(r[k] for k in ("step", "divider", "precision", "passes")): r["operators"] for r in found["counts"]
                 if r["path"] == "cuda"}  # fmt: skip
    for row in found["rows"]:
        ratio = "–" if row["of_released"] is None else f"{row['of_released']:.2f}"
        number = operators.get(tuple(row[k] for k in ("step", "divider", "precision", "passes")))
        peaks = (f"{row[f'{name}_bytes'] / 2**20:,.0f}" for name in ("allocated", "reserved"))
        precision = "float32" if row["precision"] == "no" else row["precision"]
        lines.append(
            f"| {row['step']} | {row['divider']} | {row['batch']} | {precision} | {row['passes']} | {row['milliseconds']:.1f} "
            f"({row['least_milliseconds']:.1f}) | {ratio} | {' | '.join(peaks)} | {number:,} |"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    options = parser(__doc__, "results/gpu")
    options.add_argument("--counts", action="store_true", help="count operators on fake tensors, and nothing else")
    options.add_argument("--json", action="store_true", help="with --counts: JSON and nothing else on stdout")
    options.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    asked = options.parse_args(words)
    if asked.counts:
        rows = counts()
        if asked.json:
            print(json.dumps(rows, indent=1))
        else:
            for row in rows:
                print("  ".join(f"{row[key]!s:>8}" for key in row))
        return 0
    import torch

    from pbbench.records.environment import probe

    if not torch.cuda.is_available():
        print("error: torch finds no CUDA GPU here; --counts counts the operators without one", file=sys.stderr)
        return 2
    rows = [measured(step, d, precision, passes, batch) for batch in asked.batches for step in STEPS
            for d, passes in WAYS for precision in PRECISIONS]  # fmt: skip
    machine = probe("cuda")
    found = {"gpu": machine["gpu"], "torch": machine["torch"], "rows": with_ratios(rows), "counts": counts()}
    publish(asked.out, "gpu", found, markdown(found), machine)
    print(markdown(found), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
