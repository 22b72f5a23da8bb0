"""Record what torch's CUDA allocator does in real steps, replay it, and compare to the byte; called by evidence.py.

    python experiments/gpu/traces.py --out DIR [--experiment FILE] [--seconds 90]

For each divider of the experiment, at its smallest and its largest batch, with one patch index at a time and with all: a
sampling and a training step, warmed up, recorded and replayed. Writes traces.json (what was compared, where the two part) and
the recordings of the first divider as JSON, small enough to keep and to replay anywhere. A CPU has no such allocator: there,
the steps are traced on fake tensors and replayed instead, and nothing is compared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from pbbench.errors import one_line
from pbbench.experiment.experiment import Experiment
from pbbench.experiment.presets import load_experiment
from pbbench.memory.allocator import snapshot
from pbbench.memory.meters.outcome import describe_out_of_memory
from pbbench.records.files import write_json
from pbbench.sweep.grid import Cell, plan, resolve
from pbbench.sweep.planning.forecast import STEPS, forecast_step
from pbbench.sweep.workload import sampling_workload, training_workload

BUILD = {"sample_step": sampling_workload, "train_step": training_workload}


def chosen(experiment: Experiment) -> list[Cell]:
    """The cells worth recording: of every divider and passes the smallest and the largest batch, small ones first."""
    cells = [cell for cell in plan(experiment) if cell.kind == "measure"]
    ends = {min(cell.batch_size for cell in cells), max(cell.batch_size for cell in cells)}
    return sorted((cell for cell in cells if cell.batch_size in ends), key=lambda cell: cell.batch_size)


def recorded(experiment: Experiment, cell: Cell, step: str, keep: Path | None) -> dict[str, Any]:
    """One step on the GPU, recorded and replayed; equal, the figures, and the first places where they part."""
    work = BUILD[step](resolve(experiment, cell), cell, torch.device("cuda"))
    for _ in range(experiment.sweep.warmup_steps):
        work.run()
    recording = snapshot.record(work.run)
    if keep is not None:
        snapshot.save(recording, keep)
    compared = snapshot.compare(recording)
    figures = {name: {"recorded": one, "replayed": two} for name, (one, two) in compared.figures.items()}
    return {"equal": compared.equal, "events": len(recording.events), "figures": figures, "differences": compared.differences}


def traced(experiment: Experiment, cell: Cell, step: str) -> dict[str, Any]:
    """The same step without a GPU: predicted, and not compared with anything."""
    found = forecast_step(experiment, cell, step)
    return {"equal": None, "events": len(found.live.events or ()), "figures": found.columns(), "differences": []}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experiment", type=Path, default=Path(__file__).resolve().parents[1] / "memory-grid.toml")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=90, help="start no further step after so many")
    asked = parser.parse_args(words)
    experiment = load_experiment(asked.experiment)
    started, found, left_out = time.monotonic(), [], 0
    (asked.out / "traces").mkdir(parents=True, exist_ok=True)
    cells = chosen(experiment)
    for cell in cells:
        for step in STEPS:
            if time.monotonic() - started > asked.seconds:
                left_out += 1
                continue
            keep = asked.out / "traces" / f"{cell.id}-{step}.json" if cell.patch_divider == cells[0].patch_divider else None
            try:
                one = traced(experiment, cell, step) if asked.device == "cpu" else recorded(experiment, cell, step, keep)
            except Exception as error:
                memory = describe_out_of_memory(error) is not None
                one = {"equal": None if memory else False, "differences": [one_line(error)[:300]]}
            found.append({"cell": cell.id, "step": step, **one})
            if asked.device == "cuda":
                torch.cuda.empty_cache()
    write_json(asked.out / "traces.json", {"steps": found, "left_out_for_time": left_out})
    unequal = [f"{one['cell']} {one['step']}" for one in found if one["equal"] is False]
    compared = sum(one["equal"] is not None for one in found)
    print(
        f"{compared - len(unequal)} of {compared} recorded steps equal to the byte; {len(found) - compared} not compared, "
        f"{left_out} left out for time" + (f"; unequal: {', '.join(unequal[:4])}" if unequal else "")
    )
    return 1 if unequal or (asked.device == "cuda" and not compared) else 0


if __name__ == "__main__":
    raise SystemExit(main())
