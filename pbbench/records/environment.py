"""What a run was measured on: machine, driver, versions, allocator settings, commit.

``probe`` asks a fresh process, so that the process that plans a sweep neither imports torch nor touches CUDA. Unknown values
are null, with the reason under ``reasons``. ``fingerprint`` is the part that must not change within one run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pbbench import __version__
from pbbench.errors import InputError

FINGERPRINT = (
    *("device", "gpu", "driver", "cuda", "cudnn", "torch", "python", "machine", "cpu", "cpu_threads"),
    *("allocator_settings", "tf32", "pbbench", "code"),
)


def probe(device: str) -> dict[str, Any]:
    """The environment as a fresh process sees it. Raises InputError where ``device`` (auto, cpu, cuda) is not there."""
    command = [sys.executable, "-m", "pbbench.records.environment", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise InputError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise InputError(f"cannot look at this machine: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(done.stdout)


def fingerprint(environment: dict[str, Any]) -> dict[str, Any]:
    """The part of an environment that one run may not mix."""
    return {key: environment.get(key) for key in FINGERPRINT}


def resolve_device(setting: str) -> str:
    """ "auto" becomes cuda where a GPU answers, else cpu. Raises InputError for a device that is not there."""
    import torch

    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if setting == "cpu":
        return setting
    if setting != "cuda":
        raise InputError(f"device {setting!r} is not known; choose auto, cpu or cuda")
    if torch.cuda.is_available():
        return setting
    why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no usable NVIDIA GPU or driver"
    raise InputError(f"device 'cuda' is not there: {why}; use --device cpu, or --device auto")


def collect(device: str) -> dict[str, Any]:
    """Everything, for a device that is there ("cpu" or "cuda"). Imports torch and touches the device."""
    import torch

    reasons: dict[str, str] = {}
    on_gpu = device == "cuda"
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    commit = commit_of(Path(__file__).resolve().parents[2])
    found: dict[str, Any] = {
        "device": device,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpus": _gpus() if on_gpu else [],
        "gpu_count": torch.cuda.device_count() if on_gpu else 0,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "driver": _driver(reasons),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "allocator_settings": settings or "default",
        "allocator_backend": torch.cuda.get_allocator_backend() if on_gpu else None,
        "module_loading": os.environ.get("CUDA_MODULE_LOADING", "default"),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "attention_backends": {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        },
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "compile": "off",
        "versions": _versions(),
        "pbbench": __version__,
        "code": _code(),
        **commit,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if commit["commit"] is None:
        reasons["commit"] = reasons["dirty"] = "the package does not run from a git clone of its own"
    if not on_gpu:
        for key in ("gpu", "gpu_memory_bytes", "cudnn", "allocator_backend"):
            reasons[key] = "the run is on the CPU"
    return {**found, "reasons": reasons}


def _gpus() -> list[dict[str, str]]:
    """Every GPU this process may use: its name, and an identity that does not depend on what is visible."""
    import torch

    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": gpu.name, "uuid": str(getattr(gpu, "uuid", index))} for index, gpu in enumerate(found)]


def _driver(reasons: dict[str, str]) -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        reasons["driver"] = f"NVML: {error}"
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or None
    )


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: of(name) for name in ("accelerate", "diffusers", "torch-fidelity", "torchvision", "nvidia-ml-py", "numpy")}


def _code() -> str:
    """A hash of the package's own source, which a commit of documentation leaves alone and an edit does not."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def commit_of(root: Path) -> dict[str, Any]:
    """The commit of pbbench's own clone at ``root``, and whether its code was changed since. Both null where ``root`` is none:
    installed, or copied into somebody's repository, whose commit says nothing of this code."""

    def git(*words: str) -> str:
        own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's name its repository
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, env=own).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "pbbench/__init__.py")
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            code = ("pbbench", "experiments", "pyproject.toml")
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", *code))}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"commit": None, "dirty": None}


def main() -> None:
    """``python -m pbbench.records.environment DEVICE``: print the environment as JSON."""
    try:
        found = collect(resolve_device(sys.argv[1] if len(sys.argv) > 1 else "auto"))
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(found))


if __name__ == "__main__":
    main()
