"""The layout of a paper's tables: rows and columns as data, which `sweep.paper` reads from a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dart_eval.results.tables import flops_ratio
from dart_eval.util.text import Json

# Costs that a column can show -> their values in the frame of cells, the number of digits, and the unit.
FIELDS: dict[str, tuple[Callable[[pd.DataFrame], Any], int, str]] = {
    "state_mib": (lambda cells: cells["memory_state"] / 2**20, 3, " MiB"),
    "peak_mib": (lambda cells: cells["memory_peak"] / 2**20, 0, " MiB"),
    "overhead_percent": (lambda cells: 100 * cells["flops_overhead_share"], 4, " %"),
    "flops_per_token": (flops_ratio, 3, ""),
    "remasks_per_1000": (lambda cells: 1000 * cells["remasks"] / cells["tokens"].clip(lower=1), 2, " per 1,000 tokens"),
}
MEAN = "mean"
COLUMNS = ("method", "sparsity", "effective", "read")  # of every table, beside its own


@dataclass(frozen=True)
class PaperRow:
    """A method of a table.

    Attributes:
        label: for people. method, params: its name and all its parameters. prunes: whether it has a sparsity.
        asked: inputs of its cells that go before a column's, such as the scope.
        sparsity: the only blocks in which it stands; None: all, or the first one if it does not prune.
    """

    label: str
    method: str
    params: dict[str, Any]
    prunes: bool
    asked: Json = dataclasses.field(default_factory=dict)
    sparsity: tuple[float, ...] | None = None


@dataclass(frozen=True)
class PaperColumn:
    """A metric of one task or its mean over several, or a cost (`field`, a key of `FIELDS`).

    Attributes:
        asked: inputs of its cells, which a row's own go before.
        model: as the user named it; None: the run's.
    """

    head: str
    tasks: tuple[str, ...]
    metric: str = ""
    field: str = ""
    asked: Json = dataclasses.field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True)
class Reported:
    """Numbers of another publication: a label, their sparsity, values by column head, and their source.

    They were measured on another model or with another protocol, and enter no test.
    """

    label: str
    sparsity: float
    values: dict[str, float]
    source: str


@dataclass(frozen=True)
class TableLayout:
    """One table.

    Attributes:
        mean: whether a last column has the mean over the columns, which must then all be means of one direction.
        picture: whether the first column (the mean, if there is one) is drawn over the sparsities.
        absent: labels of rows that are of another model.
    """

    name: str
    title: str
    rows: tuple[PaperRow, ...]
    sparsity: tuple[float, ...]
    columns: tuple[PaperColumn, ...]
    mean: bool = False
    reported: tuple[Reported, ...] = ()
    note: str = ""
    picture: bool = False
    absent: tuple[str, ...] = ()

    @property
    def lines(self) -> list[tuple[int, float, PaperRow | Reported]]:
        """The lines with their blocks: unpruned rows first, then for each sparsity the pruned and reported rows."""
        lines: list[tuple[int, float, PaperRow | Reported]] = []
        for block, sparsity in enumerate((0.0, *self.sparsity)):
            rows: list[PaperRow | Reported] = [r for r in self.rows if self._stands(r, block, sparsity)]
            rows += [r for r in self.reported if rows and r.sparsity == sparsity]
            lines += [(block, sparsity, row) for row in rows]
        return lines

    @staticmethod
    def _stands(row: PaperRow, block: int, sparsity: float) -> bool:
        return row.prunes == (block > 0) if row.sparsity is None else block > 0 and sparsity in row.sparsity

    @property
    def parts(self) -> dict[str, tuple[PaperColumn, ...]]:
        """Head -> the columns behind its numbers: the column itself, or all of them for the mean."""
        return {**{c.head: (c,) for c in self.columns}, **({MEAN: self.columns} if self.mean else {})}

    @property
    def sources(self) -> list[str]:
        """The sources of reported numbers, each once."""
        return list(dict.fromkeys(reported.source for reported in self.reported))
