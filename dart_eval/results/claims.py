"""Claims of a paper and what was measured: a verdict for each, with its interval and the number of documents.

A claim says that a row is better than another by so much (`by`) or so many times as good (`times`), or that a cost is
at most so large. It holds if the paired 95 % interval lies on its side, fails if it lies on the other, and is open in
between. The costs of a claim about a `shape` are counted on a model of that shape without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dart_eval.results import metrics, stats
from dart_eval.results.estimates import Estimate, mean, share
from dart_eval.results.format import number
from dart_eval.results.paper_layout import FIELDS, MEAN, PaperColumn, TableLayout
from dart_eval.results.paper_tables import Paper
from dart_eval.results.writers import Table

ANY = "any"  # as a claim's column: at least one of them
HOLDS, FAILS, OPEN = "holds", "fails", "open"
HEADS = ["claim", "verdict", "measured", "n"]
SHAPED = {"state MB": 1e6, "overhead %": 0.01}  # what a shape's cost is counted in
NOTE = (
    "measured: the first row minus the second (of perplexities, in nats), or its ratio to the second, with the paired "
    "95 % interval. holds: the interval lies on the claim's side. fails: it lies on the other side. open: it reaches "
    "over both, or there are too few documents. For a claim on at least one column the best one is shown, and "
    "its test is Holm's over all. n: documents. A verdict is of the models and documents measured here, not of the "
    "paper's."
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
        partial: whether they are a mean without some of its columns.
    """

    head: str
    a: Estimate
    b: Estimate
    n: int
    metric: str
    partial: bool = False

    def beyond(self, claim: Claim) -> Estimate:
        """By how much the row exceeds what is claimed of it."""
        gap = self.a - (self.b if claim.times is None else self.b.times(claim.times))
        return Estimate(gap.value - (claim.by if claim.times is None else 0.0), gap.units)

    def text(self, claim: Claim) -> str:
        """What was measured, in words."""
        if claim.times is not None:
            ratio = share(self.a, self.b)
            ends = ratio.interval if ratio else None
            nothing = "no ratio: the second row is not above 0 by more than noise"
            value = f"{ratio.value:.2f} times" if ratio else nothing
            return value + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
        gap, kind = self.a - self.b, metrics.kind_of(self.metric)
        scale, unit, digits = (100.0, " points", 1) if kind.percent else (1.0, "", 3)
        ends = gap.interval
        return f"{scale * gap.value:+.{digits}f}{unit}" + (
            f" [{scale * ends[0]:+.{digits}f}, {scale * ends[1]:+.{digits}f}]" if ends else ""
        )


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
    return Finding(f"{cost:.2g} {claim.column.split()[-1]}, counted", 0, HOLDS if cost <= claim.at_most else FAILS)


def _of_table(claim: Claim, paper: Paper, layout: TableLayout) -> Finding:
    if claim.at_most is not None:
        column = next(c for c in layout.columns if c.head == claim.column)
        return _cost(claim, column, paper.cost(layout, claim.rows[0], claim.sparsity, claim.column))
    heads = list(layout.parts) if claim.column == ANY else [claim.column]
    sides = [Sides(*one) for h in heads if (one := paper.sides(layout, claim.rows, claim.sparsity, h)) is not None]
    if claim.column == MEAN and not sides:
        sides = _mean(claim, paper, layout)
    return judged(claim, sides)


def _mean(claim: Claim, paper: Paper, layout: TableLayout) -> list[Sides]:
    """Return the mean over the columns that were measured, where not all were; nothing without any."""
    each = [paper.sides(layout, claim.rows, claim.sparsity, column.head) for column in layout.columns]
    found = [Sides(*one) for one in each if one is not None]
    if not found:
        return []
    a, b = (mean([getattr(one, side) for one in found]) for side in ("a", "b"))
    assert a is not None and b is not None
    head = f"{len(found)} of {len(each)} columns"
    return [Sides(head, a, b, sum(one.n for one in found), found[0].metric, partial=True)]


def _cost(claim: Claim, column: PaperColumn, cost: float | None) -> Finding:
    if cost is None or claim.at_most is None:
        return Finding("not measured", 0, OPEN)
    return Finding(number(cost, FIELDS[column.field][1]), 0, HOLDS if cost <= claim.at_most else FAILS)


def judged(claim: Claim, sides: Sequence[Sides]) -> Finding:
    """Return the verdict on a claim about two rows.

    Args:
        sides: the two rows in the claim's column, or in all columns of which one must bear it out.
    """
    if not sides:
        return Finding("not measured", 0, OPEN)
    gaps = [(one, one.beyond(claim)) for one in sides]
    tests = [g.p for _, g in gaps]
    adjusted = stats.holm([1.0 if p is None else p for p in tests])
    proven = [
        one for one, p in zip(gaps, adjusted, strict=True) if one[1].value > 0 and p is not None and p < stats.ALPHA
    ]
    best = max(proven or gaps, key=lambda pair: pair[1].value)[0]
    fails = all(g.value < 0 and p is not None and p < stats.ALPHA for (_, g), p in zip(gaps, tests, strict=True))
    where = f" ({best.head})" if len(sides) > 1 or best.partial else ""
    return Finding(best.text(claim) + where, best.n, HOLDS if proven else FAILS if fails else OPEN)
