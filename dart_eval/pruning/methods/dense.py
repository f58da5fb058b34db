"""No pruning: the reference every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from dart_eval.pruning.method import Method


@dataclass(frozen=True)
class Dense(Method):
    """The model as it is."""

    name = "dense"
    summary = "the model as it is"
    prunes = False
