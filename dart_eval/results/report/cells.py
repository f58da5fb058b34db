"""The cells of the boards, in the order of their rows, with the names that every section uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dart_eval.results.blocks import CONTROL, GUESSING, Board, BoardRow
from dart_eval.results.format import sparsity
from dart_eval.results.record import Record


@dataclass(frozen=True)
class ReportCell:
    """A record and its row of the board; `name` is the row's, with its sparsity."""

    record: Record
    row: BoardRow
    name: str

    @property
    def place(self) -> str:
        """The cell as a sentence."""
        return f"{self.name} on {self.record.inputs['task']}"

    @property
    def method(self) -> str:
        """The method that the page's filter knows; empty for dense, which always stays."""
        return "" if flat(self.row) else self.row.label


def cells_of(boards: Sequence[Board], records: Iterable[Record]) -> list[ReportCell]:
    """Return the cells of the boards."""
    by_key = {r.key: r for r in records}
    found = []
    for board in boards:
        model = f"{board.model}: " if len(boards) > 1 else ""
        for row in {row.keys: row for row in board.rows if row.kind != GUESSING}.values():
            name = model + (f"{row.label} {sparsity(row.sparsity)}" if row.sparsity else row.label)
            found += [ReportCell(by_key[key], row, name) for key in row.keys]
    return found


def flat(row: BoardRow) -> bool:
    """Whether the row is a level to compare the others with: a control that reads everything."""
    return row.kind == CONTROL and row.read == 1


def looks(cells: Iterable[ReportCell]) -> dict[str, int]:
    """Return label -> the number of its colour and marker, the same in all charts; dense has none.

    Methods with many cells come first, so that those which meet in most charts differ in colour.
    """
    counts = Counter(c.row.label for c in cells if not flat(c.row))
    return {name: i for i, name in enumerate(sorted(counts, key=lambda name: (-counts[name], name)))}
