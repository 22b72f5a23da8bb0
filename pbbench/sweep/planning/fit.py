"""Equal memory: what every training of a sweep takes to fit, found by prediction before anything runs, and what cannot fit.

The search needs torch and seconds to minutes, so it is done once, by the process that plans the sweep; what it finds goes into
the experiment (``sweep.fitted``), and with it to every worker and into the run's folder. torch is imported by the search alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pbbench.experiment.experiment import Experiment
from pbbench.experiment.sizes import format_bytes
from pbbench.experiment.sweep_settings import Fitted, place_name
from pbbench.records import folder
from pbbench.records.cells import CellResult
from pbbench.records.rows import Row
from pbbench.sweep.cell_rows import base_row, unmeasured
from pbbench.sweep.grid import Cell, check_subjects, resolve
from pbbench.sweep.planning.calibration import UNCALIBRATED, Calibration
from pbbench.sweep.planning.search import Search


def fit_to_memory(
    experiment: Experiment,
    device: str,
    *,
    run: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
    calibration: Calibration = UNCALIBRATED,
) -> Experiment:
    """The experiment with ``sweep.fitted`` for every (variant, divider), where its memory is held equal; else as it is.

    device: what it is to run on; on a "cpu" live bytes must fit, elsewhere reserved ones with the calibration's known terms.
    run: a folder that may have been begun with the same settings; what it holds is not searched for again. tell: hears a line
    before the search and one for each finding. Raises InputError as ``grid.plan`` does, before the search.
    """
    given = experiment.sweep.equal_memory
    if given is None:
        return experiment
    experiment = _with(experiment, {})
    subjects = check_subjects(experiment)
    fitted = folder.fitted_before(experiment, run) if run else {}
    if not fitted:
        tell(f"looking for what fits in {format_bytes(given)}")
        for (variant, divider), own in subjects.items():
            found = Search(own, "train_step", given, calibration, live=device == "cpu").quickest_step(divider)
            fit = Fitted(
                batch_size=found.batch_size,
                gradient_accumulation_steps=found.gradient_accumulation_steps,
                patch_batch_size=found.patch_batch_size,
                predicted_bytes=found.needed_bytes,
            )
            fitted[place_name(variant, divider)] = fit
            tell(f"{f'{variant}, ' * bool(variant)}d={divider}: {in_words(fit, given)}")
    return _with(experiment, fitted)


def _with(experiment: Experiment, fitted: dict[str, Fitted]) -> Experiment:
    return experiment.model_copy(update={"sweep": experiment.sweep.model_copy(update={"fitted": fitted})})


def in_words(fit: Fitted, given: int) -> str:
    """ "batch 8 × 4, 16 patches a pass, predicted 7.1 GiB", or what is missing."""
    if fit.predicted_bytes > given:
        return f"nothing fits, at least {format_bytes(fit.predicted_bytes)} are needed"
    batch = f"batch {fit.batch_size}" + f" × {fit.gradient_accumulation_steps}" * (fit.gradient_accumulation_steps > 1)
    patches = "patch" if fit.patch_batch_size == 1 else "patches"
    return f"{batch}, {fit.patch_batch_size} {patches} a pass, predicted {format_bytes(fit.predicted_bytes)}"


def beyond_memory(experiment: Experiment, cell: Cell, device: str) -> CellResult | None:
    """The result of a cell that is not run because no way to train it was predicted to fit; None where one was."""
    given, fit = experiment.sweep.equal_memory, experiment.sweep.fitted.get(place_name(cell.variant, cell.patch_divider))
    if given is None or fit is None or fit.predicted_bytes <= given:
        return None
    kind = "live" if device == "cpu" else "reserved"
    needs, has = format_bytes(fit.predicted_bytes), format_bytes(given)
    why = (
        f"predicted, not run: a training step needs at least {needs} ({fit.predicted_bytes:,} {kind} bytes) and was given "
        f"{has} ({given:,}, sweep.equal_memory)"
    )
    told = {"phase": "train_step", "type": "out_of_memory", "message": why}
    row = base_row(resolve(experiment, cell), cell, device) | {"status": "out_of_memory"}
    row |= {"phase": "quality" if cell.kind == "quality" else "train_step", **unmeasured("out_of_memory", told)}
    return CellResult(
        id=cell.id,
        kind=cell.kind,
        status="out_of_memory",
        axes=cell.axes(),
        rows=[Row.model_validate(row)],
        error=told,
        details={"equal_memory": given},
    )
