"""What scoring is asked and answers, and the rows between: distinct inputs of a pruned forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dart_eval.evaluation.logits import Answers
from dart_eval.pruning.dense import DenseSession
from dart_eval.pruning.session import Session


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`; both token ids, neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """What came out for a request.

    Attributes:
        logprob: sum of natural-log probabilities of the continuation.
        greedy: every token of the continuation was the most likely one.
        tokens: scored tokens. masked: those of them that ran under a mask.
        pruned: share of the FFN weights that was not read, summed over them (pruned / tokens: effective sparsity).
        outside: share of the neurons outside the mask, summed over them; more than `pruned` has none but methods
            whose tokens pick inside the mask have less.
        remasks: masks renewed while scoring.
        trace: what the drift detector saw (`Session.trace`), if there is one and a window was full.
    """

    logprob: float
    greedy: bool
    tokens: int
    masked: int
    pruned: float
    outside: float
    remasks: int
    trace: dict[str, Any] | None = None


class Scoring(ABC):
    """Scores requests on one model.

    Which requests run together depends on all that are asked, not on what has been answered before: so numbers are the
    same whether a run was stopped and went on, or its units ran in several places.

    Attributes:
        session: what prunes the model, or lets it run dense.
        state_bytes: largest method state seen, per sequence.
    """

    session: Session | DenseSession
    state_bytes: int = 0

    @abstractmethod
    def units(self, requests: Sequence[Request]) -> list[Any]:
        """What runs together: each knows its `requests`, as indices. Nothing runs across units."""

    @abstractmethod
    def run(self, unit: Any) -> list[tuple[int, Score]]:
        """The scores of a unit's requests, with their indices."""

    def _note_state(self, sequences: int) -> None:
        """The contexts of so many sequences have run."""
        self.state_bytes = max(self.state_bytes, self.session.state_bytes // sequences)

    def score(
        self, requests: Sequence[Request], done: Callable[[list[tuple[int, Score]]], None] = lambda batch: None
    ) -> list[Score]:
        """One score per request, in order; `done` is called after each unit with its indices and scores."""
        found: dict[int, Score] = {}
        for unit in self.units(requests):
            made = self.run(unit)
            done(made)
            found.update(made)
        return [found[i] for i in range(len(requests))]


@dataclass
class Row:
    """One distinct input of the pruned forward, and the requests it answers."""

    parent: int  # row of the context batch
    inputs: tuple[int, ...]  # tokens after the context's forward, but the continuation's last
    nodes: list[int]  # of `Answers`: where each token of the continuation is predicted
    targets: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # request, continuation


@dataclass(frozen=True)
class Cost:
    """What a row cost: the fields of `Score` that do not depend on its last token."""

    masked: int = 0
    pruned: float = 0.0
    outside: float = 0.0
    remasks: int = 0
    trace: dict[str, Any] | None = None


def scores(rows: Sequence[tuple[Row, Cost]], answers: Answers) -> list[tuple[int, Score]]:
    """Scores of the requests that these rows answer."""
    found = []
    for row, cost in rows:
        for request, continuation in row.targets:
            total = sum(answers.logprobs(row.nodes, continuation))
            greedy = answers.greedy(row.nodes, continuation)
            own = (cost.masked, cost.pruned, cost.outside, cost.remasks, cost.trace)
            found.append((request, Score(total, greedy, len(continuation), *own)))
    return found


def pad(rows: list[tuple[int, ...]], left: bool, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] padded with 0 on one side, and [B, T] bool, True for real tokens."""
    width = max(len(r) for r in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        if row:
            place = slice(width - len(row), width) if left else slice(0, len(row))
            tokens[i, place] = torch.tensor(row)
            valid[i, place] = True
    return tokens.to(device), valid.to(device)
