"""The one writer: a table for a terminal, in Markdown or LaTeX (booktabs), and its data as CSV or JSON."""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import rich.table
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from dart_eval.util.text import folded, json_text, printable

if TYPE_CHECKING:
    import pandas as pd

Format = Callable[[Any], str]
Columns = Mapping[str, tuple[str, Format]]  # head -> the frame's column, and the format of a value
PLAIN_WIDTH = 100  # characters of a line where there is no terminal
LINE = ("model", "task", "method", "claim", "cell", "cells", "sparsity", "FFN bytes\nread", "")  # they identify a line
NAMES = ("method", "claim", "cell", "cells")  # columns that may go over several lines
NUMBER = re.compile(r"-|[+-][\d.]+(e[+-]?\d+)?", re.IGNORECASE)  # with a sign, or a gap
SHORTEST = 16  # characters of such a line


@dataclass(frozen=True)
class Table:
    """A table for readers.

    Attributes:
        columns: heads, each in one or two lines.
        body: cells as text.
        notes: sentences under it.
        bold: (row, column) of bold cells.
        rules: rows below a horizontal line in LaTeX.
        data: the numbers behind it in full precision, a row a line or finer; None: the texts.
        first_out: heads of columns that leave first where the terminal is too narrow; then the last one goes.
        narrow: head -> shorter texts of a column, for a narrow terminal.
    """

    title: str
    columns: list[str]
    body: list[list[str]]
    notes: Sequence[str] = ()
    bold: frozenset[tuple[int, int]] = frozenset()
    rules: frozenset[int] = frozenset()
    data: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    first_out: Sequence[str] = ()
    narrow: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def numbers(self) -> list[bool]:
        """Whether each column has only numbers and gaps, and is aligned right."""
        return [all(not row[j] or row[j][0] in "-+.0123456789<" for row in self.body) for j in range(len(self.columns))]

    def without(self, head: str) -> Table:
        """Return the table without a column."""
        j = self.columns.index(head)
        bold = frozenset((i, k - (k > j)) for i, k in self.bold if k != j)
        body = [[*row[:j], *row[j + 1 :]] for row in self.body]
        return replace(self, columns=[*self.columns[:j], *self.columns[j + 1 :]], body=body, bold=bold)

    def with_column(self, head: str, texts: Sequence[str]) -> Table:
        """Return the table with other texts in a column."""
        j = self.columns.index(head)
        body = [[*row[:j], text, *row[j + 1 :]] for row, text in zip(self.body, texts, strict=True)]
        return replace(self, body=body)


def table(
    title: str, frame: pd.DataFrame, columns: Columns, notes: Sequence[str] = (), if_different: Collection[str] = ()
) -> Table:
    """Return the table of a frame, a row a line, with a dash for missing values.

    Args:
        if_different: heads of columns that move into the notes if all lines have one value.
    """
    gaps = [None] * len(frame)
    texts = {
        head: ["-" if v is None or v != v else form(v) for v in frame.get(name, gaps)]
        for head, (name, form) in columns.items()
    }
    same = [head for head in if_different if len(frame) > 1 and len(set(texts[head])) == 1]
    if same:
        notes = [f"In all rows: {', '.join(f'{head} {texts.pop(head)[0]}' for head in same)}.", *notes]
    return Table(title, list(texts), [list(row) for row in zip(*texts.values(), strict=True)], notes, data=frame)


# -- for a terminal ----------------------------------------------------------------------------------------------------


def show(*tables: Table) -> None:
    """Print tables on the terminal, or `PLAIN_WIDTH` characters wide where there is none."""
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    for i, one in enumerate(tables):
        if i:
            console.print()
        _print(one, console)


def _print(table: Table, console: Console) -> None:
    """Print a table, without the columns for which there is no room; it says which."""
    for line in _wrapped(table.title, console.width):
        console.print(Text(line))
    table, out = _fitted(table, console.width) if table.body else (table, [])
    drawn = rich.table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head, number in zip(table.columns, table.numbers, strict=True):
        drawn.add_column(Text(printable(head, lines=True)), justify="right" if number else "left", no_wrap=True)
    for i, row in enumerate(table.body):
        cells = (printable(cell, lines=True) for cell in row)
        drawn.add_row(*(Text(cell, "bold" if (i, j) in table.bold else "") for j, cell in enumerate(cells)))
    if table.body:
        wide = max(console.width, _width(table))
        Console(highlight=False, emoji=False, width=wide, soft_wrap=True).print(drawn)
    for note in [*([f"No room for {', '.join(out)}: --format md has all columns."] if out else []), *table.notes]:
        for line in _wrapped(note, console.width):
            console.print(Text(line, "dim"))


def _wrapped(text: str, width: int) -> list[str]:
    """Wrap a text without separating a number from its per cent."""
    tied = printable(text).replace(" %", "\u00a0%").replace("p < ", "p\u00a0<\u00a0")
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(tied, width, break_on_hyphens=False)]


def _fitted(table: Table, width: int) -> tuple[Table, list[str]]:
    """Return a table that fits into a width, if possible, and the heads of the columns that had to leave it."""
    out: list[str] = []

    def drop(head: str) -> None:
        nonlocal table
        if _width(table) > width and head in table.columns:
            table = table.without(head)
            out.append(" ".join(head.split()))

    for head in table.first_out:
        drop(head)
    for head, texts in table.narrow.items():
        if _width(table) > width and head in table.columns:
            table = table.with_column(head, texts)
    for head in (head for head in table.columns if head in NAMES):
        over, texts = _width(table) - width, [row[table.columns.index(head)] for row in table.body]
        if over > 0:
            most = max(SHORTEST, max(map(cell_len, texts)) - over)
            table = table.with_column(head, ["\n".join(folded(text, most)) for text in texts])
    for head in reversed([head for head in table.columns if head not in LINE]):
        if len(table.columns) > 1 + sum(head in LINE for head in table.columns):
            drop(head)
    return table, out


def _width(table: Table) -> int:
    """Return the characters of a table's lines: the widest text of each column, and a gap."""
    columns = zip(table.columns, *table.body, strict=True)
    return sum(2 + max(cell_len(line) for text in column for line in text.split("\n")) for column in columns)


# -- as text -----------------------------------------------------------------------------------------------------------


def render(tables: Sequence[Table], form: str) -> str:
    """Return tables as `md` or `tex`, or the data of the first one, which all share, as `csv` or `json`."""
    if form in ("csv", "json"):
        import pandas as pd  # slow to import: not for `--help`

        first = tables[0]
        return data_text(pd.DataFrame(first.body, columns=first.columns) if first.data is None else first.data, form)
    return "\n".join(map(markdown if form == "md" else latex, tables))


def data_text(frame: pd.DataFrame, form: str) -> str:
    """Return a frame as csv or json in full precision; what is missing or no number is empty or null."""
    import pandas as pd  # slow to import: not for `--help`

    if form == "json":
        return json_text(finite(frame.astype(object).to_dict("records"))) + "\n"
    rows = [[*map(_csv_value, row)] for row in frame.itertuples(index=False, name=None)]
    plain = pd.DataFrame(rows, columns=[*map(_csv_value, frame.columns)], dtype=object)
    return plain.to_csv(index=False, lineterminator="\n")


def _csv_value(value: object) -> object:
    """Return a value for CSV; an apostrophe precedes text that a spreadsheet would take for a formula."""
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True)
    if not isinstance(value, str):
        return value
    text = printable(value)
    is_formula = text.lstrip()[:1] in tuple("=+-@＝＋－＠") and not NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text


def finite(value: object) -> object:
    """Replace NaN and infinity by None, since JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def escaped(text: str) -> str:
    """Return a text for a cell of a Markdown table."""
    return " ".join(printable(text).split()).replace("|", "\\|")


def markdown(table: Table) -> str:
    """Return a table as GitHub's Markdown; text that would break the table is escaped."""
    body = [[f"**{escaped(c)}**" if (i, j) in table.bold else escaped(c) for j, c in enumerate(row)]
            for i, row in enumerate(table.body)]  # fmt: skip
    rows = [[escaped(head) for head in table.columns], *body]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *rest = ("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    lines = [head, rule, *rest, ""] if table.body else []
    note = printable(" ".join(table.notes))
    return "\n".join([f"### {printable(table.title)}", "", *lines, *([note, ""] if note else [])])


_TEX = str.maketrans({
    "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "±": r"$\pm$",
    "≈": r"$\approx$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
})  # fmt: skip


def latex(table: Table) -> str:
    """Return LaTeX that needs booktabs, graphicx (a wide table is scaled to the line) and T1 fonts."""

    def cell(text: str, bold: bool = False) -> str:
        plain = printable(text).translate(_TEX).replace("--", "-{}-")  # no dash: options are quoted here
        return rf"\textbf{{{plain}}}" if bold else plain

    lines = []
    for i, row in enumerate(table.body):
        lines += [r"\midrule"] if i in table.rules else []
        lines.append(" & ".join(cell(c, (i, j) in table.bold) for j, c in enumerate(row)) + r" \\")
    sides, note = "".join("r" if number else "l" for number in table.numbers), cell(" ".join(table.notes))
    parts = [
        r"\begin{table}", r"\centering", rf"\caption{{{cell(table.title)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{sides}}}", r"\toprule",
        " & ".join(map(cell, table.columns)) + r" \\", r"\midrule", *lines, r"\bottomrule", r"\end{tabular}}",
        *([rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {note}}}"] if note else []),
        r"\end{table}", "",
    ]  # fmt: skip
    return "\n".join(parts)
