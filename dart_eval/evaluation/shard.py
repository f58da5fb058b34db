"""Shards of a cell: the units that one worker runs.

A unit is a batch, or a few. Units follow from all requests of a cell, so every process plans the same ones, and shards
that cover all units have all answers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Every `count`-th unit of a cell, from the `index`-th on: the share of one of several workers."""

    index: int = 0
    count: int = 1

    @property
    def unsharded(self) -> bool:
        return self.count == 1

    def takes(self, number: int) -> bool:
        """Whether a unit belongs to this shard. number: of the unit, counted over the whole cell."""
        return number % self.count == self.index


WHOLE = Shard()


class PartDone(BaseException):  # not an error: it leaves lm-eval, which cannot use half of the answers
    """A shard of a cell has been answered; the answers are in the journal."""
