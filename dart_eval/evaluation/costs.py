"""The cost of scored or generated tokens: weights that were not read, and the distance of a row from dense.

The distance is that of its next-token distributions from dense's, at the scored positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, NamedTuple

from torch import Tensor

from dart_eval.results import sums
from dart_eval.results.metrics import kind_of
from dart_eval.results.record import CLOSED, Count, Drift, Finite, Metric, holds
from dart_eval.util.text import Json

PER_DOUBLING, LOWEST = 8, -160  # bins; bin i ends at 2 ** (i / 8) nats, and the lowest one has all up to 2 ** -20
TAILS = {"kl_p50": 0.5, "kl_p95": 0.95, "kl_p99": 0.99}


def divergences(dense: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(dense || row) and KL(row || dense) in nats, [n] fp32 each, right to about 1e-6.

    With x and y minus their maxima the first is sum e^x (x - y) / sum e^x - log sum e^x + log sum e^y. It uses
    differences of logits, since log_softmax in fp32 is off by up to 1e-4 over a large vocabulary.

    Args:
        dense: [n, V] logits in fp32; a word of -inf is ruled out.
        row: the same of the row that is compared with dense.
    """
    x, y = dense - dense.amax(1, keepdim=True), row - row.amax(1, keepdim=True)
    of_x, of_y, apart = x.exp(), y.exp(), x.sub_(y)
    total, rest = of_x.sum(1), of_y.sum(1)
    shift = (total / rest).log()
    forward = of_x.mul_(apart).nansum(1) / total - shift
    return forward.clamp_min_(0), (shift - of_y.mul_(apart).nansum(1) / rest).clamp_min_(0)


def bin_of(kl: float) -> str:
    """Return the bin of a position: the smallest i with kl <= 2 ** (i / 8), as text."""
    return str(max(LOWEST, math.ceil(PER_DOUBLING * math.log2(kl))) if 0 < kl < math.inf else LOWEST)


def percentile(bins: Mapping[str, int], share: float) -> float:
    """Return the smallest KL that a share of the positions does not exceed, as its bin's middle, 2 ** ((i - 1/2) / 8).

    The middle is within 4.5 % of it, and so surely within 9 %; it is 0 in the lowest bin.

    Args:
        bins: bin -> positions in it; not empty.
        share: above 0, up to 1.
    """
    rank, below = math.ceil(share * sum(bins.values())), 0
    for i in sorted(map(int, bins)):
        below += bins[str(i)]
        if below >= rank:
            break
    return 0.0 if i == LOWEST else 2 ** ((i - 0.5) / PER_DOUBLING)


class Apart(NamedTuple):
    """The distance at one position."""

    kl: float  # KL(dense || row)
    reverse: float  # KL(row || dense)
    same: bool  # whether the likeliest tokens are the same
    moved: float  # by how much the probability of the scored token has changed


@dataclass(frozen=True)
class Distance:
    """The distance at some positions. A position counts once per answer; distances are added by `+`.

    Attributes:
        kl: sum of KL(dense || row) over the positions, in nats.
        reverse: sum of KL(row || dense).
        moved: sum of squares of the change of the scored token's probability.
        agreed: positions with the same likeliest token.
        positions: compared positions.
        bins: bin -> positions whose KL is in it, see `bin_of`.
    """

    __pydantic_config__ = CLOSED

    kl: Finite = 0.0
    reverse: Finite = 0.0
    moved: Finite = 0.0
    agreed: Count = 0
    positions: Count = 0
    bins: dict[str, Count] = field(default_factory=dict)

    def __add__(self, other: Distance) -> Distance:
        bins = {i: self.bins.get(i, 0) + other.bins.get(i, 0) for i in {**self.bins, **other.bins}}
        totals = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Distance) if f.name != "bins"}
        return Distance(**totals, bins=bins)

    @classmethod
    def of(cls, positions: Sequence[Apart]) -> Distance:
        """Of one answer."""
        return cls(
            math.fsum(at.kl for at in positions), math.fsum(at.reverse for at in positions),
            math.fsum(at.moved**2 for at in positions), sum(at.same for at in positions), len(positions),
            dict(Counter(bin_of(at.kl) for at in positions)),
        )  # fmt: skip

    def pairs(self) -> dict[str, list[float]]:
        """Return a document's sums over its positions, and their number; empty without positions."""
        totals = {"kl": self.kl, "kl_reverse": self.reverse, "rms_dp": self.moved, "top1": self.agreed}
        return {name: [value, self.positions] for name, value in totals.items()} if self.positions else {}


def distance_metrics(documents: Sequence[Distance], like: Metric) -> list[Metric]:
    """Return the metrics of a task or group: means over the positions, and the tail of all positions.

    Args:
        documents: its compared documents; not empty.
        like: a metric of the task.
    """
    pairs, bins = [d.pairs() for d in documents], sum(documents, Distance()).bins
    found = {name: sums.as_recorded(kind_of(name).kind or "ratio", [p[name] for p in pairs]) for name in pairs[0]}
    found |= {name: (percentile(bins, share), None) for name, share in TAILS.items()}
    return [
        Metric(
            like.task, name, value, error, len(documents), name == "top1", like.part_of, like.filter,
            weights=like.weights,
        )
        for name, (value, error) in found.items()
    ]  # fmt: skip


class _Trace(Drift):
    """A session's trace, without further keys."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]


@dataclass(frozen=True)
class Cost:
    """The tokens of answers, and the weights that they did not read. Costs are added by `+`.

    Attributes:
        tokens: scored or generated tokens.
        pruned_tokens: tokens that did not read all FFN weights.
        not_read_sum: share of the FFN weights that was not read, summed over the tokens.
        outside_sum: share of the neurons outside the mask, summed over the tokens.
        remasks: re-masks meanwhile.
        contexts: one per request or chunk.
        context_tokens: tokens of all contexts.
        distance: distance of the scored tokens from dense, if measured.
        trace: the drift detector's trace (`Session.trace`), for one context with a full window.
    """

    __pydantic_config__ = CLOSED

    tokens: Count = 0
    pruned_tokens: Count = 0
    not_read_sum: Finite = 0.0
    outside_sum: Finite = 0.0
    remasks: Count = 0
    contexts: Count = 0
    context_tokens: Count = 0
    distance: Distance = field(default_factory=Distance)
    trace: Annotated[Json | None, holds(_Trace | None)] = None

    def __add__(self, other: Cost) -> Cost:
        counts = [f.name for f in fields(Cost) if f.name != "trace"]
        total = {name: getattr(self, name) + getattr(other, name) for name in counts}
        return Cost(**total, trace=(self.trace or other.trace) if total["contexts"] == 1 else None)

    @property
    def mean_context(self) -> float:
        """Tokens per context."""
        return self.context_tokens / self.contexts if self.contexts else 0.0

    @property
    def effective_sparsity(self) -> float:
        """Share of the FFN weights that was not read, mean over all tokens, dense ones included."""
        return self.not_read_sum / self.tokens if self.tokens else 0.0

    @property
    def read(self) -> float:
        """Share of the FFN weights that was read, mean over the tokens that ran pruned."""
        return 1 - self.not_read_sum / self.pruned_tokens if self.pruned_tokens else 1.0

    @property
    def mask_sparsity(self) -> float:
        """Share of the neurons outside the mask, mean over the tokens that ran pruned."""
        return self.outside_sum / self.pruned_tokens if self.pruned_tokens else 0.0
