"""The best row of a level and its cost: a sentence each, as far as the paired tests allow.

Rows are compared in the block's first metric, in perplexities, and in the log-likelihood of right answers, which
separates rows with fewer documents than an accuracy. A row is behind another one if a test favours that one and none
favours the row. The leader is the first row by the first metric that no test puts behind another. If tests favour each
of two rows, no row is best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dart_eval.results import metrics, stats
from dart_eval.results.blocks import PRUNED, WIDTH_OF_LEVEL, BoardRow, Level
from dart_eval.results.estimates import Estimate
from dart_eval.results.format import multiple, percent, short

BEST, LEVEL_WITH_BEST = "best", "not told apart"
LIKELIHOOD = "log-likelihood"  # of right answers
MOST_NAMED = 3  # rows that a sentence names
PERPLEXITY = "perplexity"
BEHIND, LEVEL, AHEAD, SPLIT, UNTESTED = "behind", "level", "ahead", "split", "untested"


def place(row: BoardRow, first: str | None) -> tuple[bool, float]:
    """Return the sort key of a level's rows: the best first, those without the first metric last."""
    quality = row.quality.get(first or "")
    value = math.nan
    if quality is not None:
        logs = quality.better if metrics.kind_of(first or "").group == metrics.PERPLEXITY else None
        down = any(m.metric.partition(",")[0] == first and m.higher_is_better is False for m in row.values.values())
        value = logs.value if logs else -quality.value if down else quality.value  # of perplexities the geometric mean
    return (True, 0.0) if math.isnan(value) else (False, -value)


def judged(rows: Sequence[BoardRow], rounded: Sequence[BoardRow], first: str) -> Level:
    """Return the level of rows, with their marks.

    Args:
        rows: best first.
        rounded: the block's rows of rounding; the best of those that read no more counts.
        first: the metric that orders rows.
    """
    rivals = [r for r in rows if r.kind == PRUNED and first in r.quality]
    most = max(r.read for r in rows) + WIDTH_OF_LEVEL
    fitting = sorted((r for r in rounded if r.read <= most and first in r.quality), key=lambda r: place(r, first))
    if not rivals or all(r.read >= 1 for r in rivals) or any(r.about for r in rows):
        return Level(tuple(rows))
    if len(rivals) + len(fitting) < 2:
        return Level(tuple(rows), take=rivals[0])
    leader, stands = leader_of(rivals)
    quality = [_quality(leader, stands, rivals[0])]
    wins, take, alone = False, leader, False
    if fitting:
        control, _ = leader_of(fitting)
        (stand,) = stand_of(leader, [control], float(len(fitting) * len(rivals)))
        wins = stand.word == AHEAD and all(s.word not in (AHEAD, SPLIT) for s in stands)
        take = control if wins else leader
        alone = len(rivals) == 1 and stand.word == BEHIND
        more = place(control, first) < place(leader, first) and stand.word == BEHIND
        quality.append(
            f"The best rounding here ({control.name}, {percent(control.read)}: {_amounts(control)}) {_beside(stand)}"
            + (f"; its lead in {metrics.title_of(first)} may be noise." if more else ".")
        )
    words = {stand.word for stand in stands}
    named = BEHIND in words and not words & {AHEAD, SPLIT}
    marks = {stand.row.keys: LEVEL_WITH_BEST for stand in stands if named and stand.word == LEVEL}
    marks |= {leader.keys: BEST} if named else {}
    sentences = (" ".join(quality), *_cost(leader, [*(stand.row for stand in stands), *fitting]))
    return Level(tuple(replace(r, mark=marks.get(r.keys, "")) for r in rows), sentences, wins,
                 replace(take, mark=marks.get(take.keys, "")), alone)  # fmt: skip


@dataclass(frozen=True)
class Stand:
    """A row beside the leader: the adjusted p of each metric in which the leader is better, and worse."""

    row: BoardRow
    better: dict[str, float]
    worse: dict[str, float]
    tested: bool = False

    @property
    def word(self) -> str:
        if self.worse:
            return SPLIT if self.better else AHEAD
        return BEHIND if self.better else LEVEL if self.tested else UNTESTED


def leader_of(rows: Sequence[BoardRow]) -> tuple[BoardRow, list[Stand]]:
    """Return the first row that no test puts behind another, and the stands of the others; else the first row.

    Args:
        rows: by the first metric, the best first.
    """
    found = None
    for row in rows:
        stands = stand_of(row, [r for r in rows if r is not row], len(rows) / 2)
        found = found or (row, stands)
        if all(stand.word not in (AHEAD, SPLIT) for stand in stands):
            return row, stands
    assert found is not None
    return found


def stand_of(leader: BoardRow, others: Sequence[BoardRow], chosen: float) -> list[Stand]:
    """Compare each row with the leader.

    Args:
        chosen: factor on each p, since the leader was chosen by the tested values. Holm's correction then covers all
            rows and metrics.
    """
    tests = [(row, metric, d) for row in others for metric, d in _differences(leader, row)]
    counted = [None if d.p is None else min(1.0, chosen * d.p) for _, _, d in tests]
    able = {row.keys for row, _, d in tests if d.p is not None or d.none}
    stands = {row.keys: Stand(row, {}, {}, row.keys in able) for row in others}
    for (row, metric, difference), p in zip(tests, stats.holm(counted), strict=True):
        if p is not None and p < stats.ALPHA:
            stand = stands[row.keys]
            (stand.better if difference.value > 0 else stand.worse)[metric] = p
    return list(stands.values())


def _differences(a: BoardRow, b: BoardRow) -> Iterator[tuple[str, Estimate]]:
    """Yield A - B in the block's first metric, in perplexities and log-likelihoods; positive if A is better."""
    for i, (metric, quality) in enumerate(a.quality.items()):
        if i and metrics.kind_of(metric).group != metrics.PERPLEXITY:
            continue  # the family of tests must not depend on other contents of the folder
        other = b.quality.get(metric)
        if quality.better is not None and other is not None and other.better is not None:
            yield metrics.title_of(metric), quality.better - other.better
    if a.nats is not None and b.nats is not None:
        yield LIKELIHOOD, a.nats - b.nats


def _quality(leader: BoardRow, stands: Sequence[Stand], first: BoardRow) -> str:
    """`At 30 % grinqh is the best pruned row: 100 % of what dense has above guessing [83, 117]; better than ...`"""
    behind, level, untested = ([s for s in stands if s.word == word] for word in (BEHIND, LEVEL, UNTESTED))
    against = [s for s in stands if s.word in (AHEAD, SPLIT)]
    at, amount = f"At {percent(leader.read)}", _amounts(leader, ends=True)
    if against:
        alike = ([s for s in against if s.word == word] for word in (AHEAD, SPLIT))
        said = ", and ".join(f"{_names(some)} {_beside(*some)}" for some in alike if some)
        return f"{at} no row is best: {leader.name} is first, and {said}."
    if not behind:
        if first is not leader:
            return f"{at} {leader.name} is the first row that no test finds worse than another; it has {amount}."
        said = f"no row is told apart from {leader.name}, which" if level else leader.name
        return f"{at} {said} has {amount}{f'; not tested against {_names(untested)}' if untested else ''}."
    than = "every other pruned row" if len(behind) == len(stands) > 1 else _names(behind)
    shared = _shared([s.better for s in behind])
    largest = max(p for s in behind for p in ([s.better[name] for name in shared] or [min(s.better.values())]))
    bound = next(limit for limit in (1e-3, 0.01, stats.ALPHA) if largest < limit)
    text = f"{at} {leader.name} is the best pruned row: {amount}; better than {than}{_by(s.better for s in behind)}"
    text += f" (paired, Holm p < {bound:g})"
    text += f", not told apart from {_names(level)}" if level else ""
    text += f", not tested against {_names(untested)}" if untested else ""
    lead = f" The lead of {first.name} in {metrics.title_of(next(iter(leader.quality)))} may be noise."
    return f"{text}.{lead if first is not leader else ''}"


def _beside(*stands: Stand) -> str:
    """Return the tests' result for rows beside the leader: `is worse by perplexity`."""
    worse, better = _by(s.better for s in stands), _by(s.worse for s in stands)
    found = [f"better{better}" * any(s.worse for s in stands), f"worse{worse}" * any(s.better for s in stands)]
    verb = "is" if len(stands) == 1 else "are"
    return f"{verb} {' and '.join(filter(None, found)) or 'not told apart from it'}"


def _by(tests: Iterable[dict[str, float]]) -> str:
    """Return the metrics that all tests share: ` by perplexity and log-likelihood`; empty without any."""
    common = _shared(list(tests))
    return f" by {_listed(common)}" if common else ""


def _shared(tests: Sequence[dict[str, float]]) -> list[str]:
    """Return the metrics that all tests share."""
    return [name for name in tests[0] if all(name in other for other in tests)] if tests else []


def _names(stands: Sequence[Stand]) -> str:
    return _listed([stand.row.name for stand in stands])


def _amounts(row: BoardRow, ends: bool = False) -> str:
    """Return the quality relative to dense's: `73 % above guessing, perplexity 1.34x`."""
    found = [_amount(row, metric, ends and i == 0) for i, metric in enumerate(row.quality)]
    return ", ".join([*found[:1], *(said for said in found[1:] if said.startswith(PERPLEXITY))])


def _amount(row: BoardRow, metric: str, ends: bool = False) -> str:
    """`100 % of what dense has above guessing [83, 117]`, or `perplexity 1.08x [1.06, 1.10]`, times dense's."""
    quality = row.quality[metric]
    if metrics.kind_of(metric).group == metrics.PERPLEXITY and quality.times:
        value, interval = quality.times
        return f"{PERPLEXITY} {multiple(value, *((interval or ()) if ends else ()))}"
    if quality.share is None:
        return f"{metrics.title_of(metric)} {short(metric, quality.value, quality.stderr)}"
    said = percent(quality.share.value)
    if ends:
        said += f" of what dense has{' above guessing' * metrics.kind_of(metric).chance}"
        said += f" [{', '.join(percent(end)[:-2] for end in quality.share.interval)}]" if quality.share.interval else ""
    return said


def _cost(leader: BoardRow, others: Sequence[BoardRow]) -> list[str]:
    """Return the leader's speed, and the rows that are faster than dense; empty without speeds."""
    faster = [
        f"{row.name} ({row.speed.speedup.median:.2f}x; {_amounts(row)})"
        for row in others if row.speed and row.speed.speedup and row.speed.speedup.low > 1
    ]  # fmt: skip
    ratio = leader.speed and leader.speed.speedup
    own = [] if leader.speed is None else [f"No kernel here makes {leader.name} faster than dense yet."]
    if ratio:
        own = [f"{leader.name} decodes {ratio.median:.2f}x as fast as dense."]
    also = "Faster today" if not ratio else "Also faster than dense" if ratio.low > 1 else "Faster than dense"
    said = [*own, *([f"{also}: {_listed(faster)}."] if faster else [])]
    return [" ".join(said)] if said else []


def _listed(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMED:
        return f"{', '.join(names[: MOST_NAMED - 1])} and {len(names) - MOST_NAMED + 1} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
