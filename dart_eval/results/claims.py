"""Claims of a paper and what was measured: a verdict for each, with its interval and the number of documents.

A claim says that a row is better than another by so much (`by`) or so many times as good (`times`; an accuracy counts
from guessing), or that a cost is at most so large. It holds if the paired 95 % interval lies on its side, fails if it
lies on the other, and is open in between. The costs of a claim about a `shape` are counted on a model of that shape
without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dart_eval.results import metrics, stats
from dart_eval.results.estimates import Estimate, mean, share
from dart_eval.results.format import number
from dart_eval.results.paper_layout import FIELDS, MEAN, TableLayout
from dart_eval.results.paper_tables import Paper
from dart_eval.results.writers import Table

ANY = "any"  # as a claim's column: at least one of them
HOLDS, FAILS, OPEN = "holds", "fails", "open"
HEADS = ["claim", "verdict", "measured", "n"]
SHAPED = {"state MB": 1e6, "overhead %": 0.01}  # what a shape's cost is counted in
NOTE = (
    "measured: by how much the first row is better than the second (perplexities in nats), or its ratio to the second "
    "(accuracies above guessing), with the paired 95 % interval. holds: the interval lies on the claim's side. fails: "
    "it lies on the other side. open: it covers both, or a task has too few documents. For a claim on at least "
    "one column the best one is shown, its p Holm-adjusted over all; it fails only if all were measured. n: "
    "documents. A verdict is of the models and documents measured here, not of the paper's."
)


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
        text: as readers see it.
        source: where it stands.
        table, column: the numbers that test it; `any` is at least one column. Of a shape: `state MB` or `overhead %`.
        sparsity: the block of the table.
        rows: labels: the row, and the one it is held against.
        by: least difference. times: least ratio, in place of a difference. at_most: the largest cost.
        shape, method, prompt: of a claim about costs: the model's shape, and the tokens of the prompt.
        metric: of the columns that `any` means; empty: all have the same.
    """

    text: str
    source: str
    table: str = ""
    column: str = ""
    sparsity: float = 0.0
    rows: tuple[str, ...] = ()
    by: float = 0.0
    times: float | None = None
    at_most: float | None = None
    shape: str = ""
    method: str = ""
    prompt: int = 0
    metric: str = ""


@dataclass(frozen=True)
class Finding:
    """What was measured: in words, the number of documents, and the verdict."""

    text: str
    n: int
    verdict: str


@dataclass(frozen=True)
class Sides:
    """The two rows of a claim in one column, the better direction up.

    Attributes:
        head: of the column. a, b: the row and its rival. n: documents. metric: of the column.
    """

    head: str
    a: Estimate
    b: Estimate
    n: int
    metric: str

    def beyond(self, claim: Claim) -> Estimate:
        """By how much the row exceeds what is claimed of it."""
        gap = self.a - (self.b if claim.times is None else self.b.times(claim.times))
        return gap if claim.times is not None else replace(gap, value=gap.value - claim.by)

    def p(self, claim: Claim) -> float | None:
        """Two-sided p of `beyond`; None if it cannot be tested. It agrees with the interval of `text`."""
        if claim.times is None:
            return self.beyond(claim).p
        return self.beyond(claim).student if share(self.a, self.b) else None  # Fieller's interval is Student's

    def text(self, claim: Claim) -> str:
        """What was measured, in words."""
        if claim.times is not None:
            ratio, chance = share(self.a, self.b), metrics.kind_of(self.metric).chance
            if ratio is None and self.b.value < 0 and not chance:
                return "no ratio: the second row is below 0, or the smaller value is the better one"
            if ratio is None:
                return f"no ratio: the second row is not above {'guessing' if chance else '0'} by more than noise"
            value, *ends = _written([ratio.value, *(ratio.interval or ())], claim.times, ".", 2)
            unit = " times"
        else:
            gap, kind = self.a - self.b, metrics.kind_of(self.metric)
            scale, unit, digits = (100.0, " points", 1) if kind.percent else (1.0, "", 3)
            numbers = [scale * v for v in (gap.value, *(gap.interval or ()))]
            value, *ends = _written(numbers, scale * claim.by, "+.", digits)
        return f"{value}{unit}" + (f" [{', '.join(ends)}]" if ends else "")


def _written(numbers: Sequence[float], limit: float, sign: str, digits: int) -> list[str]:
    """Return numbers as text, with as many digits as it takes to tell them from the limit (up to 4 more)."""
    for more in range(5):
        texts = [f"{n:{sign}{digits + more}f}" for n in numbers]
        if all(n == limit or float(t) != round(limit, digits + more) for t, n in zip(texts, numbers, strict=True)):
            break
    return texts


def table(
    claims: Sequence[Claim], paper: Paper, layouts: Mapping[str, TableLayout], shaped: Callable[[Claim], float]
) -> Table:
    """Return the verdicts, a line a claim.

    Args:
        paper: the numbers. layouts: the tables by name.
        shaped: returns the cost of a claim about a shape.
    """
    body = []
    for claim in claims:
        found = _of_shape(claim, shaped(claim)) if claim.shape else _of_table(claim, paper, layouts[claim.table])
        said = f"{claim.text} ({claim.source})" if claim.source else claim.text
        body.append([said, found.verdict, found.text, str(found.n) if found.n else ""])
    return Table("Claims and verdicts", HEADS, body, f"{NOTE} Models: {', '.join(paper.models) or 'none'}.")


def _of_shape(claim: Claim, cost: float) -> Finding:
    assert claim.at_most is not None
    return _within(claim.at_most, cost, f"{float(f'{cost:.2g}'):g}", f" {claim.column.split()[-1]}, counted")


def _within(limit: float, cost: float, short: str, unit: str) -> Finding:
    """Return the verdict on a cost. short: it as text, which more digits replace where it reads as the limit."""
    text = short if float(short) != limit else f"{cost:g}"
    return Finding(text + unit, 0, HOLDS if cost <= limit else FAILS)


def _of_table(claim: Claim, paper: Paper, layout: TableLayout) -> Finding:
    if claim.at_most is not None:
        column = next(c for c in layout.columns if c.head == claim.column)
        cost = paper.cost(layout, claim.rows[0], claim.sparsity, claim.column)
        if cost is None or cost != cost:
            return Finding("not measured", 0, OPEN)
        _, digits, unit = FIELDS[column.field]
        return _within(claim.at_most, cost, number(cost, digits), unit)
    columns = [c for c in layout.columns if c.metric and c.metric == (claim.metric or c.metric)]
    several = claim.column in (ANY, MEAN)
    heads = [c.head for c in columns] if several else [claim.column]
    found = (paper.sides(layout, claim.rows, claim.sparsity, h, claim.times is not None) for h in heads)
    sides = [Sides(*one) for one in found if one is not None]
    part = f"{len(sides)} of {len(heads)} columns" if several and len(sides) < len(heads) else ""
    if not sides and any(
        all(paper.cost(layout, row, claim.sparsity, head) is not None for row in claim.rows) for head in heads
    ):
        why = "its metric has no direction, no known level of guessing, or does not follow from single documents"
        return Finding(f"not tested: {why}", 0, OPEN)
    return judged(claim, _mean(sides) if claim.column == MEAN else sides, part)


def _mean(sides: Sequence[Sides]) -> list[Sides]:
    """Return the mean over columns; nothing without any."""
    a, b = mean(one.a for one in sides), mean(one.b for one in sides)
    if a is None or b is None:
        return []
    return [Sides(MEAN, a, b, sum(one.n for one in sides), sides[0].metric)]


def judged(claim: Claim, sides: Sequence[Sides], part: str = "") -> Finding:
    """Return the verdict on a claim about two rows.

    Args:
        sides: the two rows in the claim's column, or in all columns of which one must bear it out.
        part: `3 of 4 columns`, if not all of the claim's were measured.
    """
    if not sides:
        return Finding("not measured", 0, OPEN)
    gaps = [(one, one.beyond(claim)) for one in sides]
    tests = [one.p(claim) for one in sides]
    adjusted = stats.holm([1.0 if p is None else p for p in tests])
    proven = [
        one for one, p in zip(gaps, adjusted, strict=True) if one[1].value > 0 and p is not None and p < stats.ALPHA
    ]
    best = max(proven or gaps, key=lambda pair: pair[1].value)[0]
    fails = all(g.value < 0 and p is not None and p < stats.ALPHA for (_, g), p in zip(gaps, tests, strict=True))
    fails = fails and not (part and claim.column == ANY)  # another column may bear it out
    named = [best.head] * (claim.column == ANY) + [part] * bool(part)
    where = f" ({'; '.join(named)})" if named else ""
    return Finding(best.text(claim) + where, best.n, HOLDS if proven else FAILS if fails else OPEN)
