"""Tables of a paper: the best of a column is bold only where the paired test says so.

A `TableLayout` describes a table; the numbers come from the records and samples of a results folder.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from dart_eval.results import distance, frame, metrics, outcomes, pairing, stats
from dart_eval.results.estimates import Estimate
from dart_eval.results.format import THREE, number, short
from dart_eval.results.format import sparsity as percent
from dart_eval.results.inputs import DENSE, identity, model_of
from dart_eval.results.paper_layout import FIELDS, MEAN, PaperColumn, PaperRow, TableLayout
from dart_eval.results.record import Record
from dart_eval.results.rows import cells_frame, metrics_frame
from dart_eval.results.store import Store
from dart_eval.results.tables import cut_prompts, upper_bounds
from dart_eval.results.writers import Table, csv_text
from dart_eval.util.bits import LAST_BITS
from dart_eval.util.errors import UserError

PLACE = ["line", "column"]  # of a number
ALIKE = 0.05  # effective sparsities within this of the highest one are compared: a method may run dense for long
CSV = ("table", "row", "method", "params", "sparsity", "column", "tasks", "metric", "value", "stderr", "n", "p", "bold")


class Paper:
    """Fills layouts from a results folder.

    Args:
        store: the folder, for samples.
        records: its cells, by the model as the user named it.
        missing: task -> the reason why it could not run.
        command: the command line that writes the tables, for their provenance.
        texts: whether to hold texts against dense's, which takes time.

    Raises:
        UserError: the cells of one name are of several models.
    """

    def __init__(
        self, store: Store, records: Mapping[str | None, Sequence[Record]], missing: Mapping[str, str], command: str,
        texts: bool = False,
    ) -> None:  # fmt: skip
        everything = list({r.key: r for some in records.values() for r in some}.values())  # a model has many spellings
        for some in records.values():
            if len(models := {json.dumps(r.inputs["model"], sort_keys=True): r.inputs["model"] for r in some}) > 1:
                named = ", ".join(sorted(map(model_of, models.values())))
                remedy = "give each model an --output of its own"
                raise UserError(f"a paper's tables are of one model, not of {named}", remedy)
        self.missing, self.command = missing, command
        self.models = list(dict.fromkeys(model_of(r.inputs["model"]) for r in everything))
        self._records = {r.key: r for r in everything}
        # Inputs that cells share. What a column without these two settings has is not that of the first cell.
        own = {"gen_kwargs": None, "ffn_bits": None}
        self._common = {name: {**some[0].inputs, **own} for name, some in records.items() if some}
        cells = distance.beside_dense([outcomes.cell_of(store, r) for r in everything], texts)
        self._metrics = metrics_frame(frame.lines_of(cells, everything))
        self._cells = cells_frame(everything).set_index("key")
        self._metrics["better"] = self._metrics["higher_is_better"].map({True: 1, False: -1}).fillna(0)
        self._samples = {cell.key: cell for cell in cells}
        self._known: list[tuple[TableLayout, pd.DataFrame]] = []  # the numbers of tables

    def table(self, layout: TableLayout) -> tuple[Table, pd.DataFrame]:
        """Return the table for people, and its numbers: one a row, with the columns of `CSV`.

        A column without a number is left out.
        """
        numbers = self._with_best(self._numbers(layout))
        lines, found = layout.lines, {*numbers["column"]}
        heads = [head for head in layout.parts if head in found]
        texts = numbers.pivot(index="line", columns="column", values="text").join(self._costs(numbers))
        texts = texts.reindex(range(len(lines)), columns=[*heads, "effective", "read"]).fillna("-")
        body = []
        for (_, sparsity, line), line_texts in zip(lines, texts.to_numpy().tolist(), strict=True):
            if isinstance(line, PaperRow):
                body.append([line.label, percent(sparsity if line.prunes else 0.0), *line_texts])
                continue
            values = line.values
            cells = [short(layout.parts[h][0].metric, values[h], None) if h in values else "" for h in heads]
            label = f"{line.label} [{layout.sources.index(line.source) + 1}]"
            body.append([label, percent(sparsity), *cells, "", ""])
        sizes = numbers[(numbers["n"] > 0) & (numbers["column"] != MEAN)].groupby("column")["n"].agg(set)
        counted = [f"{h} (n={min(sizes[h])})" if h in sizes and len(sizes[h]) == 1 else h for h in heads]
        at, guessing = sum(block == 0 for block, *_ in lines), _guessing(layout, heads, numbers)
        body[at:at] = guessing  # below the unpruned rows
        place = [i + len(guessing) * (i >= at) for i in range(len(lines))]
        best = numbers[numbers["bold"]]
        bold = {(place[line], 2 + heads.index(head)) for line, head in zip(best["line"], best["column"], strict=True)}
        rules = {place[i] for i in range(1, len(lines)) if lines[i][0] != lines[i - 1][0]}
        columns = ["method", "sparsity", *counted, "effective", "read"]
        note = self._note(layout, numbers)
        return Table(layout.title, columns, body, note, frozenset(bold), frozenset(rules)), numbers

    def measured(self, layout: TableLayout) -> bool:
        """Return whether a table has a number."""
        return not self._numbers(layout).empty

    def unmeasured(self, layouts: Sequence[TableLayout]) -> str:
        """Return the sentences on tables that have no number, and why; empty if each has one."""
        empty = [layout for layout in layouts if not self.measured(layout)]
        if not empty:
            return ""
        names = ", ".join(layout.name for layout in empty)
        return " ".join([f"Tables without a number: {names}.", *self._missing(empty)])

    def _missing(self, layouts: Sequence[TableLayout]) -> list[str]:
        """Return a sentence for each reason why some tasks of these tables could not run."""
        empty = [
            column for layout in layouts for column in layout.columns
            if column.head not in {*self._numbers(layout)["column"]}
        ]  # fmt: skip
        tasks = {task for column in empty for task in column.tasks}
        because: dict[str, list[str]] = {}
        for task, reason in self.missing.items():
            if task in tasks:
                because.setdefault(reason.replace(f" of task {task} ", " "), []).append(task)
        said = [f"{', '.join(some)}: not measured ({reason})." for reason, some in because.items()]
        return list(dict.fromkeys([*said, *(text for column in empty if (text := self._lacking(column)))]))

    def _lacking(self, column: PaperColumn) -> str:
        """Return why a column without a number has none although its cells ran; empty if they did not."""
        cells = [r for r in self._records.values() if r.inputs["task"] in column.tasks]
        own = {m.task for r in cells for m in r.metrics if m.part_of is None}
        if not column.metric or not own:
            return ""
        if other := sorted(set(column.tasks) & {str(r.inputs["task"]) for r in cells} - own):
            members = sorted(own - set(column.tasks))
            return f"{column.head}: {', '.join(other)} has no number of its own: name its tasks, {', '.join(members)}."
        known = self._metrics["metric"][self._metrics["task"].isin(column.tasks)]
        return "" if column.metric in set(known) else f"{column.head}: its cells have no metric {column.metric}."

    # -- numbers ---------------------------------------------------------------------------------------------

    def _numbers(self, layout: TableLayout) -> pd.DataFrame:
        """Return the computable numbers of a layout, each a mean over the cells `key`, weighted by `share`."""
        for known, numbers in self._known:
            if known is layout:
                return numbers
        fields = {c.field: FIELDS[c.field][0](self._cells) for c in layout.columns if c.field}
        costs = [
            self._cells[["task"]].assign(metric=name, value=v, n=0, better=0, chance=None).reset_index()
            for name, v in fields.items()
        ]
        names = ["key", "task", "metric", "value", "stderr", "n", "better", "chance"]
        measured = pd.concat([self._metrics, *costs])[names]
        terms = self._wanted(layout).merge(measured, "left", on=["key", "task", "metric"])
        complete = terms["n"].notna().groupby([terms[name] for name in PLACE]).transform("all")
        share = terms["share"]
        weighted = {
            "value": share * terms["value"], "stderr": (share * terms["stderr"]) ** 2,
            "chance": share * terms["chance"].astype(float),
        }  # fmt: skip
        by = terms[complete].assign(**weighted).groupby(PLACE, sort=False)
        numbers = by.first().assign(
            value=by["value"].agg(_sum), stderr=by["stderr"].agg(_sum) ** 0.5, n=by["n"].sum().astype(int),
            chance=by["chance"].agg(_sum), **{name: by[name].agg(tuple) for name in ("key", "share", "task")},
        ).reset_index()  # fmt: skip
        for i, one in numbers[[len({*tasks}) < len(tasks) for tasks in numbers["task"]]].iterrows():
            numbers.loc[i, "stderr"] = self._shared_error(one)
        numbers["text"] = [_text(*v) for v in zip(numbers["metric"], numbers["value"], numbers["stderr"], strict=True)]
        sparse = self._cells["effective_sparsity"].to_dict()
        means = [sum(sparse[key] for key in keys) / len(keys) for keys in numbers["key"]]
        rival = [b > 0 and all(map(self._rival, k)) for b, k in zip(numbers["block"], numbers["key"], strict=True)]
        numbers = numbers.assign(tasks=numbers["task"].map("+".join), effective=means, rival=rival)
        self._known.append((layout, numbers))
        return numbers

    def _rival(self, key: str) -> bool:
        """Whether a cell is of a pruner that can be used: neither a control nor an upper bound."""
        inputs, settings = self._records[key].inputs, self._records[key].settings
        return (
            inputs["method"] != DENSE and settings.get("granularity") != LAST_BITS and not settings.get("upper_bound")
        )

    def _shared_error(self, one: pd.Series) -> float:
        """Return the standard error of a mean over cells that share documents; NaN if a cell's do not give it."""
        found = self._compared(one, one)
        if found is None or any(c.measure.kind != "mean" for c in found):
            return math.nan
        first, *rest = (c.estimate(c.pairs.a, False).times(s) for c, s in zip(found, one["share"], strict=True))
        stderr = sum(rest, first).stderr
        return math.nan if stderr is None else stderr

    def _wanted(self, layout: TableLayout) -> pd.DataFrame:
        """Return the cells that each number of a layout needs, a row each, with key None for a missing cell."""
        keys = {identity(r.inputs): key for key, r in self._records.items()}
        wanted: list[dict[str, Any]] = []
        lines = [(i, block, s, row) for i, (block, s, row) in enumerate(layout.lines) if isinstance(row, PaperRow)]
        for (line, block, sparsity, row), (head, parts) in itertools.product(lines, layout.parts.items()):
            for part, task in ((p, t) for p in parts for t in p.tasks):
                own = sparsity if row.prunes else 0.0
                cell = {"method": row.method, "params": row.params, "sparsity": own, "task": task}
                asked = {**self._common.get(part.model, {}), **part.asked, **row.asked, **cell}
                if row.method == DENSE:
                    asked["scope"] = "scored"  # no other matters to it
                same = asked.get("ffn_bits") == part.asked.get("ffn_bits")
                apart = not same and part.metric.partition(",")[0] in metrics.BY_SECOND_FORWARD  # from its own dense
                wanted.append({
                    "table": layout.name, "row": row.label, **cell, "column": head, "line": line, "block": block,
                    "metric": part.metric or part.field, "share": 1 / (len(parts) * len(part.tasks)),
                    "prunes": row.prunes, "scope": str(asked.get("scope")), "bits": str(asked.get("ffn_bits")),
                    "key": keys.get(identity(asked)) if "model" in asked and not apart else None,
                })  # fmt: skip
        return pd.DataFrame(wanted)

    def _costs(self, numbers: pd.DataFrame) -> pd.DataFrame:
        """Return effective sparsity and weights read of each line, means over its cells, as text."""
        names = {"effective_sparsity": "effective", "weights_read": "read"}
        cells = numbers[["line", "key"]].explode("key").drop_duplicates().join(self._cells[list(names)], on="key")
        means = cells.groupby("line")[list(names)].mean().rename(columns=names)
        return means.apply(lambda column: column.map(THREE))

    def cost(self, layout: TableLayout, label: str, sparsity: float, head: str) -> float | None:
        """Return a cost of one row; None if it was not measured."""
        found = self._number(layout, label, sparsity, head)
        return None if found is None else float(found["value"])

    def sides(
        self, layout: TableLayout, rows: Sequence[str], sparsity: float, head: str, above_chance: bool = False
    ) -> tuple[str, Estimate, Estimate, int, str] | None:
        """Return a column's two rows, the better direction up; None if one was not measured, or has no direction.

        Args:
            above_chance: whether metrics with a chance level count from it.

        Returns:
            The head, both rows, the number of documents, and the metric.
        """
        a, b = (self._number(layout, label, sparsity, head) for label in rows)
        found = None if a is None or b is None else self._compared(a, b)
        if a is None or found is None or any(one.measure.higher_is_better is None for one in found):
            return None
        if above_chance and any(one.chance is None for one in found):  # nobody knows what guessing has
            return None
        sides: list[list[Estimate]] = [[], []]
        for one, part in zip(found, a["share"], strict=True):
            weight = part if one.measure.higher_is_better else -part
            weight *= math.log(2) if one.measure.kind == "bits" else 1.0  # in nats, as perplexities are
            for side, values in zip(sides, (one.pairs.a, one.pairs.b), strict=True):
                side.append(one.estimate(values, above_chance).times(weight))
        ours, theirs = (sum(side[1:], side[0]) for side in sides)
        return head, ours, theirs, int(a["n"]), str(a["metric"])

    def _number(self, layout: TableLayout, label: str, sparsity: float, head: str) -> pd.Series | None:
        """Return a number of a row in the block of a sparsity, or in the first one; None if it was not measured."""
        numbers = self._numbers(layout)
        blocks = {0, 1 + layout.sparsity.index(sparsity)} if sparsity in layout.sparsity else {0}
        found = numbers[(numbers["row"] == label) & (numbers["column"] == head) & numbers["block"].isin(blocks)]
        return None if found.empty else found.iloc[0]

    # -- which is best ---------------------------------------------------------------------------------------

    def _with_best(self, numbers: pd.DataFrame) -> pd.DataFrame:
        """Return the numbers with `p` and `bold` set for the best pruned number of each column and scope.

        Rows that run dense for so long that their effective sparsity is lower by more than `ALIKE` take no part.

        `p` is its largest p against the other numbers, after Holm; it is bold if `p` is below `stats.ALPHA`.
        """
        numbers = numbers.assign(p=float("nan"), bold=False, alike=True)
        rivals_of = numbers[numbers["rival"].astype(bool) & (numbers["better"] != 0)].groupby(
            ["block", "column", "scope"]
        )
        for _, rivals in rivals_of:
            most = rivals.groupby("bits")["effective"].transform("max")  # what rounding saves is no sparsity
            alike = ~(rivals["effective"] < most - ALIKE)
            numbers.loc[rivals.index, "alike"] = alike
            rivals = rivals[alike]
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
        found = self._compared(a, b)
        if found is None or (len(found) > 1 and any(one.measure.kind != "mean" for one in found)):
            return None
        if len(found) == 1:
            return found[0].test.p
        first, *rest = (one.lost.times(part) for one, part in zip(found, a["share"], strict=True))
        return sum(rest, first).p  # as of a claim: tasks of too few documents test nothing

    def _compared(self, a: pd.Series, b: pd.Series) -> list[frame.Compared] | None:
        """Return the cells of two numbers of a column beside each other; None if one does not pair."""
        made: list[frame.Compared] = []
        for task, ours, theirs in zip(a["task"], a["key"], b["key"], strict=True):
            pair = pairing.pair(self._samples[ours], self._samples[theirs])
            measures = [m for m in pair.x.measures if (m.task, m.metric) == (task, a["metric"])]
            made += frame.compared(pair, measures[:1])
        return made if len(made) == len(a["task"]) else None

    # -- words -----------------------------------------------------------------------------------------------

    def _note(self, layout: TableLayout, numbers: pd.DataFrame) -> str:
        parts = []
        if numbers["stderr"].notna().any():
            parts += [
                "Value ± standard error.",
                "Bold: better than every other pruned row of its sparsity by the paired test, Holm-adjusted p < .05.",
            ]
            if not numbers["alike"].all():
                parts.append(f"Rows whose effective sparsity is more than {ALIKE} below the highest take no part.")
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
        found = {*numbers["column"]}
        if without := [head for head in layout.parts if head not in found]:
            parts.append(f"Columns without a number are left out: {', '.join(without)}.")
        parts += self._missing([layout])
        records = [self._records[key] for key in dict.fromkeys(key for keys in numbers["key"] for key in keys)]
        parts += [*upper_bounds(records), *cut_prompts(records)]
        parts += [f"[{i + 1}] reported, not ours: {source}." for i, source in enumerate(layout.sources)]
        return " ".join([*parts, self._provenance(records)])

    def _provenance(self, records: Sequence[Record]) -> str:
        """Return a line with model, versions, code, dates and command."""
        records = sorted(records, key=lambda r: r.created)
        last = records[-1]
        env = last.environment
        codes, seeds, scopes = (
            sorted({str(r.inputs[name])[:12] for r in records}) for name in ("code", "seed", "scope")
        )
        models = dict.fromkeys(model_of(r.inputs["model"]) for r in records)
        devices = sorted({r.environment.get("gpu", r.inputs["device"]) for r in records})
        versions = [f"{name} {env[name]}" for name in ("dart-eval", "torch", "transformers", "lm_eval") if name in env]
        return (
            f"Made of {len(records)} cells: model {' and '.join(models)}, {last.inputs['dtype']} on "
            f"{' and '.join(devices)}, scope {' and '.join(scopes)}, seed {', '.join(seeds)}, {', '.join(versions)}, "
            f"code {', '.join(c[:8] for c in codes)}, {records[0].created[:10]} to {last.created[:10]}: {self.command}"
        )


def _guessing(layout: TableLayout, heads: Sequence[str], numbers: pd.DataFrame) -> list[list[str]]:
    """Return a line of the quality of guessing, if a column has one. heads: of the columns of numbers."""
    chance = numbers[numbers["chance"] > 0].groupby("column")["chance"].first()
    cells = [short(layout.parts[h][0].metric, chance[h], None) if h in chance else "" for h in heads]
    return [] if chance.empty else [["guessing", "", *cells, "", ""]]


def _sum(values: pd.Series) -> float:
    """Return a sum that is NaN if a term is missing."""
    return float(values.sum(skipna=False))


def _text(metric: str, value: float, stderr: float) -> str:
    return number(value, FIELDS[metric][1]) if metric in FIELDS else short(metric, value, stderr)


def to_csv(numbers: pd.DataFrame) -> str:
    """Return every number in full precision, one a line."""
    body = numbers[list(CSV)].astype(object)
    return csv_text([CSV, *body.where(body.notna(), None).to_numpy().tolist()])
