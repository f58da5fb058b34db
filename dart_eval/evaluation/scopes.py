"""Log-likelihoods in two scopes of other papers: each distinct input is a sequence of its own.

Scope `all` (the public code's of arXiv 2601.22632): each answer with its context is one forward; the mask is made from
all its tokens, the answer's too, and prunes all of them. It looks ahead. Scope `last` (GRIFFIN's for classification,
arXiv 2404.01365): all tokens but the last run dense and make the mask; the last input token alone runs pruned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.evaluation.batching import Budget, batches
from dart_eval.evaluation.cache import new_cache
from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.forwards import Forwards
from dart_eval.evaluation.requests import Request, Row, Score, Scoring, pad, scores
from dart_eval.pruning.dense import AnySession
from dart_eval.pruning.steps import Step


@dataclass(frozen=True)
class Inputs:
    """Inputs of a forward, and for each the requests that it answers: (index, continuation).

    angles: of all inputs, see `rotary.Angles.of`.
    """

    inputs: list[tuple[int, ...]]
    targets: list[list[tuple[int, tuple[int, ...]]]]
    angles: int
    forwards = 1  # what it takes beside its tokens, about

    @property
    def requests(self) -> list[int]:
        """Indices of the requests that it answers."""
        return [i for found in self.targets for i, _ in found]

    @property
    def tokens(self) -> int:
        """Tokens to compute, without padding."""
        return sum(len(i) for i in self.inputs)


class WholeInputs(Scoring):
    """Scores requests by inputs that run whole, in the scope `all` or `last`."""

    def __init__(self, forwards: Forwards, session: AnySession, budget: Budget, scope: str) -> None:
        self.forwards, self.session, self.budget, self.scope = forwards, session, budget, scope

    def units(self, requests: Sequence[Request]) -> list[Inputs]:
        """Batches of distinct inputs, the longest first."""
        rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            inputs = (*request.context, *request.continuation[:-1])
            rows.setdefault((inputs, len(request.continuation)), []).append(i)
        order = sorted(rows, key=lambda r: (len(r[0]), r), reverse=True)
        most, units = self.budget, []
        for angles, found in itertools.groupby(order, key=lambda r: self.forwards.angles.of(len(r[0]))):
            alike = list(found)
            for part in batches([len(inputs) for inputs, _ in alike], most.rows, most.tokens, most.forward):
                targets = [[(i, requests[i].continuation) for i in rows[r]] for r in alike[part]]
                units.append(Inputs([inputs for inputs, _ in alike[part]], targets, angles))
        return units

    @torch.no_grad()
    def run(self, unit: Inputs) -> list[tuple[int, Score]]:
        """The scores of a unit's requests, with their indices."""
        with self.forwards.angles.held(unit.angles):
            hidden, step = self._forward(unit.inputs)
        return self._scores(unit, hidden, step)

    def _forward(self, inputs: list[tuple[int, ...]]) -> tuple[Tensor, Step]:
        """Run inputs as the scope has it: hidden [B, T, D], and what the last forward used."""
        tokens, valid = pad(inputs, left=True, device=self.forwards.device)
        positions, session, cache = valid.long().cumsum(1) - 1, self.session, new_cache(self.forwards.model)
        if self.scope == "all" or not session.prunes:
            if session.prunes:
                with session.context(valid):
                    self.forwards(tokens, valid, positions, new_cache(self.forwards.model))
                self._note_state(len(inputs))
            with session.decode(valid, frozen=True):
                return self.forwards(tokens, valid, positions, cache), session.steps[-1]
        before = []
        if tokens.shape[1] > 1:
            with session.context(valid[:, :-1]):
                before.append(self.forwards(tokens[:, :-1], valid[:, :-1], positions[:, :-1], cache))
            self._note_state(len(inputs))
        else:
            session.no_context(len(inputs), self.forwards.device)
        with session.decode(valid[:, -1:], frozen=True):
            last = self.forwards(tokens[:, -1:], valid, positions[:, -1:], cache)
        return torch.cat([*before, last], 1), session.steps[-1]

    def _scores(self, unit: Inputs, hidden: Tensor, step: Step) -> list[tuple[int, Score]]:
        """Score rows whose inputs end with the answer; the answer's share of them differs from row to row."""
        inputs, targets = unit.inputs, unit.targets
        # The longest answer's columns, moved so that every row's answer begins in the first one.
        lengths = [len(continuation) for ((_, continuation), *_) in targets]
        width = max(lengths)
        shift = torch.tensor([[width - n] for n in lengths]) + torch.arange(width)
        index = (hidden.shape[1] - width + shift).clamp_max(hidden.shape[1] - 1).to(hidden.device)
        answers = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
        asked = self.forwards.answers()
        made = []
        for i, (row, found) in enumerate(zip(inputs, targets, strict=True)):
            root = asked.root()
            paths = [asked.ask(root, continuation) for _, continuation in found]
            nodes = paths[0]  # they differ in their last tokens only
            asked.give(nodes, answers[i, : len(nodes)])
            ran = len(nodes) if self.scope == "all" else 1
            not_read, outside = float(1 - step.read[i]), float(1 - step.mask[i])
            cost = Cost(pruned_tokens=ran * (not_read > 0), not_read_sum=not_read * ran, outside_sum=outside * ran)
            made.append((Row(i, len(row) + 1 - len(nodes), row, nodes, found), cost))
        asked.run()
        return scores(made, asked)
