"""The report's page in HTML: one file, its figures inlined, that refers to nothing outside itself, so that it opens offline and
can be mailed."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from pbbench.report.pages.sections import Section

PHOTOGRAPHS = ("samples",)
"""Figures inlined as pixels; the others, charts, as vectors."""


def html_page(sections: Sequence[Section], files: Mapping[str, bytes]) -> str:
    """report.html; ``files``: the figures' files by their paths in the run folder."""
    inlined = {}
    for name in (picture.name for section in sections for picture in section.pictures):
        kind, mime = ("png", "image/png") if name in PHOTOGRAPHS else ("svg", "image/svg+xml")
        inlined[name] = f"data:{mime};base64,{base64.b64encode(files[f'figures/{name}.{kind}']).decode()}"
    loader = PackageLoader("pbbench.report.pages", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.get_template("report.html.j2").render(sections=sections, inlined=inlined)
