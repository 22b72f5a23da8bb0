"""What a machine has whatever its GPU: packages, Inception's weights, free memory and disk, how busy it is. For ``doctor``."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal

from pbbench.errors import InputError, one_line
from pbbench.experiment.sizes import format_bytes

PACKAGES = {
    "accelerate": "accelerate",
    "torchvision": "torchvision",
    "torch_fidelity": "torch-fidelity",
    "pynvml": "nvidia-ml-py",
    "diffusers": "diffusers",
    "safetensors": "safetensors",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
}
"""Import name → package, of what a sweep needs beside torch."""
EXTRAS = {
    "tensorboard": "training logs for TensorBoard",
    "wandb": "training logs for Weights & Biases",
    "submitit": "sweeps through Slurm",
    "lmdb": "LSUN's databases as training images",
}
DISK_NEEDED, DISK_WANTED = 100 * 2**20, 5 * 2**30
"""A memory-only sweep writes a few MiB; checkpoints of the paper's network are 2 GiB each."""
MEMORY_NEEDED, MEMORY_WANTED = 2**30, 4 * 2**30
"""A process with torch holds 0.7 GiB before it has a network."""
LOAD_ALLOWED = 0.5
"""Runnable processes a core, before anything is measured, from which on times are called rough."""


@dataclass(frozen=True)
class Check:
    name: str
    state: Literal["ok", "limited", "missing"]
    meaning: str
    remedy: str = ""
    needed: bool = False
    """Where it is missing, a sweep cannot run."""


def inception_check() -> Check:
    """Inception's weights, without downloading them."""
    name = "Inception weights"
    try:
        from pbbench.quality.weights import MissingWeightsError, resolve_inception_weights
    except ImportError as error:
        return Check(name, "missing", f"cannot be looked for: {one_line(error)}", "install pbbench's dependencies")
    try:
        weights = resolve_inception_weights(allow_download=False)
    except MissingWeightsError as error:
        told = "not here: a sweep downloads them, or scores with a stand-in that is never called FID"
        return Check(name, "missing", told, one_line(error).rpartition("; ")[2])
    except InputError as error:
        told, _, remedy = one_line(error).rpartition("; ")
        return Check(name, "missing", f"trained dividers cannot be scored: {told}", remedy)
    if not weights.published:
        told = f"{weights.path} ({weights.origin}) is not the published file: the distances will not be called FID"
        return Check(name, "limited", told, "unset PBBENCH_INCEPTION_WEIGHTS or give the published file")
    return Check(name, "ok", f"the published ones, from {weights.origin}")


def package_checks(present: Callable[[str], Any] = find_spec) -> list[Check]:
    absent = [package for name, package in PACKAGES.items() if present(name) is None]
    told = f"not installed: {', '.join(absent)}" if absent else "all there"
    remedy = f"pip install {' '.join(absent)}" if absent else ""
    checks = [Check("packages", "missing" if absent else "ok", told, remedy, needed=True)]
    for name, what in EXTRAS.items():
        if present(name) is None:
            checks.append(Check(name, "missing", f"optional: {what}", f"pip install {name}"))
        else:
            checks.append(Check(name, "ok", what))
    return checks


def memory_check(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Check:
    """Free host memory: the machine's, or what a container still allows where that is less."""
    name = "host memory"
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match is None:
        return Check(name, "limited", f"how much is free is not offered on {sys.platform}")
    free, where = int(match[1]) * 1024, ""
    try:
        limit, used = (int((cgroup / f"memory.{kind}").read_text()) for kind in ("max", "current"))
        cache = re.search(r"^inactive_file (\d+)$", (cgroup / "memory.stat").read_text(), re.MULTILINE)
        allowed = limit - used + (int(cache[1]) if cache else 0)  # the cache of files gives way
    except (OSError, ValueError):  # no control group of version 2, or "max": no limit
        allowed = free
    if allowed < free:
        free, where = max(0, allowed), " (the container's limit)"
    told = f"{format_bytes(free)} free{where}"
    if free < MEMORY_NEEDED:
        return Check(
            name, "missing", f"{told}: a process with torch needs {format_bytes(MEMORY_NEEDED)}", "free some", needed=True
        )
    if free < MEMORY_WANTED:
        return Check(name, "limited", f"{told}: enough for small networks", "free some, or choose a smaller dim", needed=True)
    return Check(name, "ok", told, needed=True)


def disk_check(results: Path) -> Check:
    """Room for results, and leave to write them; nothing is left behind."""
    name = "disk"
    folder = results.resolve()
    while not folder.is_dir():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        told = f"{folder} cannot be written ({error.strerror})"
        return Check(name, "missing", told, "choose another folder with sweep --out", needed=True)
    free = disk_usage(folder).free
    told = f"{format_bytes(free)} free in {folder}"
    if free < DISK_NEEDED:
        return Check(
            name, "missing", f"{told}: a sweep needs {format_bytes(DISK_NEEDED)}", "free some, or sweep --out", needed=True
        )
    if free < DISK_WANTED:
        told = f"{told}: enough to measure, but checkpoints of a large network take gigabytes"
        return Check(name, "limited", told, "free some, or choose another folder with sweep --out", needed=True)
    return Check(name, "ok", told, needed=True)


def load_check(load: Callable[[], tuple[float, float, float]] = os.getloadavg) -> Check:
    """A busy machine makes times rough; memory does not mind."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = load()[0]
    told = f"{cores} cores, {busy:.1f} processes running over the last minute"
    if busy > LOAD_ALLOWED * cores:
        return Check(
            "CPU load", "limited", f"{told}: times will be rough", "wait until the machine is quiet; memory is exact anyway"
        )
    return Check("CPU load", "ok", told)
