"""Tables from data frames, as text in Markdown and LaTeX (booktabs); and data as CSV and JSON."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dart_eval.util.text import json_text, printable

if TYPE_CHECKING:
    import pandas as pd


LINE = ("model", "task", "method", "claim", "sparsity", "margin")  # heads of the columns that identify a line


@dataclass(frozen=True)
class Table:
    """A table for readers: title, column heads, cells as text, and a note under it.

    bold: (row, column) of bold cells; rules: rows below a horizontal line.
    """

    title: str
    columns: list[str]
    body: list[list[str]]
    note: str = ""
    bold: frozenset[tuple[int, int]] = frozenset()
    rules: frozenset[int] = frozenset()

    @property
    def numbers(self) -> list[bool]:
        """Whether each column has only numbers and gaps, and is aligned right."""
        return [all(not row[j] or row[j][0] in "-+.0123456789<" for row in self.body) for j in range(len(self.columns))]


class Column(NamedTuple):
    """A column of a table from a data frame.

    Attributes:
        head: in the table.
        name: of the frame's column, if different.
        text: formatter of a value.
    """

    head: str
    name: str = ""
    text: Callable[[Any], str] = str


def from_frame(
    title: str, frame: pd.DataFrame, columns: Sequence[Column], note: str, if_different: Sequence[Column] = ()
) -> Table:
    """Return the table of a frame's rows, with a dash for missing values.

    Args:
        title: of the table.
        frame: one row per line.
        columns: columns that are always shown.
        note: under the table.
        if_different: further columns. A column with one value in all rows moves into the note.
    """
    gaps = [None] * len(frame)
    made = [
        (c.head, ["-" if v is None or v != v else c.text(v) for v in frame.get(c.name or c.head, gaps)])
        for c in (*columns, *if_different)
    ]
    foldable = range(len(columns), len(made)) if len(frame) > 1 else ()
    same = [i for i in foldable if len(set(made[i][1])) == 1]
    if same:
        note = f"In all rows: {', '.join(f'{made[i][0]} {made[i][1][0]}' for i in same)}. {note}"
    varying = [column for i, column in enumerate(made) if i not in same]
    body = [list(row) for row in zip(*(texts for _, texts in varying), strict=True)]
    return Table(title, [head for head, _ in varying], body, note)


def pieces(table: Table, width: int, name: int) -> list[Table]:
    """Split a table into pieces of at most `width` characters, each with the columns that identify a line.

    Args:
        table: its first columns identify a line, those of `LINE`.
        width: of a line on the terminal.
        name: characters to which a method's name can be folded.
    """
    wide = [max(map(len, [head, *column])) for head, *column in zip(table.columns, *table.body, strict=True)]
    folds = ("method", "claim")
    wide = [2 + (min(w, name) if head in folds else w) for head, w in zip(table.columns, wide, strict=True)]
    keys = list(range(max(1, sum(1 for _ in itertools.takewhile(LINE.__contains__, table.columns)))))
    chosen = [list(keys)]
    for i in range(len(keys), len(table.columns)):
        if len(chosen[-1]) > len(keys) and sum(wide[j] for j in (*chosen[-1], i)) > width:
            chosen.append(list(keys))
        chosen[-1].append(i)
    return [
        replace(
            table, title=table.title if part is chosen[0] else "", columns=[table.columns[j] for j in part],
            body=[[row[j] for j in part] for row in table.body],
            bold=frozenset((i, part.index(j)) for i, j in table.bold if j in part),
        )
        for part in chosen
    ]  # fmt: skip


def finite(value: object) -> object:
    """Replace NaN and infinity by None, since JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-", re.IGNORECASE)  # or the dash that stands for none


def data_text(rows: Sequence[dict[str, object]], form: str) -> str:
    """Return rows as csv or json, with a column for each name in any of them."""
    if form == "json":
        return json_text(finite(list(rows))) + "\n"
    names = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text([names, *([row.get(name) for name in names] for row in rows)])


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV that is safe in a spreadsheet: an apostrophe precedes text that begins like a formula.

    Numbers stay as they are, mappings are JSON, None is empty.
    """
    return "".join(",".join(map(_csv_cell, row)) + "\n" for row in rows)


def _csv_cell(value: object) -> str:
    if not isinstance(value, (str, dict, list)):
        return "" if value is None else str(value)
    text = printable(value) if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if text.lstrip()[:1] in tuple("=+-@＝＋－＠") and not _NUMBER.fullmatch(text):
        text = f"'{text}"
    return '"' + text.replace('"', '""') + '"' if re.search('[",;]', text) or text != text.strip() else text


def markdown(table: Table) -> str:
    """Return a table as GitHub's Markdown; text that would break the table is escaped."""
    columns = [escaped(c) for c in table.columns]
    body = [
        [f"**{escaped(c)}**" if (i, j) in table.bold else escaped(c) for j, c in enumerate(row)]
        for i, row in enumerate(table.body)
    ]
    widths = [max(len(row[i]) for row in [columns, *body]) for i in range(len(columns))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    parts = [f"### {printable(table.title)}", "", line(columns), rule, *map(line, body), ""]
    return "\n".join([*parts, printable(table.note), ""] if table.note else parts)


def escaped(text: str) -> str:
    """Return a text for a cell of a Markdown table."""
    return printable(text).replace("|", "\\|")


_TEX = {
    "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "±": r"$\pm$",
    "≈": r"$\approx$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip


def latex(table: Table) -> str:
    """Return LaTeX that needs booktabs, graphicx (a wide table is scaled to the line) and T1 fonts."""

    def cell(text: str, bold: bool = False) -> str:
        made = "".join(_TEX.get(c, c) for c in printable(text))
        made = made.replace("--", "-{}-")  # no dash: options are quoted here
        return rf"\textbf{{{made}}}" if bold else made

    sides = "".join("r" if number else "l" for number in table.numbers)
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
