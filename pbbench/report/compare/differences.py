"""In what two runs differ beside their figures: the machine, which forbids comparing times, the settings and the software."""

from __future__ import annotations

from typing import Any

from pbbench.records.run import Run

MACHINE = ("device", "gpu", "cpu", "machine", "cpu_cores", "cpu_threads", "memory_bytes")
"""What of the environment decides how fast a step can be."""
SOFTWARE = ("driver", "cuda", "cudnn", "torch", "python", "allocator_settings", "tf32", "pbbench", "commit")


def _machines(run: Run) -> set[tuple[str, ...]]:
    """The machines a run's cells were measured on; a run may have been continued on another."""
    environments = [run.environment, *(run.environment.get("continued_in") or [])]
    return {tuple(str(environment.get(name)) for name in MACHINE) for environment in environments if environment}


def why_not_timed(a: Run, b: Run) -> str:
    """Why no time of A is held against one of B; empty where both were measured on one kind of machine."""
    machines = _machines(a), _machines(b)
    if not all(machines):
        return "a run does not say on which machine it was measured"
    together = sorted(machines[0] | machines[1])
    if len(together) == 1:
        return ""
    differing = [
        f"{name} {' and '.join(sorted(values))}"
        for name, values in zip(MACHINE, map(set, zip(*together, strict=True)), strict=True)
        if len(values) > 1
    ]
    return f"the machines differ ({'; '.join(differing)})"


def _flat(experiment: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in experiment.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def differences(a: Run, b: Run) -> list[str]:
    """The settings and the software in which the runs differ: what a change may come from."""
    notes = []
    settings = _flat(a.experiment), _flat(b.experiment)
    axes = {name for name in settings[0].keys() | settings[1].keys() if name.startswith("sweep.")} | {"name"}
    software = tuple({name: run.environment.get(name) for name in SOFTWARE} for run in (a, b))
    for versions in software:
        versions["commit"] = versions["commit"] and versions["commit"][:12]
    for heading, (one, two) in (("Differing settings", settings), ("Differing software", software)):
        if not one or not two:
            continue
        names = sorted(name for name in (one.keys() | two.keys()) - axes if one.get(name) != two.get(name))
        if names:
            told = "; ".join(f"{name} {_shown(one.get(name))} → {_shown(two.get(name))}" for name in names)
            notes.append(f"{heading}: {told}.")
    return notes


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
