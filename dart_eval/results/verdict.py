"""Which row of a level is best, in a sentence, as far as the paired tests allow.

Rows are compared in the block's first metric, in perplexities, and in the log-likelihood of right answers, which
separates rows with fewer documents than an accuracy. One row is ahead of another in a metric if it leads by more than
`MATTERS`, and by so much that noise does not explain it. A row is behind another one if that is ahead in some metric,
and the row in none. The leader is the first row by the first metric that is not behind another. Rows that are neither
behind nor ahead are tied with it; of them the cheapest is named.

The leader was chosen by the tested values, so each p counts for all pairs that could have been chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dart_eval.results import metrics, stats
from dart_eval.results.board import PRUNED, ROUNDING, WIDTH_OF_LEVEL, Block, Row, place
from dart_eval.results.format import multiple, percent, short
from dart_eval.results.stats import Estimate

MATTERS = 0.005  # half a point of an accuracy, .005 nats a word or an answer: a smaller lead is no reason to pay more
LIKELIHOOD = "log-likelihood"  # of right answers
MOST_NAMED = 3  # rows that a sentence names
AHEAD, BEHIND, TIED, SPLIT, UNTESTED = "ahead", "behind", "tied", "split", "untested"


@dataclass(frozen=True, eq=False)
class Stand:
    """A row beside the leader: the metrics in which the leader is ahead, and those in which the row is."""

    row: Row
    better: Sequence[str] = ()
    worse: Sequence[str] = ()
    tested: bool = False

    @property
    def word(self) -> str:
        """Where the row stands."""
        if self.worse:
            return SPLIT if self.better else AHEAD
        return BEHIND if self.better else TIED if self.tested else UNTESTED


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the tests say of a level.

    Attributes:
        leader: the first row that is not behind another.
        stands: of the other pruned rows.
        control: the best rounding that reads no more, beside the leader; None without any.
        take: the row to take: the leader, the cheapest that is tied with it, or the rounding that is ahead.
    """

    leader: Row
    stands: Sequence[Stand]
    control: Stand | None
    take: Row

    @property
    def tied(self) -> list[Row]:
        """The leader, and the rows that are tied with it."""
        return [self.leader, *(stand.row for stand in self.stands if stand.word == TIED)]

    @property
    def best(self) -> Row | None:
        """The row that is ahead of every other pruned row; None without one."""
        return self.leader if self.stands and all(stand.word == BEHIND for stand in self.stands) else None

    def mark(self, row: Row) -> str:
        """Return `*` for the best row, `~` for the rows that are tied at the head of those behind them."""
        if row is self.best:
            return "*"
        words = {stand.word for stand in self.stands}
        return "~" if BEHIND in words and not words & {AHEAD, SPLIT} and row in self.tied else ""


def verdicts(block: Block) -> list[Verdict | None]:
    """Return the verdict on each level of a block; None where nothing can be compared at equal reads."""
    rounded = [row for row in block.rows if row.kind == ROUNDING and block.first in row.quality]
    return [_verdict(level, rounded, block.first) for level in block.levels]


def _verdict(rows: Sequence[Row], rounded: Sequence[Row], first: str) -> Verdict | None:
    """Return the verdict on rows, best first. rounded: the block's rows of rounding."""
    rivals = [row for row in rows if row.kind == PRUNED and first in row.quality]
    most = max(row.read for row in rows) + WIDTH_OF_LEVEL
    fitting = sorted((row for row in rounded if row.read <= most), key=lambda row: place(row, first))
    if not rivals or all(row.read >= 1 for row in rivals) or any(row.about for row in rows):
        return None
    leader, stands = _leader(rivals)
    control = None
    if fitting:
        (control,) = _stands(leader, [_leader(fitting)[0]], float(len(fitting) * len(rivals)))
    verdict = Verdict(leader, stands, control, leader)
    if control is not None and control.word == AHEAD and all(s.word not in (AHEAD, SPLIT) for s in stands):
        return replace(verdict, take=control.row)
    return replace(verdict, take=min(verdict.tied, key=_cost))


def _cost(row: Row) -> tuple[float, int]:
    """Return the sort key of rows by what they cost beside the bytes that they read: FLOPs, then memory."""
    return round(row.overhead, 4), row.bytes_of("beside") or 0


def _leader(rows: Sequence[Row]) -> tuple[Row, list[Stand]]:
    """Return the first row that is not behind another, and the stands of the others; else the first row.

    Args:
        rows: by the first metric, the best first.
    """
    first = None
    for row in rows:
        stands = _stands(row, [other for other in rows if other is not row], len(rows) / 2)
        first = first or (row, stands)
        if all(stand.word not in (AHEAD, SPLIT) for stand in stands):
            return row, stands
    assert first is not None
    return first


def _stands(leader: Row, others: Sequence[Row], chosen: float) -> list[Stand]:
    """Compare each row with the leader.

    Args:
        chosen: factor on each p, since the leader was chosen by the tested values. Holm's correction then covers all
            rows and metrics.
    """
    tests = [(row, metric, lead) for row in others for metric, lead in _leads(leader, row)]
    p_values = [_p(lead) for _, _, lead in tests]
    adjusted = stats.holm([None if p is None else min(1.0, chosen * p) for p in p_values])
    stands = []
    for row in others:
        own = [(metric, lead.value, p) for (of, metric, lead), p in zip(tests, adjusted, strict=True) if of is row]
        ahead = [(metric, value) for metric, value, p in own if p is not None and p < stats.ALPHA]
        better, worse = ([metric for metric, value in ahead if sign * value > 0] for sign in (1, -1))
        stands.append(Stand(row, better, worse, any(p is not None for *_, p in own)))
    return stands


def _p(lead: Estimate) -> float | None:
    """Return two-sided p of a lead of at most `MATTERS`; None if it cannot be tested."""
    beyond = abs(lead.value) - MATTERS
    if beyond > 0:
        return replace(lead, value=math.copysign(beyond, lead.value)).p
    return 1.0 if lead.smallest >= stats.MIN_CLUSTERS and math.isfinite(lead.value) else None


def _leads(a: Row, b: Row) -> Iterator[tuple[str, Estimate]]:
    """Yield A - B in the block's first metric, in perplexities and log-likelihoods; positive if A is better."""
    for i, (metric, quality) in enumerate(a.quality.items()):
        if i and metrics.kind_of(metric).group != metrics.PERPLEXITY:
            continue  # the family of tests must not depend on other contents of the folder
        other = b.quality.get(metric)
        if quality.better is not None and other is not None and other.better is not None:
            yield metrics.title_of(metric), quality.better - other.better
    if a.nats is not None and b.nats is not None:
        yield LIKELIHOOD, a.nats - b.nats


# -- in words ----------------------------------------------------------------------------------------------------------


def sentence(verdict: Verdict) -> str:
    """Return a verdict in a sentence.

    `At 30 % grinqh is best (perplexity 1.010x [1.007, 1.013]). Rounding (dense on q4_k: perplexity 1.14x) is behind.`
    """
    leader, tied, at = verdict.leader, verdict.tied, f"At {percent(verdict.leader.read)}"
    ahead = [stand.row for stand in verdict.stands if stand.word in (AHEAD, SPLIT)]
    untested = [stand.row for stand in verdict.stands if stand.word == UNTESTED]
    amount = _amounts(leader)
    if ahead:
        said = f"{at} no row is best: {leader.name} has {amount}, and {_listed(ahead)} {_is(ahead)} ahead in a metric"
    elif verdict.best is not None:
        said = f"{at} {leader.name} is best: {amount}"
    elif len(tied) > 1 and verdict.take in tied:
        others = [row for row in tied if row is not verdict.take]
        cost = ", which costs less" if verdict.take.overhead < min(row.overhead for row in others) else ""
        said = f"{at} {_listed(others)} {_is(others)} tied with {verdict.take.name}{cost}: {_amounts(verdict.take)}"
    else:
        said = f"{at} {leader.name} has {amount}"
    said += f"; not tested against {_listed(untested)}" if untested else ""
    if verdict.control is None:
        return f"{said}."
    words = {AHEAD: "ahead", BEHIND: "behind", TIED: "tied", SPLIT: "ahead in one metric and behind in another"}
    stands = words.get(verdict.control.word, "not tested")
    return f"{said}. Rounding ({verdict.control.row.name}: {_amounts(verdict.control.row)}) is {stands}."


def _amounts(row: Row) -> str:
    """Return the quality relative to dense's: `73 % above guessing [60, 86], perplexity 1.34x`."""
    texts = [_amount(row, metric, i == 0) for i, metric in enumerate(row.quality)]
    return ", ".join([*texts[:1], *(text for text in texts[1:] if text.startswith("perplexity"))])


def _amount(row: Row, metric: str, ends: bool) -> str:
    quality = row.quality[metric]
    if metrics.kind_of(metric).group == metrics.PERPLEXITY and quality.times:
        value, interval = quality.times
        return f"perplexity {multiple(value, *((interval or ()) if ends else ()))}"
    if quality.share is None:
        return f"{metrics.title_of(metric)} {short(metric, quality.value, quality.stderr)}"
    of = "above guessing" if metrics.kind_of(metric).chance else f"of dense's {metrics.title_of(metric)}"
    interval = quality.share.interval if ends else None
    return f"{percent(quality.share.value)} {of}" + (
        f" [{', '.join(percent(e)[:-2] for e in interval)}]" if interval else ""
    )


def _listed(rows: Sequence[Row]) -> str:
    names = [row.name for row in rows]
    if len(names) > MOST_NAMED:
        return f"{', '.join(names[: MOST_NAMED - 1])} and {len(names) - MOST_NAMED + 1} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _is(rows: Sequence[Row]) -> str:
    return "is" if len(rows) == 1 else "are"
