"""Which row of a level is best, as far as the paired tests allow (docs/numbers.md).

A row is ahead of another in a metric if it leads by more than `MATTERS`, and by so much that noise does not explain it;
it is behind if the other one is ahead in some metric, and it in none. The leader is the first row by the first metric
that is not behind another. It was chosen by the tested values, so each p counts for all pairs that could have been.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dart_eval.results import metrics, stats
from dart_eval.results.board import PRUNED, ROUNDING, WIDTH_OF_LEVEL, Block, Row, place
from dart_eval.results.stats import Estimate

MATTERS = 0.005  # half a point of an accuracy, .005 nats a word or an answer: a smaller lead is no reason to pay more
AHEAD, BEHIND, TIED, SPLIT, UNTESTED = "ahead", "behind", "tied", "split", "untested"


class Stand(NamedTuple):
    """A row, and where it stands beside the leader: one of the words above."""

    row: Row
    word: str


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the tests say of a level."""

    leader: Row  # the first row that is not behind another
    stands: Sequence[Stand]  # of the other pruned rows
    control: Stand | None  # the best rounding that reads no more; None without any
    take: Row  # the leader, the cheapest row that is tied with it, or the rounding that is ahead

    def of(self, *words: str) -> list[Row]:
        """Return the other pruned rows that stand so beside the leader."""
        return [stand.row for stand in self.stands if stand.word in words]

    @property
    def best(self) -> Row | None:
        """The row that is ahead of every other pruned row; None without one."""
        return self.leader if self.stands and len(self.of(BEHIND)) == len(self.stands) else None

    def mark(self, row: Row) -> str:
        """Return `*` for the best row, `~` for the rows that are tied at the head of those behind them."""
        if row is self.best:
            return "*"
        head = self.of(BEHIND) and not self.of(AHEAD, SPLIT)
        return "~" if head and row in (self.leader, *self.of(TIED)) else ""


def verdicts(block: Block) -> list[Verdict | None]:
    """Return the verdict on each level of a block; None where nothing can be compared at equal reads."""
    rounded = [row for row in block.rows if row.kind == ROUNDING and block.first in row.quality]
    return [_verdict(level, rounded, block.first) for level in block.levels]


def _verdict(rows: Sequence[Row], rounded: Sequence[Row], first: str) -> Verdict | None:
    """Return the verdict on rows, best first. rounded: the block's rows of rounding."""
    rivals = [row for row in rows if row.kind == PRUNED and first in row.quality]
    if not rivals or all(row.read >= 1 for row in rivals) or any(row.about for row in rows):
        return None
    most = max(row.read for row in rows) + WIDTH_OF_LEVEL
    fitting = sorted((row for row in rounded if row.read <= most), key=lambda row: place(row, first))
    leader, stands = _leader(rivals)
    control = None
    if fitting:
        (control,) = _stands(leader, [_leader(fitting)[0]], float(len(fitting) * len(rivals)))
    verdict = Verdict(leader, stands, control, leader)
    if control is not None and control.word == AHEAD and not verdict.of(AHEAD, SPLIT):
        return replace(verdict, take=control.row)
    costs = {row: (round(row.overhead, 4), row.bytes_of("beside") or 0) for row in (leader, *verdict.of(TIED))}
    return replace(verdict, take=min(costs, key=costs.__getitem__))


def _leader(rows: Sequence[Row]) -> tuple[Row, list[Stand]]:
    """Return the first row that is not behind another, and the stands of the others; else the first row.

    Args:
        rows: by the first metric, the best first.
    """
    candidates = []
    for row in rows:
        candidates.append((row, _stands(row, [other for other in rows if other is not row], len(rows) / 2)))
        if all(stand.word not in (AHEAD, SPLIT) for stand in candidates[-1][1]):
            return candidates[-1]
    return candidates[0]


def _stands(leader: Row, others: Sequence[Row], chosen: float) -> list[Stand]:
    """Compare each row with the leader.

    Args:
        chosen: factor on each p, since the leader was chosen by the tested values. Holm's correction then covers all
            rows and metrics.
    """
    leads = [(row, lead) for row in others for lead in _leads(leader, row)]
    p_values = [_p(lead) for _, lead in leads]
    adjusted = stats.holm([None if p is None else min(1.0, chosen * p) for p in p_values])
    stands = []
    for row in others:
        own = [(lead.value, p) for (of, lead), p in zip(leads, adjusted, strict=True) if of is row and p is not None]
        signs = {value > 0 for value, p in own if p < stats.ALPHA}  # True: the leader is ahead in a metric
        word = SPLIT if len(signs) == 2 else BEHIND if True in signs else AHEAD if signs else TIED if own else UNTESTED
        stands.append(Stand(row, word))
    return stands


def _p(lead: Estimate) -> float | None:
    """Return two-sided p of a lead of at most `MATTERS`; None if it cannot be tested."""
    beyond = abs(lead.value) - MATTERS
    if beyond > 0:
        return replace(lead, value=math.copysign(beyond, lead.value)).p
    return 1.0 if lead.smallest >= stats.MIN_CLUSTERS and math.isfinite(lead.value) else None


def _leads(a: Row, b: Row) -> Iterator[Estimate]:
    """Yield A - B, positive if A is better, in the block's first metric, in perplexities and in log-likelihoods.

    Log-likelihoods of right answers separate rows with fewer documents than an accuracy.
    """
    for i, (metric, quality) in enumerate(a.quality.items()):
        if i and metrics.kind_of(metric).group != metrics.PERPLEXITY:
            continue  # the family of tests must not depend on other contents of the folder
        other = b.quality.get(metric)
        if quality.better is not None and other is not None and other.better is not None:
            yield quality.better - other.better
    if a.nats is not None and b.nats is not None:
        yield a.nats - b.nats
