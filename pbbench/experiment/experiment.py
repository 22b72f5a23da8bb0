"""The experiment: its sections together, merged, checked and written out.

An experiment is a TOML file with the sections of ``settings.py`` and ``sweep_settings.py``. ``load_experiment`` merges, in this
order: the defaults stated there, a file or preset, and ``--set section.key=value`` overrides; then validates the whole. Unknown
keys are refused by name. No torch here: planning a sweep and printing help must stay quick.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from pbbench.errors import InputError
from pbbench.experiment.settings import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    NonNegative,
    QualityConfig,
    SamplingConfig,
    Section,
    TrainingConfig,
)
from pbbench.experiment.sweep_settings import SlurmConfig, SweepConfig, place_name
from pbbench.experiment.variants import laid_over


class Experiment(Section):
    """One run, whole. ``seed`` governs weights, data order, timesteps and training noise."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    """Names the results folder: letters, digits, dots, dashes, underscores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU, else the CPU."""
    seed: NonNegative = 0
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    quality: QualityConfig = QualityConfig()
    sweep: SweepConfig = SweepConfig()
    slurm: SlurmConfig = SlurmConfig()

    @property
    def data_seed(self) -> int:
        """Of the built-in scenes and of the held-out loss's noise: what all trainings that are compared share."""
        return self.seed if self.data.seed is None else self.data.seed

    def with_divider(self, patch_divider: int) -> Experiment:
        """The same experiment at another divider, checked again. Raises InputError where the image does not divide."""
        return self.at(patch_divider)

    def at(self, patch_divider: int, variant: str = "", seed: int | None = None) -> Experiment:
        """The experiment at a divider, with a variant's settings laid over it, and what was found to fit the memory given;
        trained from ``seed`` on the same images; checked again. Of the variants only that one stays, so that doing it twice
        comes to the same. Raises InputError."""
        place = place_name(variant, patch_divider)
        fitted = self.sweep.fitted.get(place)
        chosen = {variant: self.sweep.variants[variant]} if variant else {}
        values = merge(self.model_dump(mode="json"), laid_over(chosen.get(variant, {})))
        values["model"]["patch_divider"] = patch_divider
        values["sweep"]["variants"] = chosen
        values["sweep"]["fitted"] = {place: fitted} if fitted else {}
        if fitted:
            values["training"] |= fitted.training()
        if seed is not None:
            values["seed"], values["data"]["seed"] = seed, self.data_seed
        return _validated(values, f"{_named(variant)} at divider {patch_divider}" if variant else "--dividers")

    def to_toml(self) -> str:
        """The resolved experiment; loading it gives the same one (absent keys are those without a value)."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid onto ``base``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def parse_experiment(values: dict[str, Any], origin: str) -> Experiment:
    """Validate; raises InputError whose one line names the key, what is wrong and what would fit."""
    dividers = values.get("sweep", {}).get("dividers") if isinstance(values.get("sweep"), dict) else None
    if dividers and isinstance(dividers, list | tuple):  # a sweep's file need not name a divider of its own
        values = merge({"model": {"patch_divider": dividers[0]}}, values)
    experiment = _validated(values, origin)
    for name, variant in experiment.sweep.variants.items():
        alone = merge(experiment.model_dump(mode="json"), laid_over(variant))
        alone["model"]["patch_divider"] = variant.get("dividers", [experiment.model.patch_divider])[0]
        _validated(alone, f"{origin}: {_named(name)}")
    return experiment


def _named(variant: str) -> str:
    return f'sweep.variants."{variant}"'


def _validated(values: dict[str, Any], origin: str) -> Experiment:
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        innermost = [e for e in found if not any(o is not e and o["loc"][: len(e["loc"])] == e["loc"] for o in found)]
        raise InputError(f"{origin}: {'; '.join(_problem(e) for e in innermost[:4])}") from None


def _problem(error: Any) -> str:
    where = ".".join(
        str(part) for part in error["loc"] if not (isinstance(part, str) and ("[" in part or part in ("int", "str")))
    )
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(where.rpartition(".")[2], [k.rpartition(".")[2] for k in known_keys()], n=1)
        full = [k for k in known_keys() if close and k.rpartition(".")[2] == close[0]]
        section = [k for k in known_keys() if k.startswith(where.rpartition(".")[0] + ".")] or list(Experiment.model_fields)
        return f"unknown key {where}; " + (f"did you mean {full[0]}?" if full else f"known are {', '.join(section)}")
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    given = (
        "" if isinstance(error["input"], dict | BaseModel) or repr(error["input"]) in message else f" (got {error['input']!r})"
    )
    return f"{where}: {message}{given}" if where else f"{message}{given}"


def known_keys() -> list[str]:
    """Every setting as section.key, in the order of the sections."""
    keys: list[str] = []
    for name, field in Experiment.model_fields.items():
        section = field.annotation
        nested = isinstance(section, type) and issubclass(section, BaseModel)
        keys += [f"{name}.{key}" for key in section.model_fields] if nested else [name]  # type: ignore[union-attr]
    return keys


def differences(old: Experiment, new: Experiment) -> list[str]:
    """The settings in which two experiments differ, as ``section.key: old → new``."""

    def flat(experiment: Experiment) -> dict[str, str]:
        dump = experiment.model_dump(mode="json")
        pairs = {k: v for k, v in dump.items() if not isinstance(v, dict)}
        pairs |= {f"{s}.{k}": v for s, section in dump.items() if isinstance(section, dict) for k, v in section.items()}
        return {key: json.dumps(value) for key, value in pairs.items()}

    before, after = flat(old), flat(new)
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in after if before.get(key) != after.get(key)]
