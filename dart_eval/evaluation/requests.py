"""The requests of scoring and their answers, and the rows between them: distinct inputs of a pruned forward."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.logits import Answers
from dart_eval.pruning.session.dense import AnySession
from dart_eval.results import layout
from dart_eval.results.layout import CLOSED


@dataclass(frozen=True)
class Request:
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
        return math.isfinite(self.logprob) and math.isfinite(self.cost.distance.kl)


@dataclass(frozen=True)
class Text:
    """The text that was generated after a prompt.

    Attributes:
        text: without the stop sequence that ended it.
        token_ids: its tokens, those of the stop sequence included.
        cost: of its tokens, those of the stop sequence included.
        cut: the prompt did not fit whole.
        usable: it came from logits that are numbers.
    """

    __pydantic_config__ = CLOSED

    text: str
    cost: Cost
    cut: bool = False
    usable: bool = True
    token_ids: list[int] = field(default_factory=list)


A = TypeVar("A", Score, Text)
_OF: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Score, Text)}


def holds(kept: Any, kind: type[Score] | type[Text]) -> bool:
    """Whether what a file has kept of an answer is one, with nothing in it that is no number."""
    try:
        return bool(layout.read(json.dumps(kept), _OF[kind]).usable)
    except ValueError:
        return False


def kept_answer(kept: Any, kind: type[A]) -> A:
    """The answer that a journal has kept, which `holds` accepted."""
    return _OF[kind].validate_python(kept)


class Scoring(ABC):
    """Scores requests on one model.

    Which requests run together depends on all that are asked, not on what has been answered before: so numbers are the
    same whether a run was stopped and went on, or its units ran in several places.

    Attributes:
        session: what prunes the model, or lets it run dense.
        state_bytes: largest method state seen, per sequence.
    """

    session: AnySession
    state_bytes: int = 0

    @abstractmethod
    def units(self, requests: Sequence[Request]) -> list[Any]:
        """What runs together: each knows its `requests`, as indices. Nothing runs across units."""

    @abstractmethod
    def run(self, unit: Any) -> list[tuple[int, Score]]:
        """The scores of a unit's requests, with their indices."""

    def _note_state(self, sequences: int) -> None:
        """The contexts of so many sequences have run."""
        self.state_bytes = max(self.state_bytes, self.session.state_bytes_each(sequences))

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """One score per request, in order."""
        found = dict(pair for unit in self.units(requests) for pair in self.run(unit))
        return [found[i] for i in range(len(requests))]


@dataclass
class Row:
    """One distinct input of the pruned forward, and the requests it answers."""

    parent: int  # row of the context batch
    context: int  # tokens of the context
    inputs: tuple[int, ...]  # tokens after the context's forward, but the continuation's last
    nodes: list[int]  # of `Answers`: where each token of the continuation is predicted
    targets: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # request, continuation


def scores(rows: Sequence[tuple[Row, Cost]], answers: Answers) -> list[tuple[int, Score]]:
    """Scores of the requests that these rows answer.

    Args:
        rows: with what their pruned tokens cost.
        answers: to which all hidden states have been given.
    """
    found = []
    for row, pruned in rows:
        far = answers.distance(row.nodes)
        cost = Cost(tokens=len(row.nodes), contexts=1, context_tokens=row.context, distance=far) + pruned
        for request, continuation in row.targets:
            total = sum(answers.logprobs(row.nodes, continuation))
            found.append((request, Score(total, answers.greedy(row.nodes, continuation), cost)))
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
