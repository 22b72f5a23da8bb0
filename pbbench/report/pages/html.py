"""The report's two pages, Markdown and HTML, from one set of contents.

The HTML page is one file: its figures are inlined and it refers to nothing outside itself, so that it opens offline and can
be mailed. The Markdown page shows the same beside the figures' files.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pbbench.records.cells import CellResult
from pbbench.report.figures.gallery import Picture
from pbbench.report.pages import statements as facts
from pbbench.report.tables import columns as layout
from pbbench.report.tables import details
from pbbench.report.tables.sheet import Column, Sheet, markdown_escape, to_markdown


def contents(
    cells: Sequence[CellResult], experiment: dict[str, Any], environment: dict[str, Any], notes: Sequence[str], name: str
) -> dict[str, Any]:
    """Everything both pages say, figures apart. ``notes``: what could not be read or drawn."""
    splits = [layout.split_sheet(cells, step) for step in ("train", "sample")]
    return {
        "name": name,
        "headline": facts.headline(cells, environment),
        "tradeoff": layout.tradeoff_sheet(cells),
        "pays": facts.patching_pays(cells),
        "splits": [sheet for sheet in splits if sheet],
        "quality": details.quality_sheet(cells),
        "bands": details.bands_sheet(cells),
        "quality_statements": facts.quality_statements(cells),
        "failures": details.failure_sheet(cells),
        "meters": layout.meters_sheet(cells),
        "meters_used": facts.meters_used(cells),
        "ledger": details.ledger_sheet(cells),
        "predictions": details.prediction_sheet(cells),
        "modules": details.module_sheet(cells),
        "machine": _pairs("Machine and versions", facts.machine(environment)),
        "settings": _pairs("Settings", facts.settings(experiment)),
        "missing": details.missing_sheet(cells),
        "reading": facts.READING,
        "notes": list(notes),
    }


def _pairs(title: str, pairs: Sequence[tuple[str, str]]) -> Sheet | None:
    if not pairs:
        return None
    columns = [Column((header,), [pair[i] for pair in pairs], numeric=False) for i, header in enumerate(("name", "value"))]
    return Sheet(title, columns)


def _environment(escape: bool) -> Environment:
    loader = PackageLoader("pbbench.report.pages", "templates")
    made = Environment(loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["markdown_table"] = to_markdown
    made.filters["markdown"] = markdown_escape
    return made


def markdown_page(said: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """report.md; figures are referred to as figures/<name>.png."""
    return _environment(False).get_template("report.md.j2").render(said, pictures=pictures)


def html_page(said: Mapping[str, Any], pictures: Sequence[tuple[Picture, str, bytes]]) -> str:
    """report.html; ``pictures``: each with its kind ("png" or "svg") and its file's bytes, which are inlined."""
    types = {"png": "image/png", "svg": "image/svg+xml"}
    inlined = [(p, f"data:{types[kind]};base64,{base64.b64encode(content).decode()}") for p, kind, content in pictures]
    return _environment(True).get_template("report.html.j2").render(said, pictures=inlined)
