"""One table as text: Markdown, LaTeX (booktabs); and data as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table for people: title, column heads, cells as text, and a note under it.

    bold: (row, column) of cells to stress. rules: rows before which a line is drawn.
    """

    title: str
    columns: list[str]
    body: list[list[str]]
    note: str = ""
    bold: frozenset[tuple[int, int]] = frozenset()
    rules: frozenset[int] = frozenset()


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown; a text that would break the table is escaped."""
    columns = [_md(c) for c in table.columns]
    body = [
        [f"**{_md(c)}**" if (i, j) in table.bold else _md(c) for j, c in enumerate(row)]
        for i, row in enumerate(table.body)
    ]
    widths = [max(len(row[i]) for row in [columns, *body]) for i in range(len(columns))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    parts = [f"### {table.title}", "", line(columns), rule, *map(line, body), ""]
    return "\n".join([*parts, table.note, ""] if table.note else parts)


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_TEX = {
    "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "±": r"$\pm$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip


def latex(table: Table) -> str:
    """A table that needs the packages booktabs and graphicx (a wide one is scaled to the line) and T1 fonts."""

    def cell(text: str, bold: bool = False) -> str:
        made = "".join(_TEX.get(c, c) for c in text).replace("--", "-{}-")  # no dash: options are quoted here
        return rf"\textbf{{{made}}}" if bold else made

    # A column is set right if it holds nothing but numbers and gaps.
    numbers = [
        all(not row[j] or row[j][0] in "-+.0123456789<" for row in table.body) for j in range(len(table.columns))
    ]
    sides = "".join("r" if number else "l" for number in numbers)
    lines = []
    for i, row in enumerate(table.body):
        if i in table.rules:
            lines.append(r"\midrule")
        lines.append(" & ".join(cell(c, (i, j) in table.bold) for j, c in enumerate(row)) + r" \\")
    parts = [
        r"\begin{table}", r"\centering", rf"\caption{{{cell(table.title)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{sides}}}", r"\toprule",
        " & ".join(map(cell, table.columns)) + r" \\", r"\midrule", *lines, r"\bottomrule", r"\end{tabular}}",
        *([rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {cell(table.note)}}}"] if table.note else []),
        r"\end{table}", "",
    ]  # fmt: skip
    return "\n".join(parts)
