"""Axes to cells: the list of everything a sweep will run, in order, decided before anything starts. No torch.

A **measure** cell is one (variant, patch_divider, patch_batch_size, batch_size, mixed_precision, repeat) in a fresh process:
memory and speed of a sampling step and of a training step. A **quality** cell trains one divider of one variant once per seed
(how the pass is chunked does not change the result), samples and scores. Memory and speed of every divider come first: they
take minutes, quality takes hours. Where the memory is held equal, what fits has been found before (``fit``), and each divider
is measured as it is trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment
from pbbench.experiment.presets import load_experiment, preset_names
from pbbench.experiment.settings import PatchBatchSize, Precision, TrainingConfig, resolve_patch_batch_size
from pbbench.experiment.sweep_settings import SHIPPED, Fitted, SweepConfig, place_name
from pbbench.experiment.variants import slug
from pbbench.sweep.shipped import checkpoint_of

UNLIMITED = 10**9
"""Optimizer steps of a training that ends by the clock."""
FIRST_IMAGES = 64
"""Of a set's images, looked at before a sweep starts until one can be read."""


@dataclass(frozen=True)
class Cell:
    """One process's worth of work. ``patch_batch_size`` is the effective number of patches in a pass."""

    id: str
    kind: Literal["measure", "quality"]
    patch_divider: int
    patch_batch_size: int
    batch_size: int
    mixed_precision: Precision
    repeat: int = 0
    variant: str = ""
    """Which settings are laid over the experiment (``sweep.variants``); empty: none."""
    seed: int | None = None
    """What a training starts from where ``sweep.seeds`` says so; None: the experiment's seed."""

    def axes(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("id", "kind")}

    def describe(self) -> str:
        """For a person watching: "d=4: 8 patches a pass, batch 8"."""
        place = f"{self.variant}, " * bool(self.variant) + f"d={self.patch_divider}"
        if self.kind == "quality":
            return f"{place}: train or load, sample, score" + ("" if self.seed is None else f", seed {self.seed}")
        precision = "" if self.mixed_precision == "no" else f", {self.mixed_precision}"
        again = f", repeat {self.repeat}" if self.repeat else ""
        patches = "patch" if self.patch_batch_size == 1 else "patches"
        passes = f"{self.patch_batch_size} {patches} a pass, batch {self.batch_size}"
        return f"{place}: {passes}{precision}{again}"


def resolve(experiment: Experiment, cell: Cell) -> Experiment:
    """The experiment as the cell runs it: at its divider, with its variant's settings, seed and limit of time. Of one that is
    resolved already it is the same."""
    if cell.kind == "quality":
        experiment = quality_experiment(experiment)
    found = experiment.at(cell.patch_divider, cell.variant, cell.seed)
    limit = experiment.sweep.equal_seconds
    if cell.kind == "measure" or limit is None:
        return found
    training = found.training.model_copy(update={"max_seconds": limit, "num_steps": UNLIMITED})
    return found.model_copy(update={"training": training})


def quality_experiment(experiment: Experiment) -> Experiment:
    """What quality cells train and score: the experiment, or, with its device, seed and dividers, the preset that
    ``sweep.quality_from`` names. Raises InputError where there is no such preset."""
    name = experiment.sweep.quality_from
    if name is None:
        return experiment
    if name not in preset_names():
        raise InputError(f"sweep.quality_from {name!r} is not known; there are {', '.join(preset_names())}")
    found = load_experiment(preset=name)
    sweep = experiment.sweep.model_copy(update={"quality_from": None})
    return found.model_copy(
        update={"name": experiment.name, "device": experiment.device, "seed": experiment.seed, "sweep": sweep}
    )


def _subjects(sweep: SweepConfig) -> list[tuple[str, int]]:
    places = [("", divider) for divider in sweep.dividers]
    return places + [(name, d) for name, variant in sweep.variants.items() for d in variant.get("dividers", sweep.dividers)]


def check_subjects(experiment: Experiment) -> dict[tuple[str, int], Experiment]:
    """(variant, divider) → its own experiment, of all that are measured and trained, those without a variant first. Raises
    InputError where a divider does not fit the image, trainings would not compare, or what they need is not there."""
    sweep = experiment.sweep
    resolved = {(variant, divider): experiment.at(divider, variant) for variant, divider in _subjects(sweep)}
    strangers = [
        d
        for d, given in sweep.checkpoints.items()
        if given != SHIPPED and d not in {str(divider) for divider in sweep.dividers}
    ]
    if strangers:
        raise InputError(f"sweep.checkpoints names divider {', '.join(strangers)}, which is not among the sweep's dividers")
    if sweep.quality:
        trained = quality_experiment(experiment)
        for divider in sweep.dividers:
            trained.at(divider)
        _check_sources(trained)
        _check_budgets(experiment, resolved)
    return resolved


def plan(experiment: Experiment) -> list[Cell]:
    """The cells in the order they run, each once: settings that come to the same number of patches a pass are one cell.

    Raises InputError as ``check_subjects`` does, and where the memory is held equal and what fits has not been found.
    """
    _check_fitted(experiment)
    sweep, resolved = experiment.sweep, check_subjects(experiment)
    places = list(resolved)
    cells: dict[str, Cell] = {}
    for repeat, (variant, divider) in product(range(sweep.repeats), places):
        for setting, batch, precision in _measured(experiment, variant, resolved[variant, divider].training):
            patches = resolve_patch_batch_size(setting, batch, divider)
            name = f"{_prefix(variant)}d{divider}-p{patches}-b{batch}-{precision}" + (f"-r{repeat}" if repeat else "")
            cells.setdefault(name, Cell(name, "measure", divider, patches, batch, precision, repeat, variant))
    elsewhere = quality_experiment(experiment).training if sweep.quality_from and sweep.quality else None
    for (variant, divider), seed in product(places if sweep.quality else (), sweep.seeds or (None,)):
        training = elsewhere or resolved[variant, divider].training
        patches = resolve_patch_batch_size(training.patch_batch_size, training.batch_size, divider)
        name = f"{_prefix(variant)}d{divider}-quality" + ("" if seed is None else f"-s{seed}")
        given: dict[str, Any] = {"variant": variant, "seed": seed}
        cells[name] = Cell(name, "quality", divider, patches, training.batch_size, training.mixed_precision, **given)
    return list(cells.values())


def trainings(experiment: Experiment, cells: list[Cell]) -> list[Experiment]:
    """The experiments among the cells that train; a divider whose checkpoint is given does not."""
    quality = [c for c in cells if c.kind == "quality"]
    chosen = [c for c in quality if checkpoint_of(experiment, c.patch_divider, c.variant) is None]
    return [resolve(experiment, cell) for cell in chosen]


def _measured(experiment: Experiment, variant: str, training: TrainingConfig) -> list[tuple[PatchBatchSize, int, Precision]]:
    """(patches a pass, batch size, precision) of a subject's measured cells; ``training``: its own, resolved."""
    sweep, own = experiment.sweep, experiment.sweep.variants.get(variant, {}).get("training", {})
    if sweep.equal == "memory":
        return [(training.patch_batch_size, training.batch_size, training.mixed_precision)]
    batch_sizes = (own["batch_size"],) if "batch_size" in own else sweep.batch_sizes or (experiment.training.batch_size,)
    precisions = sweep.mixed_precisions or (experiment.training.mixed_precision,)
    precisions = (own["mixed_precision"],) if "mixed_precision" in own else precisions
    return list(product(sweep.patch_batch_sizes, batch_sizes, precisions))


def _check_fitted(experiment: Experiment) -> None:
    """Where the memory is held equal, what fits must have been found, and come to each training's own optimizer batch."""
    bare = experiment.model_copy(update={"sweep": experiment.sweep.model_copy(update={"fitted": {}})})
    for variant, divider in _subjects(experiment.sweep) if experiment.sweep.equal == "memory" else ():
        name, training = place_name(variant, divider), bare.at(divider, variant).training
        found = experiment.sweep.fitted.get(name)
        if found is None or images_a_step(found) != images_a_step(training):
            raise InputError(f'sweep.fitted."{name}" is missing or of another optimizer batch; fit_to_memory finds it')


def _prefix(variant: str) -> str:
    return f"{slug(variant)}-" if variant else ""


def _check_budgets(experiment: Experiment, resolved: dict[tuple[str, int], Experiment]) -> None:
    """Where the images seen are held equal, every variant's budget must come to the experiment's. Raises InputError."""
    if experiment.sweep.equal == "seconds":
        return
    images = images_to_see(experiment.training)
    for (variant, _), own in resolved.items():
        if images_to_see(own.training) != images:
            one = images_a_step(own.training)
            fits = images % one == 0
            steps = f"training.num_steps = {images // one}" if fits else f"batches of which {images:,} is a multiple"
            raise InputError(
                f'sweep.variants."{variant}" would train on {images_to_see(own.training):,} images and the experiment on '
                f'{images:,}; give it {steps}, or the sweep equal = "seconds"'
            )


def images_to_see(training: TrainingConfig) -> int:
    """Of a whole training by one process, with repetition."""
    return training.num_steps * images_a_step(training)


def images_a_step(training: TrainingConfig | Fitted) -> int:
    """Images of one optimizer step of one process."""
    return training.batch_size * training.gradient_accumulation_steps


def _check_sources(experiment: Experiment) -> None:
    """What quality cells will need hours later is looked for now. Raises InputError for what is not there."""
    from pbbench.data.sources import Prepared, open_source

    if experiment.data.source != "synthetic":
        source = open_source(experiment.data.source)
        if isinstance(source, Prepared):
            source.check_size(experiment.model.size)
        else:
            _check_readable(source, experiment.model.size)
    for divider, folder in experiment.sweep.checkpoints.items():
        if folder != SHIPPED and not (
            (Path(folder) / "config.json").is_file() or any(Path(folder).glob("checkpoints/step-*/config.json"))
        ):
            raise InputError(f"sweep.checkpoints.{divider}: {folder} is not a folder that pbbench train or convert wrote")
    weights = experiment.quality.inception_weights
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"quality.inception_weights: there is no file {weights}")


def _check_readable(source: Any, size: tuple[int, int]) -> None:
    """Raises InputError where none of a source's first images can be decoded: in the order of a hash, they stand for all."""
    from pbbench.data.decode import decode
    from pbbench.data.entries import Unreadable, attempt, read_bytes

    told = "there is no jpg, jpeg, png or webp file in it"
    for entry in source.entries[:FIRST_IMAGES]:
        outcome = attempt(lambda entry: decode(read_bytes(source, entry), size), entry)
        if not isinstance(outcome, Unreadable):
            return
        told = f"{outcome.name}: {outcome.reason}"
    raise InputError(f"data.source: {source.name} holds no readable image ({told}); give a folder or a zip of images")
