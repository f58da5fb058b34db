"""Shards of a cell: the units that one worker runs.

A unit is a batch, or a few. Units follow from all requests of a cell, so every process plans the same ones, and shards
that cover all units have all answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shard:
    """Every `count`-th unit of a cell, from the `index`-th on: the share of one of several workers."""

    index: int = 0
    count: int = 1

    @property
    def unsharded(self) -> bool:
        return self.count == 1

    def takes(self, number: int, place: int, total: int) -> bool:
        """Whether a unit belongs to this shard.

        Args:
            number: of the unit, counted over the whole cell.
            place: of the unit in its call.
            total: units in its call.
        """
        return number % self.count == self.index


@dataclass(frozen=True)
class Pilot:
    """The first (largest) unit of each kind of request and `more` others, to estimate the time of all."""

    more: int = 2
    unsharded: bool = False

    def takes(self, number: int, place: int, total: int) -> bool:
        """See `Shard.takes`."""
        return place in {0, *(1 + (total - 1) * (2 * i + 1) // (2 * self.more) for i in range(self.more))}


@dataclass
class Call:
    """One call of the model: all requests of one kind.

    Attributes:
        kind: `loglikelihood`, `loglikelihood_rolling` or `generate_until`.
        requests: number of distinct requests.
        sizes: estimated cost of each unit, in tokens.
        tokens: tokens to compute: contexts, answers, prompts, and the most new ones.
        seconds: time of the units that have run, by place.
        cached: most tokens in the KV cache of a unit.
    """

    kind: str
    requests: int
    sizes: list[int]
    tokens: int
    seconds: dict[int, float] = field(default_factory=dict)
    cached: int = 0


WHOLE = Shard()


class PartDone(BaseException):  # not an error: it leaves lm-eval, which cannot use half of the answers
    """A shard of a cell has been answered; the answers are in the journal."""
