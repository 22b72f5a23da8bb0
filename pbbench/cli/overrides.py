"""What several commands share: options that mean the same everywhere, and how they are laid over an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pbbench.experiment.presets import parse_override

Dividers = Annotated[
    list[str] | None, typer.Option("--dividers", metavar="D...", help="Patch dividers d: the image becomes d × d patches.")
]
PatchBatch = Annotated[
    list[str] | None,
    typer.Option(
        "--patch-batch-size", metavar="P...", help="Patches per pass: a number, index (one patch index at a time), all."
    ),
]
BatchSizes = Annotated[list[str] | None, typer.Option("--batch-size", metavar="N...", help="Images per batch.")]
ExperimentFile = Annotated[Path | None, typer.Option("--experiment", metavar="FILE", help="Experiment file (TOML).")]
Preset = Annotated[str | None, typer.Option("--preset", metavar="NAME", help="A file of experiments/, by name.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set section.key=value over the experiment.")
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to run.  [default: the experiment's; auto]")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def laid_over(settings: list[str] | None, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """--set, then the options that have names of their own (those that were given)."""
    named = {name: {k: v for k, v in section.items() if v not in (None, [])} for name, section in sections.items()}
    return [
        *(parse_override(text) for text in settings or ()),
        *({name: section} for name, section in named.items() if section),
    ]


def divider_section(dividers: list[int]) -> dict[str, Any]:
    """A sweep's experiment is checked at its first divider; ``sweep.grid.plan`` checks the others."""
    return {"patch_divider": dividers[0]} if dividers else {}
