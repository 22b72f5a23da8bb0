"""What this machine can measure, what it cannot, and why: one line each, with what it means and what would help.

Torch and CUDA are looked at by fresh processes (``environment.probe``, ``memory.capabilities``); this one judges what they
found. The main job is ``pbbench sweep``: it can run where no needed check is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pbbench.doctor.machine import Check, disk_check, inception_check, load_check, memory_check, package_checks
from pbbench.errors import InputError, one_line
from pbbench.experiment.sizes import format_bytes
from pbbench.records.environment import probe

if TYPE_CHECKING:
    from rich.table import Table


def examine(device: str = "auto", results: Path = Path("results")) -> list[Check]:
    """Every check, for a sweep on ``device`` that writes under ``results``. Raises InputError for an unknown device."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device!r} is not known; choose auto, cpu or cuda")
    environment: dict[str, Any] = {}
    checks: list[Check] = []
    try:
        environment = probe(device)
    except InputError as error:
        if str(error).startswith("cannot look at this machine"):
            remedy = "install torch and pbbench's other dependencies again"
            checks.append(Check("environment", "missing", one_line(error), remedy, needed=True))
        else:  # the device that was asked for is not there; the rest of the machine is
            told, _, remedy = one_line(error).rpartition("; ")
            checks.append(Check("device", "missing", told, remedy, needed=True))
            environment = probe("cpu")
    if environment:
        seen = _capabilities(environment["device"])
        checks += [*gpu_checks(environment, seen, device), *meter_checks(environment, seen), *setting_checks(environment)]
        if environment["device"] == "cuda" and not seen.get("gpu_error"):
            checks += network_checks(_said("pbbench.doctor.network", "cuda"))
        checks.append(inception_check())
    return [*checks, *package_checks(), memory_check(), disk_check(results), load_check()]


def can_run(checks: list[Check]) -> bool:
    return not any(check.needed and check.state == "missing" for check in checks)


def _capabilities(device: str) -> dict[str, Any]:
    found = _said("pbbench.memory.meters.capabilities", device)
    if isinstance(found, str):
        return {"gpu_error": found if device == "cuda" else None, "rss_reason": found, "driver_reason": found}
    return found


def _said(module: str, device: str) -> dict[str, Any] | str:
    """What a module says in a process of its own; the last line of its errors where it ended badly."""
    done = subprocess.run([sys.executable, "-m", module, device], capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout)


def network_checks(found: dict[str, Any] | str) -> list[Check]:
    """``found``: what ``doctor.network`` said."""
    ended = isinstance(found, str)
    failed = (
        {"every precision": found} if isinstance(found, str) else {name: why for name, why in found["failed"].items() if why}
    )
    if failed:
        words = {"no": "float32"}
        told = "; ".join(f"{words.get(name, name)}: {why}" for name, why in failed.items())
        state: Literal["limited", "missing"] = "missing" if ended or "no" in failed else "limited"
        remedy = "update torch and the driver; report it with this line if they are new"
        checks = [Check("network", state, told, remedy, needed=state == "missing")]
    else:
        told = "a pass forward and backward on the GPU, maps of one pixel and of one row included, gives what the CPU does"
        checks = [Check("network", "ok", told)]
    if isinstance(found, str):
        return checks
    if found["not_fused"] is None:
        return [*checks, Check("fused operators", "ok", "they run here")]
    remedy = "install triton and a C compiler; GPUs before Ampere have none"
    return [*checks, Check("fused operators", "limited", found["not_fused"], remedy)]


def gpu_checks(environment: dict[str, Any], seen: dict[str, Any], asked: str) -> list[Check]:
    """torch, the GPU and the driver. ``asked``: the device as the user gave it."""
    build = f"built for CUDA {environment['cuda']}" if environment["cuda"] else "built without CUDA"
    checks = [Check("torch", "ok", f"torch {environment['torch']}, {build}", needed=True)]
    named, driver = seen.get("gpus") or [], seen.get("driver")
    supports = f"driver {driver}, CUDA up to {seen.get('driver_cuda')}" if driver else ""
    if seen.get("gpu_error"):
        told = f"{environment['gpu'] or 'the GPU'} cannot be used: {seen['gpu_error']}"
        checks.append(Check("GPU", "missing", told, "end what holds the GPU, or use --device cpu", needed=True))
    elif environment["device"] == "cuda":
        memory = f"{format_bytes(seen.get('gpu_free_bytes'))} of {format_bytes(seen.get('gpu_total_bytes'))} free"
        count = seen.get("gpu_count", 1)
        several = f"; the first of {count}, one is measured at a time" if count > 1 else ""
        checks.append(Check("GPU", "ok", f"{environment['gpu']}, {memory}{several}"))
        checks.append(Check("driver", "ok", supports) if driver else _no_driver(seen))
    elif named and asked == "cpu":
        checks.append(Check("GPU", "ok", f"{named[0]} is there ({supports}) and left alone: --device cpu"))
    elif named:
        newer = _newer(environment["cuda"], seen.get("driver_cuda"))
        why = build if not environment["cuda"] else f"torch is {build}, {supports}" if newer else "torch does not see it"
        remedy = "install a torch for this driver, or a newer driver" if newer or not environment["cuda"] else ""
        remedy = remedy or "look at CUDA_VISIBLE_DEVICES"
        checks.append(Check("GPU", "limited", f"{named[0]} is there and not used here: {why}", remedy))
    else:
        why = f" ({seen['driver_reason']})" if seen.get("driver_reason") else ""
        told = f"none is seen{why}: memory is counted as live tensor bytes and resident memory, CUDA's columns are null"
        checks.append(Check("GPU", "missing", told, "pbbench predict tells the peaks of a GPU run"))
    return checks


def _no_driver(seen: dict[str, Any]) -> Check:
    told = f"its version is not known: {seen.get('driver_reason')}"
    return Check("driver", "limited", told, "install the driver's NVML library (libnvidia-ml)")


def _newer(build: str | None, supported: str | None) -> bool:
    """Whether torch was built for a CUDA beyond the driver's. Versions of one major number run on each other's drivers."""
    return bool(build and supported) and int(str(build).split(".")[0]) > int(str(supported).split(".")[0])


def meter_checks(environment: dict[str, Any], seen: dict[str, Any]) -> list[Check]:
    """The meters: live tensors, resident memory, and on a GPU the allocator and what NVML tells."""
    checks = [Check("live tensor bytes", "ok", "peaks by category and module, to the byte, on any device")]
    if seen.get("rss_bytes") is None:
        remedy = "run on Linux with /proc/self/clear_refs writable"
        checks.append(Check("resident memory", "limited", f"peak_rss_bytes can be null: {seen.get('rss_reason')}", remedy))
    else:
        checks.append(Check("resident memory", "ok", "the peak of each phase (VmHWM, reset through /proc/self/clear_refs)"))
    if environment["device"] != "cuda" or seen.get("gpu_error"):
        return checks
    backend = environment["allocator_backend"]
    state: Literal["ok", "limited"] = "ok" if backend == "native" else "limited"
    told = f"backend {backend}, settings: {environment['allocator_settings']}"
    checks.append(Check("CUDA allocator", state, told, "" if state == "ok" else "only the native backend can be replayed"))
    for name, key, what in (("NVML process memory", "process", "this process"), ("NVML device memory", "device", "the GPU")):
        if seen.get(f"{key}_bytes") is not None:
            checks.append(Check(name, "ok", f"{format_bytes(seen[f'{key}_bytes'])} held by {what} ({seen.get('api')})"))
        else:
            told = f"peak_{key}_bytes will be null: {seen.get(f'{key}_reason')}"
            checks.append(Check(name, "missing", told, _nvml_remedy(str(seen.get(f"{key}_reason")))))
    if seen.get("mig"):
        checks.append(
            Check("MIG", "limited", "the GPU is divided: memory is the slice's, NVML may hide it", "measure on a whole GPU")
        )
    else:
        told = "off" if seen.get("mig") is False else "this GPU has none, or does not say"
        checks.append(Check("MIG", "ok", told))
    if seen.get("energy_mj") is not None:
        checks.append(Check("energy counter", "ok", "joules per image can be told"))
    else:
        told = f"no joules per image: {seen.get('energy_reason')}"
        checks.append(Check("energy counter", "missing", told, "cards since Volta have one"))
    return [*checks, _others_check(seen)]


def _nvml_remedy(reason: str) -> str:
    if "does not list process" in reason:
        return "start the container with the host's process numbers (--pid=host)"
    if "MIG" in reason:
        return "name the slice in CUDA_VISIBLE_DEVICES, or measure on a whole GPU"
    return "nothing but another driver or more rights; allocated and reserved bytes are measured all the same"


def _others_check(seen: dict[str, Any]) -> Check:
    others = seen.get("others")
    name = "other GPU processes"
    if others is None:
        return Check(name, "limited", "NVML lists no processes: what else holds the GPU is not known")
    if not seen.get("itself_listed") and others:
        return Check(name, "limited", f"{others} listed by numbers of another namespace; this one may be among them")
    if others:
        told = f"{others} more on this GPU: they take memory, and times will be rough"
        return Check(name, "limited", told, "wait for them, or choose another GPU with CUDA_VISIBLE_DEVICES")
    return Check(name, "ok", "none")


def setting_checks(environment: dict[str, Any]) -> list[Check]:
    """What changes figures without being an error: TF32, attention, WSL, the commit."""
    tf32 = environment["tf32"]
    on = [kind for kind, used in (("matrix products", tf32["matmul"]), ("convolutions", tf32["cudnn"])) if used]
    backends = [name.replace("_", " ") for name, enabled in environment["attention_backends"].items() if enabled]
    checks = []
    if environment["device"] == "cuda":
        checks.append(Check("TF32", "ok", f"on for {' and '.join(on)}" if on else "off"))
        checks.append(Check("attention", "ok", f"kernels allowed: {', '.join(backends)}"))
    if "microsoft" in environment["platform"].lower():
        checks.append(Check("WSL", "limited", "Windows hides a process's GPU memory from NVML", "measure under Linux itself"))
    if environment["commit"] is None:
        checks.append(
            Check("commit", "limited", f"not recorded: {environment['reasons'].get('commit')}", "run from a git clone")
        )
    elif environment["dirty"]:
        told = f"{environment['commit'][:12]} with uncommitted changes: the commit alone does not reproduce a run"
        checks.append(Check("commit", "limited", told, "commit the changes"))
    else:
        checks.append(Check("commit", "ok", environment["commit"][:12]))
    return checks


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"can_run": can_run(checks), "checks": [asdict(check) for check in checks]}


def as_table(checks: list[Check]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    verdict = "A sweep can run here." if can_run(checks) else "A sweep cannot run here: "
    if not can_run(checks):
        verdict += "; ".join(f"{check.name}: {check.meaning}" for check in checks if check.needed and check.state == "missing")
    table = Table("check", "state", "what it means", "what helps", box=box.SIMPLE_HEAD, pad_edge=False, caption=Text(verdict))
    for column in table.columns:
        column.overflow = "fold"  # an address or a path is of use only whole
    for check in checks:
        table.add_row(*(Text(text) for text in (check.name, check.state, check.meaning, check.remedy)))
    return table
