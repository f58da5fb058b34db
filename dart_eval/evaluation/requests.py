"""The requests of scoring and their answers, and the rows between them: distinct inputs of a pruned forward."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.logits import Answers
from dart_eval.pruning.session import Session
from dart_eval.results.record import CLOSED, read


class Request(NamedTuple):
    """Score `continuation` after `context`; both token ids, neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The score of a request.

    Attributes:
        logprob: sum of natural-log probabilities of the continuation.
        greedy: every token of the continuation was the most likely one.
        cost: of the continuation's tokens.
    """

    __pydantic_config__ = CLOSED

    logprob: float
    greedy: bool
    cost: Cost

    @property
    def usable(self) -> bool:
        """Whether it is a number."""
        far = self.cost.distance
        return all(map(math.isfinite, (self.logprob, far.kl, far.reverse, far.moved)))


@dataclass(frozen=True)
class Text:
    """The text generated after a prompt.

    Attributes:
        text: without the stop sequence that ended it.
        cost: of its tokens, with those of the stop sequence.
        cut: whether the prompt did not fit in full.
        usable: whether its logits were finite.
        token_ids: its tokens, with those of the stop sequence.
        limited: whether it has all the tokens that it may have.
    """

    __pydantic_config__ = CLOSED

    text: str
    cost: Cost
    cut: bool = False
    usable: bool = True
    token_ids: list[int] = field(default_factory=list)
    limited: bool = False


A = TypeVar("A", Score, Text)
_OF: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Score, Text)}


def stored_answer(stored: object, kind: type[A]) -> A | None:
    """Return the stored answer of a journal; None if it has another type, or numbers that are not finite."""
    try:
        answer: A = read(json.dumps(stored), _OF[kind])
    except ValueError:
        return None
    return answer if answer.usable else None


class Scoring(ABC):
    """Scores requests on one model.

    Batches depend on all requests, not on earlier answers, so the numbers do not depend on interruptions.

    Attributes:
        session: prunes the model, or lets it run dense.
        state_bytes: largest method state seen, per sequence.
    """

    session: Session
    state_bytes: int = 0

    @abstractmethod
    def units(self, requests: Sequence[Request]) -> list[Any]:
        """Return units with their `requests`, as indices. Nothing runs across units."""

    @abstractmethod
    def run(self, unit: Any) -> list[tuple[int, Score]]:
        """Return the scores of a unit's requests, with their indices."""

    def _note_state(self) -> None:
        """Note the state bytes of a sequence after contexts have run."""
        self.state_bytes = max(self.state_bytes, self.session.state_bytes)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Return one score per request, in order."""
        found = dict(pair for unit in self.units(requests) for pair in self.run(unit))
        return [found[i] for i in range(len(requests))]


@dataclass
class InputRow:
    """One distinct input of the pruned forward, and the requests it answers."""

    parent: int  # row of the context batch
    context: int  # tokens of the context
    inputs: tuple[int, ...]  # tokens after the context's forward, but the continuation's last
    nodes: list[int]  # of `Answers`: where each token of the continuation is predicted
    targets: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # request, continuation


def scores(rows: Sequence[tuple[InputRow, Cost]], answers: Answers) -> list[tuple[int, Score]]:
    """Return the scores of the requests that these rows answer.

    Args:
        rows: with the cost of their pruned tokens.
        answers: with all hidden states.
    """
    found = []
    for row, pruned in rows:
        cost = Cost(tokens=len(row.nodes), contexts=1, context_tokens=row.context) + pruned
        for request, continuation in row.targets:
            total = sum(answers.logprobs(row.nodes, continuation))
            far = replace(cost, distance=answers.distance(row.nodes, continuation))
            found.append((request, Score(total, answers.greedy(row.nodes, continuation), far)))
    return found


def pad(rows: list[tuple[int, ...]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids [B, T] padded with 0 on one side, and [B, T] bool, True for real tokens."""
    tensors, side = [torch.tensor(row, dtype=torch.long) for row in rows], "left" if left else "right"
    tokens, valid = (
        pad_sequence(parts, batch_first=True, padding_side=side).to(device)
        for parts in (tensors, [torch.ones_like(row, dtype=torch.bool) for row in tensors])
    )
    return tokens, valid
