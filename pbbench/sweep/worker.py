"""One cell, one fresh process: ``python -m pbbench.sweep.worker``, a job on stdin, JSON lines on stdout.

The worker writes no results; it tells its parent what happened, line by line ({"event": "phase", "row", "progress", "note",
"detail", "error", "disk" or "done"}), so that whatever kills it, what it had measured is kept. When the parent dies, stdin
closes and the worker leaves at once: no orphan goes on computing beside a resumed sweep.

A measured workload: build (phase load) → cold step, metered → warm-up → warm steps, metered and timed → one traced step,
untimed, which counts live bytes; on CUDA and where asked for, one more, of which torch writes its memory snapshot. Sampling
comes first, in a clean process; training follows after everything is freed.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from pbbench.errors import InputError, StorageError, is_storage_failure, one_line
from pbbench.experiment.experiment import Experiment, parse_experiment
from pbbench.records.rows import CATEGORIES, Row
from pbbench.sweep.cell_rows import Emit, base_row, columns_of, failure, unmeasured, with_reason, with_reasons
from pbbench.sweep.grid import Cell

PREDICTED = ("predicted_allocated_bytes", "predicted_reserved_bytes")
UNREAD_IN_PARTS = ("peak_allocated_bytes", "peak_reserved_bytes", "seconds_per_step", "joules_per_image")


def measure(experiment: Experiment, cell: Cell, device_name: str, run: Path, emit: Emit) -> None:
    """Measure a sampling step, then a training step; a failure of one is a row and does not stop the other."""
    import torch

    from pbbench.memory.meters.phases import Meter
    from pbbench.memory.tracer.viewer import memory_snapshot
    from pbbench.sweep import workload

    device = torch.device(device_name)
    common = base_row(experiment, cell, device_name)
    snapshots = run / "snapshots" if experiment.sweep.memory_snapshots else None
    if snapshots and device.type != "cuda":
        emit("note", text="sweep.memory_snapshots: torch's snapshots are of CUDA memory; none is written on this device")
        snapshots = None
    if experiment.sweep.equal_memory is not None:
        emit("detail", equal_memory=experiment.sweep.equal_memory)
    builders = {"sample_step": workload.sampling_workload, "train_step": workload.training_workload}
    with Meter(device) as meter:
        for phase, build in builders.items():
            emit("phase", phase="load")
            current, work = "load", None
            try:
                with meter.phase("load") as reading:
                    work = build(experiment, cell, device)
                if phase == "sample_step":
                    emit("row", row={**common, "phase": "load", "temperature": "cold", **columns_of(reading)})
                current = phase
                emit("phase", phase=phase)
                _measure_step(experiment, cell, work, phase, meter, common, emit)
                if snapshots:
                    path = snapshots / f"{cell.id}-{phase}.pickle"
                    with memory_snapshot(path):
                        work.run()
                    emit("detail", snapshot={phase: str(path.relative_to(run))})
            except Exception as error:
                if isinstance(error, InputError) or is_storage_failure(error):
                    raise
                status, told = failure(error, current)
                columns = with_reasons(unmeasured(status, told), predicted(experiment, cell, phase)[phase])
                emit("row", row={**common, "status": status, "phase": phase, **columns})
                emit("error", status=status, error=told)
            del work
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def predicted(experiment: Experiment, cell: Cell, phase: str) -> dict[str, dict[str, Any]]:
    """Columns of the peaks predicted for CUDA, for the step and for each of its parts; null with a reason where that fails."""
    from pbbench.sweep.planning.forecast import forecast_step

    try:
        found = forecast_step(experiment, cell, phase)
    except Exception as error:  # a measurement is not lost because its prediction failed
        why = f"the prediction failed: {one_line(error)[:200]}"
        return {phase: {"reasons": dict.fromkeys(PREDICTED, why)}}
    peaks = {phase: found.steady.warm, **found.steady.phases}
    return {
        name: dict(zip(PREDICTED, (peak.allocated_bytes, peak.reserved_bytes), strict=True)) for name, peak in peaks.items()
    }


def _measure_step(
    experiment: Experiment, cell: Cell, work: Any, phase: str, meter: Any, common: dict[str, Any], emit: Emit
) -> None:
    import torch

    from pbbench.memory.tracer.timeline import timeline
    from pbbench.sweep.workload import FlopCount

    sweep = experiment.sweep
    with meter.phase(phase) as cold:
        work.run()
    for _ in range(sweep.warmup_steps - 1):
        work.run()
    synchronize = torch.cuda.synchronize if meter.device.type == "cuda" else lambda: None
    times: list[float] = []
    with meter.phase(phase) as warm:
        for _ in range(sweep.measured_steps):
            synchronize()
            start = time.perf_counter()
            work.run()
            synchronize()
            times.append(time.perf_counter() - start)
    parts: dict[str, Any] = {}
    if phase == "train_step" and meter.device.type == "cuda":
        with meter.parts(work.modules) as parts:
            work.run()
    with FlopCount() as flops:
        live = work.trace(record_events=True)
    expected = predicted(experiment, cell, phase)
    seconds = statistics.median(times)
    measured = columns_of(warm, images=work.images * sweep.measured_steps)
    untraced = "live tensors are counted on a warm step"
    emit(
        "row",
        row={
            **common,
            "phase": phase,
            "temperature": "cold",
            "seconds_per_step": cold.seconds,
            "images_per_second": work.images / cold.seconds,
            **with_reason(columns_of(cold, images=work.images), "peak_live_bytes", untraced),
        },
    )
    emit(
        "row",
        row={
            **common,
            "phase": phase,
            "temperature": "warm",
            "seconds_per_step": seconds,
            "images_per_second": work.images / seconds,
            "flops_per_image": flops.total // work.images,
            "peak_live_bytes": live.peak_bytes,
            **{f"{name}_bytes": live.by_category[name] for name in CATEGORIES},
            **with_reasons(measured, expected[phase]),
        },
    )
    for name, peak in live.phases.items() if phase == "train_step" else ():
        columns = {"peak_live_bytes": peak.peak_bytes, **{f"{key}_bytes": peak.by_category[key] for key in CATEGORIES}}
        if name in parts:
            read = {**columns_of(parts[name], images=work.images), "seconds_per_step": parts[name].seconds}
        else:
            read = {
                "reasons": dict.fromkeys(
                    UNREAD_IN_PARTS, "on the CPU meters read whole steps; live tensors are counted in parts"
                )
            }
        read = with_reasons(read, expected.get(name, {}))
        emit("row", row={**common, "phase": name, "temperature": "warm", **columns, **read})
    at_peak = {"operator": live.peak_operator, "module": live.peak_module}
    emit(
        "detail",
        by_module={phase: live.by_module[:12]},
        at_peak={phase: at_peak},
        step_seconds={phase: times},
        ledger={phase: warm.ledger | ({"reasons": warm.closing_reasons} if warm.closing_reasons else {})},
        timeline={phase: timeline(live)},
    )


def run_job(job: dict[str, Any], emit: Emit) -> None:
    """Do one cell and say how it went. A mistake of the user's is told like a crash, by its one line; a disk that cannot be
    written to is no failure of the cell's, and ends the sweep."""
    experiment = parse_experiment(job["experiment"], "the job")
    cell = Cell(**job["cell"])
    phase = "load"

    def noting(event: str, **values: Any) -> None:
        nonlocal phase
        phase = values["phase"] if event == "phase" else phase
        emit(event, **values)

    try:
        if cell.kind == "measure":
            measure(experiment, cell, job["device"], Path(job["run"]), noting)
        else:
            from pbbench.sweep.quality_cell import train_and_score

            train_and_score(experiment, cell, job["device"], Path(job["run"]), noting)
    except Exception as error:
        if is_storage_failure(error):
            told = str(error) if isinstance(error, StorageError) else f"cannot write to {job['run']} ({one_line(error)[:150]})"
            emit("disk", message=told)
            return
        status, what = failure(error, phase)
        row_phase = "quality" if cell.kind == "quality" else "load"  # of a cell that failed as a whole; the error says where
        row = {**base_row(experiment, cell, job["device"]), "status": status, "phase": row_phase}
        emit("row", row={**row, **unmeasured(status, what)})
        emit("error", status=status, error=what)
    emit("done")


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _emitter(stream: TextIO) -> Emit:
    lock = threading.Lock()

    def emit(event: str, **values: Any) -> None:
        if event == "row":
            values["row"] = Row.model_validate(values["row"]).model_dump(mode="python")
        with lock:
            stream.write(json.dumps({"event": event, **values}) + "\n")
            stream.flush()

    return emit


def main() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's warning to a whole job; the parent minds it
    job = json.loads(sys.stdin.readline())
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the events
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    run_job(job, _emitter(channel))
    channel.flush()
    os._exit(0)  # skip interpreter teardown: a GPU library's exit handlers must not turn a finished cell into a crash


if __name__ == "__main__":
    main()
