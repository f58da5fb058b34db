"""Tables of a paper and verdicts on its claims: a pivot of `frame.lines`, merged with the cells that the paper wants.

The best row of a column is bold only where the paired test says so. A claim holds if the paired 95 % interval lies on
its side, fails if it lies on the other, and is open in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any, NamedTuple

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from dart_eval.results import metrics, stats
from dart_eval.results.documents import Compared
from dart_eval.results.frame import beside_dense, cell_of, cells_frame, lines_of, paired, typed, with_distances
from dart_eval.results.inputs import DENSE, NOISE, identity, model_of
from dart_eval.results.metrics import number, percent, short
from dart_eval.results.record import Record
from dart_eval.results.show import Table
from dart_eval.results.stats import Estimate, share
from dart_eval.results.store import Store
from dart_eval.results.tables import cut_prompts, upper_bounds
from dart_eval.util.bits import LAST_BITS

ALL = "read in all"  # a table's last column: the read of all tokens, also those that ran dense
MEAN, ANY = "mean", "any"  # a table's last column; as a claim's column: at least one of them
ALIKE = 0.05  # effective sparsities within this of the highest one are compared: a method may run dense for long
HOLDS, FAILS, OPEN = "holds", "fails", "open"
CSV = ["table", "row", "method", "params", "sparsity", "column", "tasks", "metric", "value", "stderr", "n", "p", "bold"]
OTHERS = ["line", "block", "level", "scope", "bits", "up", "chance", "terms", "effective", "rival"]  # of a number
FIELDS: dict[str, tuple[Callable[[pd.DataFrame], Any], int, str]] = {  # costs: values, digits, unit
    "state_mib": (lambda cells: cells["memory_state"] / 2**20, 3, " MiB"),
    "peak_mib": (lambda cells: cells["memory_peak"] / 2**20, 0, " MiB"),
    "overhead_percent": (lambda cells: 100 * cells["flops_overhead_share"], 4, " %"),
    "flops_per_token": (lambda cells: cells["flops_decode_step_pruned"] / cells["flops_decode_step_dense"], 3, ""),
    "remasks_per_1000": (lambda cells: 1000 * cells["remasks"] / cells["tokens"].clip(1), 2, " per 1,000 tokens"),
}
SHAPED = {"state MB": 1e6, "overhead %": 0.01}  # costs of a claim on a shape, and their units
NOTE = "Value ± standard error, of shares in per cent; bold: best of its sparsity beyond noise (docs/recipes.md)."
# A test of perplexities whose differences have a long tail is too bold at .05, and on few documents at any level.
TAILED_ALPHA, TAILED_UNITS = 0.01, 100
POWER, MANY = 0.8, 100_000  # chance that so many documents close a claim; more are not counted
NOTE_ON_CLAIMS = (
    "measured: difference (perplexities in nats) or ratio of the two rows, with the paired 95 % interval. A verdict is "
    "of the models and documents measured here, not of the paper's (docs/recipes.md). One on perplexities, whose "
    f"differences have long tails, needs {TAILED_UNITS} documents and p < {TAILED_ALPHA}."
)
NOTE_ON_NEEDS = (
    f"needs: documents that would close an open claim with a chance of {POWER:.0%}, if this pilot measured the "
    "truth; of several columns, the one shown, uncorrected. Test the claim on other items than the pilot's."
)


class Part(BaseModel):
    """A part of a paper's file."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)


class Claim(Part):
    """A row is better than another, by so much (`by`) or so many times (`times`), or a cost is `at_most` so large.

    The numbers are those of a `table`, or are counted on the `shape` of a model without weights.
    """

    claim: str
    source: str = ""
    table: str = ""
    rows: tuple[str, ...] = ()
    column: str
    metric: str = ""  # of the columns that `any` means; empty: that of the first one
    sparsity: float = Field(ge=0, lt=1)
    by: float | None = None
    times: float | None = None
    at_most: float | None = None
    shape: str = ""
    method: str = ""
    prompt: int = Field(1024, ge=1, le=2**20)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if bool(self.table) == bool(self.shape) or (self.by is not None and self.times is not None):
            raise ValueError("a claim has either a table or a shape, and at most one of `by` and `times`")
        if len(self.rows) != (0 if self.shape else 2 if self.at_most is None else 1):
            raise ValueError("a claim on a table has two rows, or one and at_most; on a shape none")
        if self.shape and (self.at_most is None or self.column not in SHAPED):
            raise ValueError(f"a claim on a shape has at_most, and a column: {' or '.join(SHAPED)}")
        return self


class Sheet(NamedTuple):
    """A table that a paper wants.

    Attributes:
        notes: sentences of its own.
        cells: a row for each line, column and task: the inputs that are `asked` of its cell (None: none fits), its
            `share` in the number, and its place; `value` if another publication has it.
    """

    name: str
    title: str
    notes: Sequence[str]
    cells: pd.DataFrame

    @property
    def heads(self) -> dict[str, str]:
        """Column -> its metric or cost."""
        return dict(zip(self.cells["column"], self.cells["metric"], strict=True))


class Sides(NamedTuple):
    """Two rows in a column, the better direction up."""

    head: str
    metric: str
    n: int
    a: Estimate
    b: Estimate


class Verdict(NamedTuple):
    """What becomes of a claim.

    Attributes:
        word: HOLDS, FAILS or OPEN. measured: with its interval, as text.
        n: documents. needs: documents that would close an open claim.
    """

    word: str
    measured: str
    n: str = ""
    needs: str = ""


class Paper:
    """The numbers of tables, from the cells of a results folder.

    Args:
        store: the folder, for samples.
        records: its cells, of one model.
        sheets: the tables.
        missing: task -> the reason why it could not run.
    """

    def __init__(
        self, store: Store, records: Sequence[Record], sheets: Sequence[Sheet], missing: Mapping[str, str]
    ) -> None:
        self.records = {r.key: r for r in records}
        self.sheets, self.missing = {sheet.name: sheet for sheet in sheets}, missing
        wanted = pd.concat([sheet.cells.assign(table=sheet.name) for sheet in sheets], ignore_index=True)
        texts = any(name.startswith("dense_") for name in wanted["metric"])  # are compared only where that is shown
        cells = with_distances([cell_of(store, r) for r in records], texts)
        self.cells = {cell.key: cell for cell in cells}
        self.costs = cells_frame(records).set_index("key")
        self.lines = typed(lines_of(beside_dense(cells)[0], records))
        self.numbers = self._with_best(self._numbers(wanted[wanted["value"].isna()]))

    def of(self, table: str) -> pd.DataFrame:
        """Return the numbers of a table, with the columns `CSV` and `OTHERS`; no row if nothing was measured."""
        return self.numbers[self.numbers["table"] == table]

    def _numbers(self, wanted: pd.DataFrame) -> pd.DataFrame:
        """Return the numbers all of whose cells are there: each a mean over `terms`, of a share, a task and a key."""
        # Cells share these inputs, but for two: a column without those has none of the first cell's.
        common = {**next(iter(self.records.values())).inputs, "gen_kwargs": None, "ffn_bits": None}
        keys = {identity(r.inputs): key for key, r in self.records.items()}
        keys_of_cells = [asked and keys.get(identity(common | asked)) for asked in wanted["asked"]]
        costs = [
            self.costs[["task"]].assign(metric=name, value=values(self.costs), n=0).reset_index()
            for name, (values, *_) in FIELDS.items() if name in {*wanted["metric"]}
        ]  # fmt: skip
        names = ["key", "task", "metric", "value", "stderr", "n", "chance", "higher_is_better"]
        known = pd.concat([self.lines, *costs])[names]
        numbers = []
        terms_of = wanted.drop(columns="value").assign(key=keys_of_cells).merge(known, "left", names[:3])
        for _, terms in terms_of.groupby(["table", "line", "column"], sort=False):
            if terms["n"].isna().any():
                continue
            value, error, chance = (
                terms["share"] * terms[name].astype(float) for name in ("value", "stderr", "chance")
            )
            cells = [self.records[key] for key in terms["key"]]
            mean = terms.iloc[0].to_dict() | {
                "tasks": "+".join(terms["task"]), "n": int(terms["n"].sum()), "p": math.nan, "bold": False,
                "value": value.sum(skipna=False), "stderr": (error**2).sum(skipna=False) ** 0.5,
                "chance": chance.sum(skipna=False), "effective": sum(r.effective_sparsity for r in cells) / len(cells),
                "up": {True: 1, False: -1}.get(terms["higher_is_better"].iloc[0], 0),
                "terms": [*zip(terms["share"], terms["task"], terms["key"], strict=True)],
                "rival": terms["block"].iloc[0] > 0 and all(map(_is_pruner, cells)),
            }  # fmt: skip
            if not terms["task"].is_unique:  # its cells share documents
                estimate = _mean(self._beside(mean, mean), lambda metric: metric.estimate(metric.a, False))
                mean["stderr"] = estimate and estimate.stderr
            numbers.append(mean)
        return typed(pd.DataFrame(numbers, columns=[*CSV, *OTHERS], dtype=object))

    def _beside(self, a: Mapping[Any, Any], b: Mapping[Any, Any]) -> list[tuple[float, Compared]]:
        """Return the shares and cells of two numbers of a column beside each other; nothing if one does not pair."""
        beside = [
            (part, metric)
            for (part, task, ours), (_, _, theirs) in zip(a["terms"], b["terms"], strict=True)
            for metric in paired(self.cells[ours], self.cells[theirs]) if metric.a.name == (task, a["metric"])
        ]  # fmt: skip
        return beside if len(beside) == len(a["terms"]) else []

    def _sides(self, a: Mapping[Any, Any], b: Mapping[Any, Any], ratio: bool) -> Sides | None:
        """Return two numbers as estimates; None if nobody knows which is better, or for their ratio what guessing has.

        Args:
            a, b: of one column.
            ratio: whether accuracies count from guessing; logarithms have no ratio.
        """
        sides: list[list[Estimate]] = [[], []]
        for part, metric in (beside := self._beside(a, b)):
            up, logarithm = metric.metric.higher_is_better, metric.kind in ("log-perplexity", "bits")
            if up is None or (ratio and (metric.chance is None or logarithm)):
                return None
            weight = (part if up else -part) * (math.log(2) if metric.kind == "bits" else 1.0)  # in nats
            for side, measure in zip(sides, (metric.a, metric.b), strict=True):
                side.append(metric.estimate(measure, ratio).times(weight))
        return Sides(a["column"], a["metric"], int(a["n"]), *map(stats.total, sides)) if beside else None

    def _with_best(self, numbers: pd.DataFrame) -> pd.DataFrame:
        """Return the numbers with `p` and `bold` of the best pruned one of each block, column and scope.

        `p` is its largest p against the others, after Holm. Rows that run dense for so long that their effective
        sparsity is lower by more than `ALIKE` take no part.
        """

        def p_of(a: pd.Series, b: pd.Series) -> float | None:
            beside = self._beside(a, b)
            lost = _mean(beside, lambda metric: metric.lost)
            return beside[0][1].test.p if len(beside) == 1 else lost.p if lost else None

        rivals = numbers[numbers["rival"].astype(bool) & (numbers["up"] != 0)]
        for _, side in rivals.groupby(["table", "block", "column", "scope"]):
            most = side.groupby("bits")["effective"].transform("max")  # what rounding saves is no sparsity
            side = side[~(side["effective"] < most - ALIKE)]
            if len(side) < 2 or side["value"].isna().any():
                continue
            best = (side["up"] * side["value"]).idxmax()
            tests = [p_of(side.loc[best], other) for i, other in side.iterrows() if i != best]
            if None not in tests:
                p = max(p for p in stats.holm(tests) if p is not None)
                numbers.loc[best, ["p", "bold"]] = p, p < stats.ALPHA
        return numbers

    # -- tables --------------------------------------------------------------------------------------------------------

    def table(self, sheet: Sheet) -> Table:
        """Return a table without the columns that have no number, and without lines if none has. Its data are `CSV`."""
        numbers, lines = self.of(sheet.name), [*sheet.cells.drop_duplicates("line").itertuples()]
        heads = [head for head in sheet.heads if head in {*numbers["column"]}]
        reported = sheet.cells[sheet.cells["value"].notna()]
        texts = {(v.line, v.column): _text(v.metric, v.value) for v in reported.itertuples()}
        texts |= {(v.line, "read"): metrics.asked(v.sparsity) for v in reported.itertuples()}
        texts |= {(v.line, v.column): _text(v.metric, v.value, v.stderr) for v in numbers.itertuples()}
        for line, of_line in numbers.groupby("line"):
            unread, read = self.costs.loc[_keys(of_line), ["effective_sparsity", "weights_read"]].mean()
            texts |= {(line, "read"): percent(read), (line, ALL): percent(1 - unread)}
        gaps = dict.fromkeys(reported["line"], "")
        body = [
            [line.row] + [texts.get((line.line, head), gaps.get(line.line, "-")) for head in ("read", *heads, ALL)]
            for line in lines
        ]
        chances = numbers[numbers["chance"] > 0].groupby("column")["chance"].first()
        unpruned, more = sum(line.block == 0 for line in lines), int(len(chances) > 0)
        guessing = [_text(sheet.heads[head], chances[head]) if head in chances else "" for head in heads]
        body[unpruned:unpruned] = [["guessing", "", *guessing, ""]] * more
        place = {line.line: i + more * (i >= unpruned) for i, line in enumerate(lines)}
        sizes = numbers[(numbers["n"] > 0) & (numbers["column"] != MEAN)].groupby("column")["n"].agg(set)
        counted = [f"{head} (n={min(sizes[head])})" if len(sizes.get(head, ())) == 1 else head for head in heads]
        bold = {(place[v.line], 2 + heads.index(v.column)) for v in numbers[numbers["bold"].astype(bool)].itertuples()}
        return Table(
            sheet.title, ["method", "read", *counted, ALL], body if heads else [],
            self._notes(sheet, heads), frozenset(bold), numbers[CSV],
        )  # fmt: skip

    def _notes(self, sheet: Sheet, heads: Sequence[str]) -> list[str]:
        """Return the sentences below a table with numbers in some columns."""
        why: dict[str, dict[str, None]] = {}
        for cell in sheet.cells[~sheet.cells["column"].isin([*heads, MEAN])].itertuples():
            reason = self.missing.get(cell.task, f"no cell of {cell.task} has {cell.metric} as a number of its own")
            why.setdefault(reason, {})[cell.column] = None
        notes = [*sheet.notes, *(f"Not measured: {', '.join(names)} ({reason})." for reason, names in why.items())]
        cells = sorted((self.records[key] for key in _keys(self.of(sheet.name))), key=lambda r: r.created)
        if not cells:
            return notes
        models = {model_of(r.inputs["model"]): None for r in cells}
        about = {f"{r.inputs['dtype']} on {r.environment.get('gpu', r.inputs['device'])}": None for r in cells}
        dates = " to ".join(sorted({cells[0].created[:10], cells[-1].created[:10]}))
        made = f"Made of {len(cells)} cells of {', '.join(models)}, {', '.join(about)}, {dates}."
        return [NOTE, *notes, *upper_bounds(cells), *cut_prompts(cells), made]

    # -- claims --------------------------------------------------------------------------------------------------------

    def verdicts(self, claims: Sequence[Claim], counted: Mapping[Claim, float], power: bool = False) -> Table:
        """Return the verdicts, a line a claim.

        Args:
            counted: the costs of claims on a shape, in their units.
            power: say how many documents an open claim needs (`needed`).
        """
        body, heads = [], ["claim", "verdict", "measured", "n", *["needs"] * power]
        for claim in claims:
            if claim.at_most is None:
                verdict = self._of_rows(claim)
            elif claim.shape:
                cost, unit = counted[claim], claim.column.split()[1]
                verdict = _of_cost(claim, cost, f"{float(f'{cost:.2g}'):g}", f" {unit}, counted")
            elif (row := self._number(claim, claim.rows[0], claim.column)) is None or math.isnan(row["value"]):
                verdict = Verdict(OPEN, "not measured")
            else:
                verdict = _of_cost(claim, row["value"], _text(row["metric"], row["value"]), FIELDS[row["metric"]][2])
            said = f"{claim.claim} ({claim.source})" if claim.source else claim.claim
            body.append([said, *verdict][: len(heads)])
        models = dict.fromkeys(model_of(r.inputs["model"]) for r in self.records.values())
        notes = [NOTE_ON_CLAIMS, *[NOTE_ON_NEEDS] * power, f"Models: {', '.join(models)}."]
        return Table("Claims and verdicts", heads, body, notes)

    def _of_rows(self, claim: Claim) -> Verdict:
        """Return the verdict on two rows."""
        heads = {head: m for head, m in self.sheets[claim.table].heads.items() if head != MEAN and m not in FIELDS}
        metric, several = claim.metric or next(iter(heads.values()), ""), claim.column in (ANY, MEAN)
        names = [head for head, m in heads.items() if m == metric] if several else [claim.column]
        pairs = [
            (a, b) for head in names
            if (a := self._number(claim, claim.rows[0], head)) is not None
            and (b := self._number(claim, claim.rows[1], head)) is not None
        ]  # fmt: skip
        sides = [rows for a, b in pairs if (rows := self._sides(a, b, claim.times is not None))]
        if pairs and not sides:
            why = "its metric has no direction, no ratio, no known level of guessing, or is not of single documents"
            return Verdict(OPEN, f"not tested: {why}")
        part = f"{len(sides)} of {len(names)} columns" if several and len(sides) < len(names) else ""
        if sides and claim.column == MEAN:
            columns = zip(*(rows[3:] for rows in sides), strict=True)
            a, b = (stats.total(column).times(1 / len(sides)) for column in columns)
            sides = [Sides(MEAN, metric, sum(rows.n for rows in sides), a, b)]
        return judged(claim, sides, part)

    def _number(self, claim: Claim, label: str, head: str) -> pd.Series | None:
        """Return a number of a row in the claim's block, or in the first one; None if it was not measured."""
        numbers = self.of(claim.table)
        numbers = numbers[(numbers["block"] == 0) | (numbers["level"] == claim.sparsity)]
        numbers = numbers[(numbers["row"] == label) & (numbers["column"] == head)]
        return None if numbers.empty else numbers.iloc[0]


def judged(claim: Claim, sides: Sequence[Sides], part: str = "") -> Verdict:
    """Return the verdict on a claim on two rows.

    Args:
        sides: the rows in the claim's column, or in all columns of which one must bear it out.
        part: `3 of 4 columns`, if not all of the claim's were measured.
    """
    if not sides:
        return Verdict(OPEN, "not measured")
    tailed = metrics.kind_of(sides[0].metric).group == metrics.PERPLEXITY
    alpha, fewest = (TAILED_ALPHA, TAILED_UNITS) if tailed else (stats.ALPHA, 0)
    if claim.times is None:
        gaps = [rows.a - rows.b for rows in sides]
        gaps = [replace(gap, value=gap.value - (claim.by or 0.0)) for gap in gaps]
        tests = [gap.p if gap.smallest >= fewest else None for gap in gaps]
    else:  # Fieller's interval is Student's
        gaps = [rows.a - rows.b.times(claim.times) for rows in sides]
        tests = [gap.student if share(rows.a, rows.b) else None for gap, rows in zip(gaps, sides, strict=True)]
    adjusted = stats.holm([1.0 if p is None else p for p in tests])
    proven = [i for i, p in enumerate(adjusted) if gaps[i].value > 0 and p is not None and p < alpha]
    failed = [i for i, p in enumerate(tests) if gaps[i].value < 0 and p is not None and p < alpha]
    fails = len(failed) == len(sides) and not (part and claim.column == ANY)  # another column may bear it out
    shown = max(proven or range(len(sides)), key=lambda i: gaps[i].value)
    best = sides[shown]
    where = "; ".join([best.head] * (claim.column == ANY) + [part] * bool(part))
    text = _measured(claim, best) + (f" ({where})" if where else "")
    word = HOLDS if proven else FAILS if fails else OPEN
    able = word == OPEN and gaps[shown].smallest >= stats.MIN_CLUSTERS
    able = able and (claim.times is None or share(best.a, best.b) is not None)
    needs = needed(gaps[shown], best.n, alpha, fewest) if able else ""
    return Verdict(word, text, str(best.n), needs)


def needed(gap: Estimate, n: int, alpha: float, fewest: int = 0) -> str:
    """Return about how many documents would close a claim with a chance of `POWER`, if the gap is as it was measured.

    n ((z_(1 - alpha / 2) + z_POWER) stderr / gap)^2, of a two-sided test of normal means, in two digits.

    Args:
        gap: between the rows, less what the claim asks. n: its documents.
        alpha: of the test. fewest: documents that the test has at least.
    """
    z = NormalDist().inv_cdf
    if not gap.stderr or not gap.value:
        return ""
    exact = n * ((z(1 - alpha / 2) + z(POWER)) * gap.stderr / gap.value) ** 2
    return f"{max(float(f'{exact:.2g}'), fewest):,.0f}" if exact < MANY else f"over {MANY:,}"


def _measured(claim: Claim, rows: Sides) -> str:
    """Return by how much, or how many times, a row is better, with the interval."""
    kind, ratio, gap = metrics.kind_of(rows.metric), share(rows.a, rows.b), rows.a - rows.b
    scale, limit = (100.0 if kind.percent else 1.0), claim.times
    sign, digits, unit = ("+", 1, " points") if kind.percent else ("+", 3, "")
    numbers = [scale * v for v in (gap.value, *(gap.interval or ()))]
    if limit is None:
        limit = scale * (claim.by or 0.0)
    elif ratio is None:
        return f"no ratio: the second row is not above {'guessing' if kind.chance else '0'} by more than noise"
    else:
        numbers, sign, digits, unit = [ratio.value, *(ratio.interval or ())], "", 2, " times"
    for more in range(digits, digits + 5):  # as many digits as it takes to tell the numbers from the limit
        value, *ends = texts = [f"{n:{sign}.{more}f}" for n in numbers]
        if all(n == limit or float(t) != round(limit, more) for t, n in zip(texts, numbers, strict=True)):
            break
    return f"{value}{unit}" + (f" [{', '.join(ends)}]" if ends else "")


def _of_cost(claim: Claim, cost: float, text: str, unit: str) -> Verdict:
    """Return the verdict on a cost, and it as text; where that reads as the limit, more digits do."""
    limit = claim.at_most or 0.0
    return Verdict(HOLDS if cost <= limit else FAILS, (f"{cost:g}" if float(text) == limit else text) + unit)


def _is_pruner(record: Record) -> bool:
    """Return whether a cell is of a pruner that can be used: neither a control nor an upper bound."""
    inputs, settings = record.inputs, record.settings
    dense = inputs["method"] in (DENSE, NOISE) or settings.get("granularity") == LAST_BITS
    return not dense and not settings.get("upper_bound")


def _keys(numbers: pd.DataFrame) -> list[str]:
    """Return the cells of some numbers, each once."""
    return list(dict.fromkeys(key for terms in numbers["terms"] for *_, key in terms))


def _mean(beside: Sequence[tuple[float, Compared]], of: Callable[[Compared], Estimate]) -> Estimate | None:
    """Return a weighted mean; None where its terms are no means of documents."""
    means = beside and all(metric.kind == "mean" for _, metric in beside)
    return stats.total(of(metric).times(part) for part, metric in beside) if means else None


def _text(metric: str, value: float, stderr: float | None = None) -> str:
    return number(value, FIELDS[metric][1]) if metric in FIELDS else short(metric, value, stderr)
