"""A table, and the report's page, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pbbench.report.tables.layout import Table

if TYPE_CHECKING:
    from pbbench.report.pages.sections import Section


def markdown_escape(text: str) -> str:
    """Text that Markdown prints as it stands, in a table's cell too."""
    escaped = "".join({"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(c) or (f"\\{c}" if c in "\\|`*[]" else c) for c in text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)  # within a word an underscore is plain text


def markdown_table(table: Table) -> str:
    """A pipe table with its notes underneath."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = line("---:" if column.numeric else "---" for column in table.columns)
    header, *rows = [line(map(markdown_escape, cells)) for cells in ([c.title for c in table.columns], *table.rows)]
    return "\n\n".join(["\n".join([header, rule, *rows]), *map(markdown_escape, table.notes)])


def markdown_page(sections: Sequence[Section]) -> str:
    """report.md; figures are referred to as figures/<name>.png."""
    blocks = []
    for section in sections:
        blocks.append(f"{'#' * section.level} {markdown_escape(section.heading)}")
        for picture in section.pictures:
            blocks += [f"![{picture.title}](figures/{picture.name}.png)", markdown_escape(picture.caption)]
        blocks.append("\n".join(map(markdown_escape, section.lines)))
        blocks.append("\n".join(f"- {markdown_escape(line)}" for line in section.bullets))
        blocks.append("\n".join(f"- **{term}.** {markdown_escape(text)}" for term, text in section.terms))
        blocks.append(markdown_table(section.table) if section.table else "")
    return "\n\n".join(filter(None, blocks)) + "\n"
