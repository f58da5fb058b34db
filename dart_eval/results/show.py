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

from dart_eval.util.text import json_text, printable

if TYPE_CHECKING:
    import pandas as pd

Format = Callable[[Any], str]
Columns = Mapping[str, tuple[str, Format]]  # head -> the frame's column, and the format of a value
PLAIN_WIDTH = 100  # characters of a line where there is no terminal
LINE = ("model", "task", "method", "claim", "cell", "cells", "sparsity", "FFN bytes\nread", "")  # they identify a line
NAMES = ("method", "claim", "cell", "cells")  # columns that may go over several lines
SHORTEST = 16  # characters of such a line


@dataclass(frozen=True)
class Table:
    """A table for readers."""

    title: str
    columns: list[str]  # heads, each in one or two lines
    body: list[list[str]]
    notes: Sequence[str] = ()  # sentences under it
    bold: frozenset[tuple[int, int]] = frozenset()  # (row, column) of bold cells
    data: pd.DataFrame | None = field(default=None, repr=False, compare=False)  # numbers behind it; None: the texts
    spare: int = 0  # the last columns, which leave a terminal that is too narrow before the ends of intervals do

    @property
    def numbers(self) -> list[bool]:
        """Whether each column has only numbers and gaps, and is aligned right."""
        return [all(not row[j] or row[j][0] in "-+.0123456789<" for row in self.body) for j in range(len(self.columns))]

    def fitted(self, width: int) -> tuple[Table, list[str]]:
        """Return a table that fits into a width, if possible, and the heads of the columns that left it.

        Columns leave from the right: first the spare ones, then the ends of intervals, then others. Those that
        identify a line stay, and names go over several lines.
        """
        texts = {head: [row[j] for row in self.body] for j, head in enumerate(self.columns)}
        leaving = [head for head in reversed(self.columns) if head not in LINE]
        out: list[str] = []

        def over() -> int:
            lines = ([line for text in (head, *texts[head]) for line in text.split("\n")] for head in texts)
            return sum(2 + max(map(cell_len, column)) for column in lines) - width

        def drop(heads: Sequence[str]) -> None:
            for head in heads:
                if over() > 0:
                    del texts[head]
                    out.append(" ".join(head.split()))

        drop(leaving[: self.spare])
        if over() > 0:
            for head in [head for head, number in zip(self.columns, self.numbers, strict=True) if number]:
                if any(" [" in text for text in texts.get(head, ())):
                    texts[head] = [re.sub(r" \[.*\]", "", text) for text in texts[head]]
                    out.append("ends of intervals")
        for head in texts:
            if head in NAMES and (more := over()) > 0:
                most = max(SHORTEST, max(map(cell_len, texts[head])) - more)
                texts[head] = ["\n".join(folded(text, most)) for text in texts[head]]
        drop(leaving[self.spare : -1])
        bold = frozenset((i, [*texts].index(head)) for i, j in self.bold if (head := self.columns[j]) in texts)
        return replace(self, columns=[*texts], body=[*map(list, zip(*texts.values(), strict=True))], bold=bold), out


def folded(name: str, width: int) -> list[str]:
    """Break a cell's name into lines of about `width` characters, between parameters of a method and at spaces."""
    lines = [""]
    for part in re.findall(r":?[^: ]+ ?|[: ]", printable(name)):
        if lines[-1].strip() and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("  ")
        lines[-1] += part
    return [line.rstrip() for line in lines]


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


def show(*tables: Table) -> None:
    """Print tables on the terminal, or `PLAIN_WIDTH` characters wide where there is none, without what has no room."""
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)

    def write(text: str, style: str = "") -> None:
        tied = printable(text).replace(" %", "\u00a0%").replace("p < ", "p\u00a0<\u00a0")  # no break before a per cent
        for line in textwrap.wrap(tied, console.width, break_on_hyphens=False):
            console.print(Text(line.replace("\u00a0", " "), style))

    for i, one in enumerate(tables):
        if i:
            console.print()
        write(one.title)
        fitted, out = one.fitted(console.width) if one.body else (one, [])
        drawn = rich.table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for head, number in zip(fitted.columns, fitted.numbers, strict=True):
            drawn.add_column(Text(printable(head, lines=True)), justify="right" if number else "left", no_wrap=True)
        for row, texts in enumerate(fitted.body):
            cells = (printable(text, lines=True) for text in texts)
            drawn.add_row(*(Text(cell, "bold" if (row, j) in fitted.bold else "") for j, cell in enumerate(cells)))
        if fitted.body:
            console.print(drawn, soft_wrap=True)
        for note in [*([f"No room for {', '.join(out)}: --format md has all columns."] if out else []), *one.notes]:
            write(note, "dim")


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

    def plain(value: object) -> object:
        if isinstance(value, (dict, list)):
            return json.dumps(value, sort_keys=True)
        return printable(value) if isinstance(value, str) else value

    rows = [[*map(plain, row)] for row in frame.itertuples(index=False, name=None)]
    columns = [*map(plain, frame.columns)]
    return pd.DataFrame(rows, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n")


def finite(value: object) -> object:
    """Replace NaN and infinity by None, since JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def escaped(text: str) -> str:
    """Return a text for Markdown that makes no cell, tag, link or picture of it."""
    return re.sub(r"\||<(?=[A-Za-z/!?])|(?<=\])\(", r"\\\g<0>", " ".join(printable(text).split()))


def markdown(table: Table) -> str:
    """Return a table as GitHub's Markdown; text that would break the table is escaped."""
    rows = [[*map(escaped, table.columns)]]
    for i, row in enumerate(table.body):
        rows.append([f"**{escaped(c)}**" if (i, j) in table.bold else escaped(c) for j, c in enumerate(row)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    note = escaped(" ".join(table.notes))
    parts = [f"### {escaped(table.title)}", "", *([*lines, ""] if table.body else []), *([note, ""] if note else [])]
    return "\n".join(parts)


_TEX = str.maketrans({
    "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "±": r"$\pm$",
    "≈": r"$\approx$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
})  # fmt: skip


def latex(table: Table) -> str:
    """Return LaTeX that needs booktabs and T1 fonts."""

    def line(texts: Sequence[str], row: int = -1) -> str:
        plain = [printable(text).translate(_TEX).replace("--", "-{}-") for text in texts]  # options, no dashes
        return " & ".join(rf"\textbf{{{text}}}" if (row, j) in table.bold else text for j, text in enumerate(plain))

    note = " ".join(table.notes)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{line([table.title])}}}",
        rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in table.numbers)}}}", r"\toprule",
        line(table.columns) + r" \\", r"\midrule", *(line(row, i) + r" \\" for i, row in enumerate(table.body)),
        r"\bottomrule", r"\end{tabular}", *([rf"\par\footnotesize {line([note])}"] if note else []), r"\end{table}", "",
    ])  # fmt: skip
