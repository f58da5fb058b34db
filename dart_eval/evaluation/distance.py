"""How far the next-token distributions of a pruned model lie from dense's, at the positions that are scored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dart_eval.results.layout import CLOSED, Count, Finite
from dart_eval.results.record import Metric

PER_DOUBLING, LOWEST = 8, -160  # bins; bin i ends at 2 ** (i / 8) nats, and the lowest one has all up to 2 ** -20
TAILS = {"kl_p95": 0.95, "kl_p99": 0.99}


def divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """KL(dense || pruned) of each row in nats, [n] fp32, right to about 1e-6.

    With x and y less their largest: sum e^x (x - y) / sum e^x - log sum e^x + log sum e^y. The logits' own differences
    are taken, since log_softmax in fp32 is off by up to 1e-4 over a large vocabulary.

    Args:
        dense: [n, V] logits in fp32; a word of -inf is ruled out.
        pruned: the same of the pruned model.
    """
    x, y = dense - dense.amax(1, keepdim=True), pruned - pruned.amax(1, keepdim=True)
    weight, rest = x.exp(), y.exp().sum(1)
    total = weight.sum(1)
    return (weight.mul_(x.sub_(y)).nansum(1) / total - (total / rest).log()).clamp_min_(0)


def bin_of(kl: float) -> str:
    """The bin of a position: the smallest i with kl <= 2 ** (i / 8), as text."""
    return str(max(LOWEST, math.ceil(PER_DOUBLING * math.log2(kl))) if 0 < kl < math.inf else LOWEST)


def percentile(bins: Mapping[str, int], share: float) -> float:
    """The smallest KL that this share of the positions does not exceed: its bin's middle (2 ** ((i - 1/2) / 8)), which
    is within 4.5 % of it, and so surely within 9 %; 0 in the lowest bin.

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


@dataclass(frozen=True)
class Distance:
    """Of some positions, a position counting once for each answer that it is of. Distances are added up by `+`.

    Attributes:
        kl: sum of KL(dense || pruned) over the positions, in nats.
        agreed: positions at which both have the same likeliest token.
        positions: that were compared; 0 where nothing was.
        bins: bin -> positions whose KL is in it, see `bin_of`.
    """

    __pydantic_config__ = CLOSED

    kl: Finite = 0.0
    agreed: Count = 0
    positions: Count = 0
    bins: dict[str, Count] = field(default_factory=dict)

    def __add__(self, other: Distance) -> Distance:
        bins = {i: self.bins.get(i, 0) + other.bins.get(i, 0) for i in {**self.bins, **other.bins}}
        return Distance(self.kl + other.kl, self.agreed + other.agreed, self.positions + other.positions, bins)

    @classmethod
    def of(cls, found: Sequence[tuple[float, bool]]) -> Distance:
        """Of one answer. found: the KL of each position, and whether the likeliest tokens are the same."""
        bins = Counter(bin_of(kl) for kl, _ in found)
        return cls(math.fsum(kl for kl, _ in found), sum(same for _, same in found), len(found), dict(bins))

    def pairs(self) -> dict[str, list[float]]:
        """What a document stores: sums over its positions, and their number. Empty where nothing was compared."""
        return {"kl": [self.kl, self.positions], "top1": [self.agreed, self.positions]} if self.positions else {}


def rows(documents: Sequence[Distance], like: Metric, error: Mapping[str, float | None]) -> list[Metric]:
    """What a record says of a task or group: means over the positions, and the tail of all positions.

    Args:
        documents: those of its documents that were compared; not empty.
        like: a metric of the task.
        error: the standard errors of the means, by name.
    """
    total, (_, _, filter_) = sum(documents, Distance()), like.metric.partition(",")
    values = {"kl": total.kl / total.positions, "top1": total.agreed / total.positions}
    values |= {name: percentile(total.bins, share) for name, share in TAILS.items()}
    return [
        Metric(
            like.task, f"{name},{filter_}" if filter_ else name, value, error.get(name), len(documents),
            name == "top1", like.part_of,
        )
        for name, value in values.items()
    ]  # fmt: skip
