"""Parts of a cell: which of its units one worker runs.

A unit is what runs together (a batch, or a few). Units follow from all that a cell asks, so they are the same in every
process that plans them, and parts that cover all units have all answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shard:
    """Every `count`-th unit of a cell, from the `index`-th on: what one of several workers runs of it."""

    index: int = 0
    count: int = 1

    @property
    def unsharded(self) -> bool:
        return self.count == 1

    def takes(self, number: int, place: int, total: int) -> bool:
        """Whether a unit is of this part.

        Args:
            number: of the unit, counted over the whole cell. place, total: in its call, and how many that has.
        """
        return number % self.count == self.index


@dataclass(frozen=True)
class Pilot:
    """The first (largest) unit of each kind of request, and `more` of the others: to tell what all will take."""

    more: int = 2
    unsharded: bool = False

    def takes(self, number: int, place: int, total: int) -> bool:
        """See `Part.takes`."""
        return place in {0, *(1 + (total - 1) * (2 * i + 1) // (2 * self.more) for i in range(self.more))}


@dataclass
class Call:
    """What one call of the model asks: all requests of one kind.

    Attributes:
        kind: `loglikelihood`, `loglikelihood_rolling` or `generate_until`.
        requests: distinct ones. sizes: of every unit, what its time is taken to be proportional to.
        tokens: that must be computed: contexts, answers, prompts, and at most so many new ones.
        seconds: of the units that have been run, by place.
        cached: tokens whose keys and values a unit holds at once, of the unit that holds the most.
    """

    kind: str
    requests: int
    sizes: list[int]
    tokens: int
    seconds: dict[int, float] = field(default_factory=dict)
    cached: int = 0


WHOLE = Shard()


class PartDone(BaseException):  # no error: it passes through lm-eval, which has nothing to do with half the answers
    """A part of a cell has been answered; the answers are in the journal."""
