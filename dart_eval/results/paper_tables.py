"""Tables of a paper: rows and columns are data; the best of a column is bold only where the paired test says so.

A `TableLayout` describes a table (`sweep.paper` reads layouts from a file); the numbers come from the records and
samples of a results folder.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dart_eval.results import metrics, outcomes, pairing, stats
from dart_eval.results.format import number, share, short
from dart_eval.results.format import sparsity as percent
from dart_eval.results.frame import compared
from dart_eval.results.inputs import identity, model_of
from dart_eval.results.record import Record
from dart_eval.results.rows import cells_frame, metrics_frame, rows
from dart_eval.results.store import Store
from dart_eval.results.tables import cut_prompts, flops_ratio
from dart_eval.results.writers import Table, csv_text
from dart_eval.util.errors import UserError

# Costs that a column can show -> their values in the frame of cells, and the number of digits.
FIELDS: dict[str, tuple[Callable[[pd.DataFrame], Any], int]] = {
    "state_mib": (lambda cells: cells["memory_state"] / 2**20, 3),
    "peak_mib": (lambda cells: cells["memory_peak"] / 2**20, 0),
    "overhead_percent": (lambda cells: 100 * cells["flops_overhead_share"], 4),
    "flops_per_token": (flops_ratio, 3),
    "remasks_per_1000": (lambda cells: 1000 * cells["remasks"] / cells["tokens"].clip(lower=1), 2),
}
MEAN = "mean"
PLACE = ["line", "column"]  # of a number
CSV = ("table", "row", "method", "params", "sparsity", "column", "tasks", "metric", "value", "stderr", "n", "p", "bold")


@dataclass(frozen=True)
class PaperRow:
    """A method of a table: its label for people, its name, all its parameters, and whether it prunes."""

    label: str
    method: str
    params: dict[str, Any]
    prunes: bool


@dataclass(frozen=True)
class PaperColumn:
    """A metric of one task or its mean over several, or a cost (`field`, a key of `FIELDS`), as requested."""

    head: str
    tasks: tuple[str, ...]
    metric: str = ""
    field: str = ""
    num_fewshot: int | None = None
    limit: int | None = None


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
    """One table. `mean` adds the mean over the columns, which must then all be means of one direction."""

    name: str
    title: str
    rows: tuple[PaperRow, ...]
    sparsity: tuple[float, ...]
    columns: tuple[PaperColumn, ...]
    mean: bool = False
    reported: tuple[Reported, ...] = ()
    note: str = ""

    @property
    def lines(self) -> list[tuple[int, float, PaperRow | Reported]]:
        """The lines with their blocks: unpruned rows first, then for each sparsity the pruned and reported rows."""
        lines: list[tuple[int, float, PaperRow | Reported]] = []
        for block, sparsity in enumerate((0.0, *self.sparsity)):
            rows: list[PaperRow | Reported] = [r for r in self.rows if r.prunes == (block > 0)]
            rows += [r for r in self.reported if rows and r.sparsity == sparsity]
            lines += [(block, sparsity, row) for row in rows]
        return lines

    @property
    def parts(self) -> dict[str, tuple[PaperColumn, ...]]:
        """Head -> the columns behind its numbers: the column itself, or all of them for the mean."""
        return {**{c.head: (c,) for c in self.columns}, **({MEAN: self.columns} if self.mean else {})}

    @property
    def sources(self) -> list[str]:
        """The sources of reported numbers, each once."""
        return list(dict.fromkeys(reported.source for reported in self.reported))


class Paper:
    """Fills layouts from a results folder.

    Args:
        store: the folder, for samples.
        records: its cells.
        missing: task -> the reason why it could not run.
        command: the command line that writes the tables, for their provenance.

    Raises:
        UserError: the cells are of several models.
    """

    def __init__(self, store: Store, records: Sequence[Record], missing: Mapping[str, str], command: str) -> None:
        models = {json.dumps(r.inputs["model"], sort_keys=True): model_of(r.inputs["model"]) for r in records}
        if len(models) > 1:
            named = ", ".join(sorted(models.values()))
            remedy = "give each model an --output of its own"
            raise UserError(f"a paper's tables are of one model, not of {named}", remedy)
        self.missing, self.command = missing, command
        self._records = {r.key: r for r in records}
        self._common = records[0].inputs  # the inputs that all cells share come from here
        self._metrics, self._cells = metrics_frame(rows(records)), cells_frame(records).set_index("key")
        self._metrics["better"] = self._metrics["higher_is_better"].map({True: 1, False: -1}).fillna(0)
        self._samples = {r.key: outcomes.cell_of(store, r) for r in records}

    def table(self, layout: TableLayout) -> tuple[Table, pd.DataFrame]:
        """Return the table for people, and its numbers: one a row, with the columns of `CSV`."""
        numbers = self._with_best(self._numbers(layout))
        lines, heads = layout.lines, list(layout.parts)
        texts = numbers.pivot(index="line", columns="column", values="text").join(self._costs(numbers))
        texts = texts.reindex(range(len(lines)), columns=[*heads, "effective", "read"]).fillna("-")
        body = []
        for (_, sparsity, line), line_texts in zip(lines, texts.to_numpy().tolist(), strict=True):
            if isinstance(line, PaperRow):
                body.append([line.label, percent(sparsity), *line_texts])
                continue
            values = line.values
            cells = [short(layout.parts[h][0].metric, values[h], None) if h in values else "" for h in heads]
            label = f"{line.label} [{layout.sources.index(line.source) + 1}]"
            body.append([label, percent(sparsity), *cells, "", ""])
        sizes = numbers[(numbers["n"] > 0) & (numbers["column"] != MEAN)].groupby("column")["n"].agg(set)
        counted = [f"{h} (n={min(sizes[h])})" if h in sizes and len(sizes[h]) == 1 else h for h in heads]
        best = numbers[numbers["bold"]]
        bold = {(line, 2 + heads.index(head)) for line, head in zip(best["line"], best["column"], strict=True)}
        rules = {i for i in range(1, len(lines)) if lines[i][0] != lines[i - 1][0]}
        columns = ["method", "sparsity", *counted, "effective", "read"]
        note = self._note(layout, numbers)
        return Table(layout.title, columns, body, note, frozenset(bold), frozenset(rules)), numbers

    # -- numbers ---------------------------------------------------------------------------------------------

    def _numbers(self, layout: TableLayout) -> pd.DataFrame:
        """Return the computable numbers of a layout, each a mean over the cells `key`, weighted by `share`."""
        fields = {c.field: FIELDS[c.field][0](self._cells) for c in layout.columns if c.field}
        costs = [
            self._cells[["task"]].assign(metric=name, value=v, n=0, better=0).reset_index()
            for name, v in fields.items()
        ]
        measured = pd.concat([self._metrics, *costs])[["key", "task", "metric", "value", "stderr", "n", "better"]]
        terms = self._wanted(layout).merge(measured, "left", on=["key", "task", "metric"])
        complete = terms["n"].notna().groupby([terms[name] for name in PLACE]).transform("all")
        weighted = {"value": terms["share"] * terms["value"], "stderr": (terms["share"] * terms["stderr"]) ** 2}
        by = terms[complete].assign(**weighted).groupby(PLACE, sort=False)
        numbers = by.first().assign(
            value=by["value"].agg(_sum), stderr=by["stderr"].agg(_sum) ** 0.5, n=by["n"].sum().astype(int),
            **{name: by[name].agg(tuple) for name in ("key", "share", "task")},
        ).reset_index()  # fmt: skip
        numbers["text"] = [_text(*v) for v in zip(numbers["metric"], numbers["value"], numbers["stderr"], strict=True)]
        return numbers.assign(tasks=numbers["task"].map("+".join))

    def _wanted(self, layout: TableLayout) -> pd.DataFrame:
        """Return the cells that each number of a layout needs, a row each, with key None for a missing cell."""
        keys = {identity(r.inputs): key for key, r in self._records.items()}
        wanted: list[dict[str, Any]] = []
        lines = [(i, block, s, row) for i, (block, s, row) in enumerate(layout.lines) if isinstance(row, PaperRow)]
        for (line, block, sparsity, row), (head, parts) in itertools.product(lines, layout.parts.items()):
            for part, task in ((p, t) for p in parts for t in p.tasks):
                cell = {"method": row.method, "params": row.params, "sparsity": sparsity, "task": task}
                how = {"num_fewshot": part.num_fewshot, "limit": part.limit}
                wanted.append({
                    "table": layout.name, "row": row.label, **cell, "column": head, "line": line, "block": block,
                    "metric": part.metric or part.field, "share": 1 / (len(parts) * len(part.tasks)),
                    "prunes": row.prunes, "key": keys.get(identity({**self._common, **cell, **how})),
                })  # fmt: skip
        return pd.DataFrame(wanted)

    def _costs(self, numbers: pd.DataFrame) -> pd.DataFrame:
        """Return effective sparsity and weights read of each line, means over its cells, as text."""
        names = {"effective_sparsity": "effective", "weights_read": "read"}
        cells = numbers[["line", "key"]].explode("key").drop_duplicates().join(self._cells[list(names)], on="key")
        means = cells.groupby("line")[list(names)].mean().rename(columns=names)
        return means.apply(lambda column: column.map(lambda mean: share(mean, 3)))

    # -- which is best ---------------------------------------------------------------------------------------

    def _with_best(self, numbers: pd.DataFrame) -> pd.DataFrame:
        """Return the numbers with `p` and `bold` set for the best pruned number of each column.

        `p` is its largest p against the other numbers, after Holm; it is bold if `p` is below `stats.ALPHA`.
        """
        numbers = numbers.assign(p=float("nan"), bold=False)
        for _, rivals in numbers[numbers["prunes"] & (numbers["better"] != 0)].groupby(["block", "column"]):
            if len(rivals) < 2 or rivals["value"].isna().any():
                continue
            best = (rivals["better"] * rivals["value"]).idxmax()
            tests = [self._test(rivals.loc[best], other) for i, other in rivals.iterrows() if i != best]
            if None not in tests:
                p = max(p for p in stats.holm(tests) if p is not None)
                numbers.loc[best, ["p", "bold"]] = p, p < stats.ALPHA
        return numbers

    def _test(self, a: pd.Series, b: pd.Series) -> float | None:
        """Return the two-sided p of the paired test between two numbers of a column."""
        tasks = []
        for task, ours, theirs in zip(a["task"], a["key"], b["key"], strict=True):
            pair = pairing.pair(self._samples[ours], self._samples[theirs])
            measures = [m for m in pair.x.measures if (m.task, m.metric) == (task, a["metric"])]
            tasks += [one.pairs for one in compared(pair, measures[:1])]
        joined = outcomes.mean_of(tasks, a["share"]) if len(tasks) == len(a["task"]) else None
        return None if joined is None else joined.test().p

    # -- words -----------------------------------------------------------------------------------------------

    def _note(self, layout: TableLayout, numbers: pd.DataFrame) -> str:
        parts = []
        if numbers["stderr"].notna().any():
            parts += [
                "Value ± standard error.",
                "Bold: better than every other pruned row of its sparsity by the paired test, Holm-adjusted p < .05.",
            ]
        if any(metrics.kind_of(name).percent for name in numbers["metric"]):
            parts.append("Accuracies and similarities are in per cent.")
        if layout.mean:
            parts.append("mean: over the columns, each weighs the same.")
        parts.append(
            "effective: share of the FFN weights that tokens did not read, dense ones included. read: share that a "
            "pruned token reads. Both are means over the row's cells."
        )
        if layout.note:
            parts.append(layout.note)
        tasks = {task for column in layout.columns for task in column.tasks}
        parts += [f"{task}: not measured ({reason})." for task, reason in self.missing.items() if task in tasks]
        records = [self._records[key] for key in dict.fromkeys(key for keys in numbers["key"] for key in keys)]
        parts += cut_prompts(records)
        parts += [f"[{i + 1}] reported, not ours: {source}." for i, source in enumerate(layout.sources)]
        return " ".join([*parts, self._provenance(records)])

    def _provenance(self, records: Sequence[Record]) -> str:
        """Return a line with model, versions, code, dates and command."""
        if not records:
            return "Nothing was measured."
        records = sorted(records, key=lambda r: r.created)
        last = records[-1]
        model, env = last.inputs["model"], last.environment
        which = model["revision"] or (model["weights"] or "")[:8]
        codes, seeds = (sorted({str(r.inputs[name])[:8] for r in records}) for name in ("code", "seed"))
        devices = sorted({r.environment.get("gpu", r.inputs["device"]) for r in records})
        versions = [f"{name} {env[name]}" for name in ("dart-eval", "torch", "transformers", "lm_eval") if name in env]
        return (
            f"Made of {len(records)} cells: model {model['name']} ({which}), {last.inputs['dtype']} on "
            f"{' and '.join(devices)}, scope {last.inputs['scope']}, seed {', '.join(seeds)}, {', '.join(versions)}, "
            f"code {', '.join(codes)}, {records[0].created[:10]} to {last.created[:10]}: {self.command}"
        )


def _sum(values: pd.Series) -> float:
    """Return a sum that is NaN if a term is missing."""
    return float(values.sum(skipna=False))


def _text(metric: str, value: float, stderr: float) -> str:
    return number(value, FIELDS[metric][1]) if metric in FIELDS else short(metric, value, stderr)


def to_csv(numbers: pd.DataFrame) -> str:
    """Return every number in full precision, one a line."""
    body = numbers[list(CSV)].astype(object)
    return csv_text([CSV, *body.where(body.notna(), None).to_numpy().tolist()])
