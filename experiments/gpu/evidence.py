"""Every check that needs a GPU, in one command; eight minutes on one data-centre card.

    python experiments/gpu/evidence.py [--out results/NAME-OF-THE-GPU] [--minutes 8]

1. ``doctor``: what this machine can measure.
2. ``meters``: the tests marked cuda (known allocations to the byte, ledger, NVML).
3. ``traces``: allocations recorded by torch while real steps run, replayed by ``memory.allocator``, compared to the byte.
4. ``grid``: a sweep of the paper's configuration over dividers, patches a pass and batch sizes: memory, speed, the closing
   ledger of every cell, and the prediction made without the GPU beside every measurement.

Each check runs in a process of its own with what is left of the time, the longest last; none that fails stops the others.
Writes summary.md and summary.json (what passed, the errors of prediction), a log per check, and the sweep's folder.
``--device cpu --experiment FILE`` goes through the same motions without a GPU, for a look at the procedure.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pbbench.errors import InputError
from pbbench.records import environment
from pbbench.records.cells import CellResult, read_cells
from pbbench.records.files import write_json, write_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ALLOCATED_TARGET, RESERVED_TARGET = 0.02, 0.05
"""What the design promises of warm predictions, as signed fractions of the measurement."""

REPORT_SECONDS = 25
"""Kept back for the report of as many cells as the grid came to."""

Check = dict[str, Any]


def run_check(name: str, words: list[str], out: Path, limit: float) -> Check:
    """One check as a process of at most ``limit`` seconds, its output in a log. Status: passed, failed, timed_out."""
    started = time.monotonic()
    log = out / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=max(1.0, limit), check=False)
            status = "passed" if done.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed_out"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    seconds = round(time.monotonic() - started, 1)
    print(f"{name}: {status} in {seconds:.0f} s", file=sys.stderr)
    return {"check": name, "status": status, "seconds": seconds, "said": lines[-1][:200] if lines else ""}


def errors(cells: list[CellResult], kind: str) -> list[float]:
    """Signed fractions predicted / measured − 1 of the warm rows that have both, ``kind``: allocated or reserved."""
    found = []
    for row in (row for cell in cells for row in cell.rows if row.temperature == "warm" and row.status == "ok"):
        measured, predicted = getattr(row, f"peak_{kind}_bytes"), getattr(row, f"predicted_{kind}_bytes")
        if measured and predicted is not None and row.phase in ("train_step", "sample_step"):
            found.append(predicted / measured - 1)
    return found


def compare_predictions(run: Path) -> list[Check]:
    """One line per kind: how far the predictions lie from the measurements, and whether all are within the target."""
    try:
        cells = read_cells(run)
    except InputError as error:
        return [{"check": "predictions", "status": "failed", "said": str(error)}]
    lines = []
    for kind, target in (("allocated", ALLOCATED_TARGET), ("reserved", RESERVED_TARGET)):
        found = errors(cells, kind)
        if not found:
            lines.append({"check": f"predicted {kind}", "status": "not measured", "said": "no cell has both figures"})
            continue
        within = sum(abs(error) <= target for error in found)
        said = (
            f"{within} of {len(found)} within {target:.0%}; from {min(found):+.2%} to {max(found):+.2%}, "
            f"median {statistics.median(found):+.2%}"
        )
        lines.append({"check": f"predicted {kind}", "status": "passed" if within == len(found) else "failed", "said": said})
    return lines


def summary(machine: dict[str, Any], checks: list[Check]) -> str:
    name = machine["gpu"] or f"{machine['cpu']} (no GPU)"
    lines = [f"# Evidence from {name}", ""]
    lines += [f"torch {machine['torch']}, driver {machine['driver'] or '–'}, commit {machine['commit'] or '–'}.", ""]
    lines += ["| check | result | seconds | what it said |", "|---|---|---:|---|"]
    for check in checks:
        seconds, said = check.get("seconds", "–"), check["said"].replace("|", "\\|")
        lines.append(f"| {check['check']} | {check['status'].replace('_', ' ')} | {seconds} | {said} |")
    return "\n".join([*lines, "", "Tables and figures of the grid: [grid/report.md](grid/report.md).", ""])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: results/ and the GPU's name")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--experiment", type=Path, default=HERE.parent / "memory-grid.toml")
    asked = parser.parse_args(words)
    try:
        machine = environment.probe(asked.device)
    except InputError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    name = (machine["gpu"] or "cpu").lower().replace("nvidia ", "").replace(" ", "-")
    out: Path = (asked.out or ROOT / "results" / name).resolve()
    if (out / "grid").exists():
        print(f"evidence: {out} holds an earlier run; name another --out", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * asked.minutes
    python = [sys.executable]
    experiment = str(asked.experiment.resolve())
    pbbench = [*python, "-m", "pbbench.cli"]
    grid = [*pbbench, "sweep", "--experiment", experiment, "--device", asked.device, "--memory-only"]
    grid += ["--set", "sweep.measured_steps=3", "--set", "sweep.cell_timeout_seconds=120", "--out", str(out / "grid")]
    plan = [
        ("doctor", [*pbbench, "doctor", "--device", asked.device]),
        ("meters", [*python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"]),
        ("traces", [*python, str(HERE / "traces.py"), "--experiment", experiment, "--out", str(out), "--device", asked.device]),
        ("grid", grid),
    ]
    checks = [run_check(name, command, out, deadline - REPORT_SECONDS - time.monotonic()) for name, command in plan]
    checks.append(run_check("report", [*pbbench, "report", str(out / "grid")], out, REPORT_SECONDS))
    checks += compare_predictions(out / "grid")
    write_json(out / "environment.json", machine)
    write_json(out / "summary.json", {"checks": checks})
    write_text(out / "summary.md", summary(machine, checks))
    print(out / "summary.md")
    return 0 if all(check["status"] == "passed" for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
