"""Where an experiment's settings come from: a TOML file or a preset, with ``--set section.key=value`` laid on. No torch."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pbbench.errors import InputError, one_line
from pbbench.experiment.experiment import Experiment, merge, parse_experiment


def experiments_folder() -> Path:
    """The experiment files: beside the package in a clone, inside it when installed from a wheel."""
    inside = Path(__file__).parents[1] / "experiments"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "experiments"


def preset_names() -> list[str]:
    return sorted(path.stem for path in experiments_folder().glob("*.toml"))


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A TOML file as a dict. Raises InputError where it is absent, unreadable or malformed."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read the experiment file {path}: {one_line(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that comes with the package, as a dict."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def parse_override(text: str) -> dict[str, Any]:
    """``section.key=value`` as a nested dict; the value is read as TOML (quotes may be left off a word)."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {text!r}: expected section.key=value, for example training.num_steps=1000")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        parsed = value.strip()
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed


def load_experiment(
    file: str | os.PathLike[str] | None = None, preset: str | None = None, overrides: Iterable[dict[str, Any]] = ()
) -> Experiment:
    """The experiment of a file or a preset (not both; neither: the defaults), with overrides laid on in order."""
    if file is not None and preset is not None:
        raise InputError("--experiment and --preset exclude each other; give one")
    if preset is not None and preset not in preset_names():
        raise InputError(f"--preset {preset!r} is not known; there are {', '.join(preset_names())}")
    path = experiments_folder() / f"{preset}.toml" if preset else file
    values = read_toml(path) if path is not None else {}
    origin = str(file) if file is not None else f"preset {preset}" if preset else "settings"
    parse_experiment(values, origin)  # first alone, so that a mistake in the file is not blamed on an override
    given = list(overrides)
    for override in given:
        values = merge(values, override)
    return parse_experiment(values, "options laid on " + origin if given else origin)
