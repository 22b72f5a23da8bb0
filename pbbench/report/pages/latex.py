"""A table in LaTeX."""

from __future__ import annotations

from pbbench.report.tables.layout import Column, Table

PRINTED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    "é": r"\'e",
    "²": "$^2$",
    "→": r"$\rightarrow$",
    "≥": r"$\geq$",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(PRINTED.get(character, character) for character in text)


def latex_table(table: Table) -> str:
    """A booktabs table (needs the packages booktabs and graphicx) with caption and label, as wide as the text."""
    sides = ["r" if column.numeric else "l" for column in table.columns]
    return "\n".join(
        [
            "% Needs \\usepackage{booktabs} and \\usepackage{graphicx}.",
            r"\begin{table*}[t]",
            r"\centering",
            f"\\caption{{{latex_escape(' '.join([table.title + '.', *table.notes]))}}}",
            f"\\label{{{table.label}}}",
            r"\resizebox{\linewidth}{!}{%",
            f"\\begin{{tabular}}{{{''.join(sides)}}}",
            r"\toprule",
            " & ".join(map(_header, table.columns, sides)) + r" \\",
            r"\midrule",
            *(" & ".join(map(latex_escape, row)) + r" \\" for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table*}",
            "",
        ]
    )


def _header(column: Column, side: str) -> str:
    lines = r" \\ ".join(map(latex_escape, column.header))
    return lines if len(column.header) == 1 else f"\\shortstack[{side}]{{{lines}}}"
