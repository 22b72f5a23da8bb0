"""Variants: named settings laid over an experiment, for ablations and for rivals of patching, each compared in the same sweep.

A variant may change the network, the diffusion, the training and the sampling. It may not change the images, how they are
scored, or the divider, which is an axis of its own: figures would not compare. Pure functions on plain values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SECTIONS = ("model", "diffusion", "training", "sampling")
FIXED = {
    "model.patch_divider": "give the variant dividers = [...]",
    "model.image_size": "images of another size are another sweep",
    "model.channels": "images of another kind are another sweep",
    "training.max_seconds": "sweep.equal_seconds holds for all",
}
"""Settings that a variant may not change, and what to do instead."""
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._=-]{0,38}[A-Za-z0-9._=-])?")


def slug(name: str) -> str:
    """A variant's name as part of a file's."""
    return name.replace(" ", "_")


def checked_variants(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every variant as {section: {key: value}}, and ``dividers`` where it has its own. Raises ValueError; whether the
    settings themselves are sound is seen when they are laid over an experiment."""
    slugs: dict[str, str] = {}
    for name in variants:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a variant: up to 40 letters, digits, spaces between them and . _ - =")
        other = slugs.setdefault(slug(name).casefold(), name)
        if other != name:
            raise ValueError(f"{name!r} and {other!r} would share their files; rename one")
    return {name: _sections(name, settings) for name, settings in variants.items()}


def laid_over(variant: dict[str, Any]) -> dict[str, Any]:
    """What of a checked variant is laid over the experiment."""
    return {section: values for section, values in variant.items() if section != "dividers"}


def _sections(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in _leaves(settings):
        section, _, rest = key.partition(".")
        if key == "dividers":
            found[key] = _dividers(name, value)
        elif section not in SECTIONS or not rest:
            raise ValueError(f"{name!r} cannot set {key}; a variant sets dividers and keys of {', '.join(SECTIONS)}")
        elif key in FIXED:
            raise ValueError(f"{name!r} cannot set {key}: {FIXED[key]}")
        else:
            found.setdefault(section, {})[rest] = value
    if not set(found) - {"dividers"}:
        raise ValueError(f"{name!r} sets nothing; give it a key such as model.position_conditioning = false")
    return found


def _leaves(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key, however the keys were nested."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def _dividers(name: str, value: Any) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values or any(not isinstance(d, int) or isinstance(d, bool) or d < 1 for d in values):
        raise ValueError(f"{name!r}: dividers {value!r} are not positive whole numbers, such as [1, 2]")
    return list(dict.fromkeys(values))
