"""How much of dense's quality a cell keeps, document by document, and whether two cells differ in it.

The recovery of a task is quality over dense's quality (the other way round where lower is better). It is a smooth
function of sums over documents, so each document has an influence value on it, as in `stats`; recoveries of several
tasks are averaged by averaging these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dart_eval.results import stats
from dart_eval.results.metrics import GOLD
from dart_eval.results.outcomes import Pairs


@dataclass(frozen=True)
class Recovery:
    """A recovery and what its uncertainty follows from.

    Attributes:
        value: quality / quality of dense on the same documents.
        units: independent unit of documents -> its influence value on `value`; they sum to 0.
    """

    value: float
    units: Mapping[str, float]

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the studentised bootstrap over units; None where there are too few of them for one."""
        made = _bootstrap(self.value, self.units)
        return None if made is None or made.low is None or made.high is None else (made.low, made.high)


def of_task(found: Pairs) -> Recovery | None:
    """The recovery of one metric from its values under a pruned method and under dense; None where there is no such
    ratio.

    Perplexities are compared as they are read, exp of a mean: their ratio is exp of a difference of means.
    Log-likelihoods of right answers have no ratio: of these it is the difference, in nats per answer.
    """
    measure, x, y, units, weights = found
    if measure.higher_is_better is None:
        return None
    w = np.ones(len(x)) if weights is None else weights
    (a, slopes_a), (b, slopes_b) = stats.KINDS[measure.kind](x, w), stats.KINDS[measure.kind](y, w)
    if measure.name == GOLD:
        value, slopes = a - b, slopes_a - slopes_b
    elif measure.kind == "log-perplexity":
        value = stats.exp(b - a)
        slopes = value * (slopes_b - slopes_a)
    else:
        (good, of_good), (base, of_base) = (
            ((a, slopes_a), (b, slopes_b)) if measure.higher_is_better else ((b, slopes_b), (a, slopes_a))
        )
        if base <= 0 or good < 0:
            return None
        value = good / base
        slopes = of_good / base - value * of_base / base
    if not np.isfinite(value) or not np.isfinite(slopes).all():
        return None
    names, place = np.unique([f"{measure.task} {unit}" for unit in units], return_inverse=True)
    return Recovery(value, dict(zip(names.tolist(), np.bincount(place, slopes).tolist(), strict=True)))


def mean(recoveries: Iterable[Recovery]) -> Recovery | None:
    """The mean over tasks, each of which weighs the same; None of none."""
    found = list(recoveries)
    if not found:
        return None
    units = {unit: slope / len(found) for one in found for unit, slope in one.units.items()}  # tasks share none
    return Recovery(sum(one.value for one in found) / len(found), units)


def difference(a: Recovery, b: Recovery) -> float | None:
    """Two-sided p of the paired test of two recoveries over the same tasks; None where nothing can be tested."""
    units = {u: a.units.get(u, 0.0) - b.units.get(u, 0.0) for u in a.units.keys() | b.units.keys()}
    made = _bootstrap(a.value - b.value, units)
    return None if made is None else made.p


def _bootstrap(value: float, units: Mapping[str, float]) -> stats.Studentised | None:
    """What the bootstrap says of a value; None where its units are too few, or all the same."""
    slopes = np.array([units[unit] for unit in sorted(units)])
    return stats.bootstrap_t(slopes, value) if len(slopes) >= stats.MIN_CLUSTERS and slopes.any() else None
