"""What measuring costs: an empty phase, a step in a phase, and a step under the tracer, all in turns; medians.

    python benchmarks/meter_overhead.py [--out results/meter]

On a machine without a GPU the GPU's meters run on the stand-ins of the tests, which answer at once: that figure is what pbbench
adds itself, without the driver's and torch's own time. Writes overhead.json and overhead.md after some ten seconds.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import results_folder
from pbbench import memory
from pbbench.records import environment
from turns import in_turns

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
FEWEST_ROUNDS = 5
ALONE, IN_A_PHASE = "a training step", "the same step in a phase"
TRACED, WITH_EVENTS = "the same step, traced", "the same step, traced with its events kept"


class Operators(TorchDispatchMode):
    """Counts the operators that torch dispatches."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


def training_step(device: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """A small convolutional step, and what the tracer is told of it."""
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) if i % 2 == 0 else nn.SiLU() for i in range(40))).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(4, 16, 32, 32, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step, {"modules": model, "optimizer": optimizer, "inputs": x}


def gpu_or_stand_in() -> tuple[str, dict[str, Any]]:
    """The GPU's meters: (their name, arguments of ``memory.track``)."""
    if torch.cuda.is_available():
        return "an empty phase, CUDA and NVML", {"device": "cuda"}
    sys.path.insert(0, str(SUPPORT))
    from fake_devices import CUDA, FakeCuda, FakeNvml

    stand_ins = {"cuda": FakeCuda(), "nvml": FakeNvml([(os.getpid(), 2**30)])}
    return "an empty phase, CUDA and NVML (stand-ins)", {"device": CUDA, **stand_ins}


def measure(budget: float) -> dict[str, Any]:
    """The times, and what follows from them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step, known = training_step(device)
    with ExitStack() as meters:

        def phase(tracked: Any, work: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: tracked.attempt("phase", work)

        on_cpu = meters.enter_context(memory.track("cpu"))
        name, given = gpu_or_stand_in()
        on_gpu = meters.enter_context(memory.track(**given))
        works: dict[str, Callable[[], Any]] = {
            "an empty phase, CPU": phase(on_cpu, lambda: None),
            name: phase(on_gpu, lambda: None),
            ALONE: step,
            IN_A_PHASE: phase(on_gpu if device == "cuda" else on_cpu, step),
            TRACED: lambda: memory.trace(step, **known),
            WITH_EVENTS: lambda: memory.trace(step, record_events=True, **known),
        }
        times = in_turns(works, budget, FEWEST_ROUNDS)
    with Operators() as operators:
        step()
    medians = {name: statistics.median(own) for name, own in times.items()}
    return {
        "rounds": len(times[ALONE]),
        "median_seconds": medians,
        "fastest_seconds": {name: min(own) for name, own in times.items()},
        "operators": operators.total,
        "tracer_seconds_per_operator": (medians[TRACED] - medians[ALONE]) / operators.total,
    }


def markdown(found: dict[str, Any], machine: str) -> str:
    lines = [
        "# What measuring costs",
        "",
        f"On {machine}, torch {torch.__version__}; medians of {found['rounds']} rounds in which all take turns.",
        "",
        "| | median | fastest |",
        "|---|---:|---:|",
    ]
    for name, median in found["median_seconds"].items():
        lines.append(f"| {name} | {_time(median)} | {_time(found['fastest_seconds'][name])} |")
    lines += [
        "",
        f"The step dispatches {found['operators']:,} operators; the tracer adds {_time(found['tracer_seconds_per_operator'])} "
        "to each, which weighs most on small ones. A step that is timed or whose allocator is read is never traced: the tracer "
        "runs on a step of its own.",
    ]
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


def main(words: Sequence[str] | None = None) -> None:
    parser = results_folder.parser(__doc__, "results/meter")
    parser.add_argument("--seconds", type=float, default=6, help="all rounds together")
    asked = parser.parse_args(words)
    machine = environment.probe("auto")
    found = measure(asked.seconds)
    name = results_folder.machine_name(machine)
    report = {"machine": name, "torch": str(torch.__version__), **found}
    results_folder.publish(asked.out, "overhead", report, markdown(found, name), machine)
    print(f"{asked.out}: {found['rounds']} rounds")


if __name__ == "__main__":
    main()
