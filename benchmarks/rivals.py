"""What else fits where patching fits: the honest rivals of one patch index at a time, at no more than its training peak.

The case: 128 × 128 images, batch 32, d = 4, one patch index of every image at a time. Against it, all with the undivided image
(d = 1) and the same 32 images per optimizer step: a smaller micro-batch with gradient accumulation; recomputation in backward;
both; a narrower network. FLOPs are those of a training step by torch's formulas, per image; parameters stand for capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

from paper_network import DIM, RECOMPUTE, Row, planned

SIZE, BATCH, DIVIDER = 128, 32, 4


def step(d: int, batch: int, *, passes: str = "all", dim: int = DIM, recompute: str = "none", accumulate: bool = False) -> Row:
    """The training step's peak in bytes, without an average of the weights."""
    import torch

    from pbbench.memory.prediction.fake import predict
    from pbbench.sweep.planning.forecast import repeated_chunks_skipped
    from pbbench.sweep.workload import training_workload

    # From the second micro-batch on gradients lie beside the activations; more than two change nothing.
    micro_batches = 2 if accumulate else 1
    settings, cell = planned(SIZE, batch, d, passes, dim=dim, recompute=recompute, micro_batches=micro_batches)
    with repeated_chunks_skipped(batch):
        live = predict(lambda: training_workload(settings, cell, torch.device("cpu")))
    peak = live.peak_bytes - live.by_category["ema"]
    return {
        "patch_divider": d, "micro_batch": batch, "passes": passes, "dim": dim, "recompute": recompute, "peak_bytes": peak,
    }  # fmt: skip


def with_costs(name: str, row: Row) -> Row:
    """The row under a name, with its FLOPs per image, which no batch or chunk changes, and its parameters."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pbbench.sweep.workload import FlopCount, training_workload

    settings, cell = planned(SIZE, 1, row["patch_divider"], "all", dim=row["dim"], recompute=row["recompute"])
    with FakeTensorMode():
        work = training_workload(settings, cell, torch.device("cpu"))
        with FlopCount() as flops:
            work.run()
        parameters = sum(p.numel() for p in work.modules.parameters())  # type: ignore[union-attr]
    again = "" if row["recompute"] == "none" else f", recompute = {row['recompute']}"
    return {"name": name + again} | row | {"flops_per_image": flops.total, "parameters": parameters}


def patched(recompute: str = "none") -> Row:
    return with_costs("d = 4, one patch index at a time", step(DIVIDER, BATCH, passes="index", recompute=recompute))


def whole(recompute: str = "none") -> Row:
    return with_costs("d = 1, the whole batch", step(1, BATCH, recompute=recompute))


def largest(fits: Callable[[int], Row], choices: Sequence[int], limit: int) -> Row:
    """The row of the largest choice whose peak is at most ``limit`` (peaks grow with the choice); else of the smallest."""
    best: Row | None = None
    low, high = 0, len(choices) - 1
    while low <= high:
        middle = (low + high) // 2
        row = fits(choices[middle])
        if row["peak_bytes"] <= limit:
            best, low = row, middle + 1
        else:
            high = middle - 1
    return best or fits(choices[0])


def accumulated(limit: int, recompute: str = "none") -> Row:
    """The largest micro-batch that fits, of those that 32 divides by."""
    row = largest(lambda n: step(1, n, recompute=recompute, accumulate=True), (1, 2, 4, 8, 16), limit)
    return with_costs(f"d = 1, micro-batches of {row['micro_batch']}, accumulated", row)


def narrower(limit: int) -> Row:
    """The widest network, in steps of 8, whose whole batch fits."""
    row = largest(lambda dim: step(1, BATCH, dim=dim), range(8, DIM, 8), limit)
    return with_costs(f"d = 1, dim {row['dim']}", row)


def submit(pool: Executor) -> list[Future[Row]]:
    """Every rival as a task of its own; waits for the first, whose peak is the others' limit."""
    base, undivided = pool.submit(patched), pool.submit(whole)
    limit = base.result()["peak_bytes"]
    found = [base, undivided, pool.submit(accumulated, limit), pool.submit(narrower, limit)]
    for how in RECOMPUTE:
        found += [pool.submit(patched, how), pool.submit(whole, how), pool.submit(accumulated, limit, how)]
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The comparison for people; the first row is the one the others are held against."""
    base = rows[0]
    limit, flops, parameters = base["peak_bytes"], base["flops_per_image"], base["parameters"]
    lines = [
        "# Rivals at equal memory",
        "",
        f"Training the paper's network on {SIZE} × {SIZE} images, {BATCH} images per optimizer step, float32, Adam, without an "
        f"average of the weights. The limit is the peak of the first line, {limit / 2**20:,.0f} MiB of live tensors. FLOPs: "
        "forward and backward per image, by torch's formulas, relative to the first line; real times also depend on how well "
        "a pass fills the device.",
        "",
        "| | peak, MiB | fits | FLOPs | parameters, M | what it gives up |",
        "|---|---:|---|---:|---:|---|",
    ]
    for row in rows:
        lost = []
        if row["flops_per_image"] > 1.005 * flops:
            lost.append(f"{row['flops_per_image'] / flops - 1:.0%} more arithmetic")
        if row["parameters"] < 0.99 * parameters:
            lost.append(f"capacity: {row['parameters'] / parameters:.0%} of the parameters")
        if row["patch_divider"] > 1:
            lost.append("each patch sees the rest of the image only as a small copy (quality to be measured)")
        cost = "; ".join(lost) or "nothing of the model or its gradients"
        fits = "yes" if row["peak_bytes"] <= limit else "no"
        figures = f"{row['flops_per_image'] / flops:.2f} | {row['parameters'] / 1e6:.1f}"
        lines.append(f"| {row['name']} | {row['peak_bytes'] / 2**20:,.0f} | {fits} | {figures} | {cost} |")
    return "\n".join(lines) + "\n"
