"""Tables of a paper: rows and columns are data; the best of a column is bold only where the paired test says so.

What a table looks like is a `Layout` (`dart_eval.paper` reads them from a file); the numbers come from the records and
samples of a results folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_eval.errors import UserError
from dart_eval.results import metrics, outcomes, stats
from dart_eval.results.format import sparsity as percent
from dart_eval.results.inputs import model_of
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.results.tables import cut_prompts
from dart_eval.results.writers import Table, csv_text

# Costs that a column may show: of a record, and with how many digits.
FIELDS: dict[str, tuple[Callable[[Record], float], int]] = {
    "state_mib": (lambda r: r.memory["state"] / 2**20, 3),
    "peak_mib": (lambda r: r.measured["peak"] / 2**20, 0),
    "overhead_percent": (lambda r: 100 * r.flops["overhead_share"], 4),
    "flops_per_token": (lambda r: r.flops["decode_step_pruned"] / r.flops["decode_step_dense"], 3),
    "remasks_per_1000": (lambda r: 1000 * r.remasks / r.tokens if r.tokens else 0.0, 2),
}
MEAN = "mean"


@dataclass(frozen=True)
class Row:
    """A method of a table: its label for people, its name, all its parameters, and whether it prunes."""

    label: str
    method: str
    params: dict[str, Any]
    prunes: bool


@dataclass(frozen=True)
class Column:
    """A metric over one task or the mean of several, or a cost (`field`, a key of `FIELDS`), as it was asked for."""

    head: str
    tasks: tuple[str, ...]
    metric: str = ""
    field: str = ""
    num_fewshot: int | None = None
    limit: int | None = None

    @property
    def scale(self) -> float:
        return 100.0 if metrics.of(self.metric).percent else 1.0


@dataclass(frozen=True)
class Reported:
    """Numbers of somebody else: a label, their sparsity, values by column head, and where they are from.

    They were measured on another model or with another protocol, and take part in no test.
    """

    label: str
    sparsity: float
    values: dict[str, float]
    source: str


@dataclass(frozen=True)
class Layout:
    """One table. `mean` adds the mean over the columns, which must then all be means of one direction."""

    name: str
    title: str
    rows: tuple[Row, ...]
    sparsity: tuple[float, ...]
    columns: tuple[Column, ...]
    mean: bool = False
    reported: tuple[Reported, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Value:
    """One number of a table, on the metric's own scale.

    Attributes:
        better: 1 where higher is better, -1 where lower is, 0 where neither.
        keys: of the records it is made from. shares: their weights, which sum to 1.
        p: of the best of its block only: largest Holm-adjusted p against the others. bold: it is below .05.
    """

    table: str
    row: Row
    sparsity: float
    column: Column
    value: float
    stderr: float | None
    n: int
    better: int
    keys: tuple[str, ...]
    shares: tuple[float, ...]
    p: float | None = None
    bold: bool = False


class Paper:
    """Fills layouts from a results folder.

    Args:
        store: the folder, for samples. records: its cells.
        missing: task -> why it could not be run.
        command: the line that makes the tables, for their provenance.

    Raises:
        UserError: the cells are of several models.
    """

    def __init__(self, store: Store, records: Sequence[Record], missing: Mapping[str, str], command: str) -> None:
        models = {json.dumps(r.inputs["model"], sort_keys=True): r.inputs["model"] for r in records}
        if len(models) > 1:
            named = ", ".join(sorted(map(model_of, models.values())))
            raise UserError(
                f"a paper's tables are of one model, not of {named}", "give each model an --output of its own"
            )
        self.store, self.missing, self.command = store, missing, command
        self._records = {_place(r.inputs): r for r in records}
        self._by_key = {r.key: r for r in records}
        self._outcomes: dict[str, outcomes.Outcome] = {}

    def table(self, layout: Layout) -> tuple[Table, list[Value]]:
        """The table for people, and its numbers."""
        columns = [*layout.columns, *([_mean_column(layout)] if layout.mean else [])]
        body: list[list[str]] = []
        bold: set[tuple[int, int]] = set()
        rules: set[int] = set()
        numbers: list[Value] = []
        for sparsity, rows in _blocks(layout):
            if body:
                rules.add(len(body))
            made = [[self._value(layout, row, sparsity, column) for column in columns] for row in rows]
            for i in range(len(columns)):
                best = self._best([line[i] for line in made])
                if best is not None:
                    place, value = best
                    made[place][i] = value
            for row, line in zip(rows, made, strict=True):
                bold |= {(len(body), 2 + i) for i, v in enumerate(line) if v is not None and v.bold}
                body.append([
                    row.label, percent(sparsity), *(_text(v) for v in line), *self._costs(line)
                ])  # fmt: skip
                numbers += [v for v in line if v is not None]
            for known in layout.reported:
                if known.sparsity == sparsity:
                    number = _sources(layout).index(known.source) + 1
                    given = [f"{c.scale * known.values[c.head]:.1f}" if c.head in known.values else "" for c in columns]
                    body.append([f"{known.label} [{number}]", percent(sparsity), *given, "", ""])
        heads = ["method", "sparsity", *(_head(c, numbers) for c in columns), "effective", "read"]
        return Table(layout.title, heads, body, self._note(layout, numbers), frozenset(bold), frozenset(rules)), numbers

    # -- numbers ---------------------------------------------------------------------------------------------

    def _value(self, layout: Layout, row: Row, sparsity: float, column: Column) -> Value | None:
        parts = list(layout.columns) if column.head == MEAN else [column]
        keys: list[str] = []
        shares: list[float] = []
        found: list[tuple[float, float | None, int, int]] = []
        for part in parts:
            for task in part.tasks:
                place = _place({
                    "method": row.method, "params": row.params, "sparsity": sparsity, "task": task,
                    "num_fewshot": part.num_fewshot, "limit": part.limit,
                })  # fmt: skip
                record = self._records.get(place)
                number = self._number(record, task, part) if record is not None else None
                if record is None or number is None:
                    return None
                keys.append(record.key)
                shares.append(1 / (len(parts) * len(part.tasks)))
                found.append(number)
        value = sum(w * f[0] for w, f in zip(shares, found, strict=True))
        errors = [(w * f[1]) ** 2 for w, f in zip(shares, found, strict=True) if f[1] is not None]
        stderr = math.sqrt(sum(errors)) if len(errors) == len(found) else None
        n, better = sum(f[2] for f in found), found[0][3]
        return Value(layout.name, row, sparsity, column, value, stderr, n, better, tuple(keys), tuple(shares))

    def _number(self, record: Record, task: str, column: Column) -> tuple[float, float | None, int, int] | None:
        """Value, standard error, n and direction."""
        if column.field:
            return FIELDS[column.field][0](record), None, 0, 0
        for m in record.metrics:
            if m.task == task and m.metric == column.metric:
                return m.value, m.stderr, m.n, 0 if m.higher_is_better is None else 1 if m.higher_is_better else -1
        return None

    def _costs(self, line: Sequence[Value | None]) -> list[str]:
        """Effective sparsity and weights read, mean over the cells of a line."""
        cells = [self._by_key[k] for k in dict.fromkeys(k for v in line if v is not None for k in v.keys)]
        if not cells:
            return ["-", "-"]
        return [
            f"{sum(c) / len(cells):.3f}"
            for c in ([r.effective_sparsity for r in cells], [r.weights_read for r in cells])
        ]

    # -- which is best ---------------------------------------------------------------------------------------

    def _best(self, values: Sequence[Value | None]) -> tuple[int, Value] | None:
        """Place of the best pruned row of a column, marked with its p; None where there is nothing to compare."""
        rivals = [(i, v) for i, v in enumerate(values) if v is not None and v.row.prunes and v.better]
        if len(rivals) < 2 or any(math.isnan(v.value) for _, v in rivals):
            return None
        place, best = max(rivals, key=lambda r: r[1].better * r[1].value)
        tests = [self._test(best, other) for i, other in rivals if i != place]
        if any(t is None for t in tests):
            return None
        adjusted = [p for p in stats.holm(tests) if p is not None]
        return place, dataclasses.replace(best, p=max(adjusted), bold=max(adjusted) < stats.ALPHA)

    def _test(self, a: Value, b: Value) -> float | None:
        """Two-sided p of the paired test between two values of a column."""
        left, right = ([self._outcome(k) for k in v.keys] for v in (a, b))
        measures = [self._measure(k, a) for k in a.keys]
        if None in measures:
            return None
        chosen = [m for m in measures if m is not None]
        if len(chosen) == 1:
            result = outcomes.contrast(chosen[0], left[0], right[0])
        else:
            result = outcomes.contrast_of_means(chosen, left, right, a.shares)
        return None if result is None else result.p

    def _measure(self, key: str, value: Value) -> outcomes.Measure | None:
        """The measure of one of a value's cells."""
        task, metric = self._by_key[key].inputs["task"], value.column.metric
        return next((m for m in self._outcome(key).measures if m.task == task and m.metric == metric), None)

    def _outcome(self, key: str) -> outcomes.Outcome:
        if key not in self._outcomes:
            record = self._by_key[key]
            self._outcomes[key] = outcomes.outcome(record, self.store.samples(record))
        return self._outcomes[key]

    # -- words -----------------------------------------------------------------------------------------------

    def _note(self, layout: Layout, numbers: Sequence[Value]) -> str:
        parts = []
        if any(v.stderr is not None for v in numbers):
            parts += [
                "Value ± standard error.",
                "Bold: better than every other pruned row of its sparsity by the paired test, Holm-adjusted p < .05.",
            ]
        if any(v.column.scale != 1 for v in numbers):
            parts.append("Accuracies and similarities are in per cent.")
        if layout.mean:
            parts.append("mean: over the columns, each weighs the same.")
        parts.append(
            "effective: share of the FFN weights that tokens did not read, dense ones included. read: share that a "
            "pruned token reads. Both are means over the row's cells."
        )
        if layout.note:
            parts.append(layout.note)
        tasks = {t for c in layout.columns for t in c.tasks}
        parts += [f"{task}: not measured ({reason})." for task, reason in self.missing.items() if task in tasks]
        parts += cut_prompts([self._by_key[k] for k in dict.fromkeys(k for v in numbers for k in v.keys)])
        parts += [f"[{i + 1}] reported, not ours: {source}." for i, source in enumerate(_sources(layout))]
        return " ".join([*parts, self._provenance(numbers)])

    def _provenance(self, numbers: Sequence[Value]) -> str:
        """One line: model, versions, code, date and command."""
        wanted = {k for v in numbers for k in v.keys}
        records = sorted((r for r in self._records.values() if r.key in wanted), key=lambda r: r.created)
        if not records:
            return "Nothing was measured."
        last = records[-1]
        model, env = last.inputs["model"], last.environment
        which = model["revision"] or (model["weights"] or "")[:8]
        codes = sorted({r.inputs["code"][:8] for r in records})
        seeds = sorted({r.inputs["seed"] for r in records})
        devices = sorted({r.environment.get("gpu", r.inputs["device"]) for r in records})
        versions = ", ".join(
            f"{name} {env[name]}" for name in ("dart-eval", "torch", "transformers", "lm_eval") if name in env
        )
        return (
            f"Made of {len(records)} cells: model {model['name']} ({which}), {last.inputs['dtype']} on "
            f"{' and '.join(devices)}, scope {last.inputs['scope']}, "
            f"seed {', '.join(map(str, seeds))}, {versions}, "
            f"code {', '.join(codes)}, {records[0].created[:10]} to {last.created[:10]}: {self.command}"
        )


def _place(inputs: Mapping[str, Any]) -> str:
    """What finds a record: how its cell was asked."""
    return json.dumps(
        [inputs[k] for k in ("method", "params", "sparsity", "task", "num_fewshot", "limit")], sort_keys=True
    )


def _blocks(layout: Layout) -> list[tuple[float, list[Row]]]:
    """Rows that do not prune first, then the others at each sparsity."""
    blocks = [(0.0, [r for r in layout.rows if not r.prunes])]
    blocks += [(s, [r for r in layout.rows if r.prunes]) for s in layout.sparsity]
    return [b for b in blocks if b[1]]


def _sources(layout: Layout) -> list[str]:
    return list(dict.fromkeys(known.source for known in layout.reported))


def _mean_column(layout: Layout) -> Column:
    return Column(MEAN, tuple(t for c in layout.columns for t in c.tasks), layout.columns[0].metric)


def _head(column: Column, numbers: Sequence[Value]) -> str:
    sizes = {v.n for v in numbers if v.column is column or v.column == column}
    return (
        f"{column.head} (n={sizes.pop()})" if len(sizes) == 1 and column.metric and column.head != MEAN else column.head
    )


def _text(made: Value | None) -> str:
    if made is None:
        return "-"
    if made.column.field:
        return f"{made.value:.{FIELDS[made.column.field][1]}f}"
    value = made.column.scale * made.value
    digits = 1 if abs(value) >= 10 or made.column.scale != 1 else 2
    text = f"{value:.{digits}f}"
    return text if made.stderr is None else f"{text} ± {made.column.scale * made.stderr:.{digits}f}"


def to_csv(numbers: Sequence[Value]) -> str:
    """Every number in full precision, one per line."""
    heads = [
        "table", "row", "method", "params", "sparsity", "column", "tasks", "metric", "value", "stderr", "n", "p",
        "bold",
    ]  # fmt: skip
    body = [
        [
            v.table, v.row.label, v.row.method, v.row.params, v.sparsity, v.column.head, "+".join(v.column.tasks),
            v.column.metric or v.column.field, v.value, v.stderr, v.n, v.p, v.bold,
        ]
        for v in numbers
    ]  # fmt: skip
    return csv_text([heads, *body])
