"""Log-likelihoods in the scopes of other papers that let a part of an input run pruned: each input is a sequence.

An input is a context and an answer but its last token; the last tokens of an input predict the answer. No mask is made
anew inside an input.

`last`     The last token runs pruned: GRIFFIN's for classification (arXiv 2404.01365). Those before run dense, and make
           the mask of a method that has one from its prompt. If the answer reaches into the dense part, its own first
           tokens help to make the mask that its last one runs under.
`all`      All tokens run pruned: the public code of arXiv 2601.22632. The mask is made from all of them too, so it
           looks ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dart_eval.evaluation.batching import Budget, batches
from dart_eval.evaluation.cache import new_cache
from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.forwards import Forwards
from dart_eval.evaluation.requests import InputRow, Request, Score, Scoring, pad, scores
from dart_eval.evaluation.settings import check_released
from dart_eval.evaluation.states import States
from dart_eval.pruning.session import Session


class Inputs(NamedTuple):
    """Inputs of a forward, and for each the requests that it answers: (index, continuation).

    angles: of all inputs, see `rotary.Angles`.
    """

    inputs: list[tuple[int, ...]]
    targets: list[list[tuple[int, tuple[int, ...]]]]
    angles: int

    @property
    def requests(self) -> list[int]:
        """Indices of the requests that it answers."""
        return [i for found in self.targets for i, _ in found]


class WholeInputs(Scoring):
    """Scores requests by inputs that run whole, in the scopes `all` and `last`."""

    def __init__(
        self, forwards: Forwards, session: Session, budget: Budget, scope: str, states: States | None = None
    ) -> None:
        check_released(session.method, scope)
        self.forwards, self.session, self.budget = forwards, session, budget
        self.scope, self.states = scope, states

    def units(self, requests: Sequence[Request]) -> list[Inputs]:
        """Batches of distinct inputs, the longest first."""
        rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            inputs = (*request.context, *request.continuation[:-1])
            rows.setdefault((inputs, len(request.continuation)), []).append(i)
        order = sorted(rows, key=lambda r: (len(r[0]), r), reverse=True)
        most, units = self.budget, []

        def alike(row: tuple[tuple[int, ...], int]) -> tuple[int, bool]:
            """Rows of a forward: with the same angles, and none without a dense part beside some that have one."""
            return self.forwards.angles.least_length(len(row[0])), self.scope == "last" and len(row[0]) > 1

        for (angles, _), found in itertools.groupby(order, key=alike):
            group = list(found)
            lengths = [len(inputs) for inputs, _ in group]
            for part in batches(lengths, most.rows, most.tokens, most.forward, self.forwards.padded):
                targets = [[(i, requests[i].continuation) for i in rows[r]] for r in group[part]]
                units.append(Inputs([inputs for inputs, _ in group[part]], targets, angles))
        return units

    @torch.no_grad()
    def run(self, unit: Inputs) -> list[tuple[int, Score]]:
        """The scores of a unit's requests, with their indices."""
        with self.forwards.angles.held(unit.angles):
            hidden = self._whole(unit) if self.scope == "all" else self._ends(unit)
        step = self.session.steps[-1]  # what the tokens used that ran pruned; under `all` the mean over all inputs
        asked = self.forwards.answers(self.states)
        rows = []
        for i, (tokens, targets) in enumerate(zip(unit.inputs, unit.targets, strict=True)):
            context = len(tokens) + 1 - len(targets[0][1])
            root = asked.root(tokens[:context], unit.angles)
            nodes, *_ = [asked.ask(root, continuation) for _, continuation in targets]  # only last tokens differ
            asked.give(nodes, hidden[i][-len(nodes) :])
            ran = len(nodes) if self.scope == "all" else 1
            not_read, outside = float(1 - step.read[i]), float(1 - step.mask[i])
            cost = Cost(pruned_tokens=ran * (not_read > 0), not_read_sum=not_read * ran, outside_sum=outside * ran)
            rows.append((InputRow(i, context, tokens, nodes, targets), cost))
        asked.run()
        return scores(rows, asked)

    def _whole(self, unit: Inputs) -> Tensor:
        """Run inputs pruned from their first token on, under masks that are made from all of them.

        Returns:
            [B, T, D], for each input the hidden states of its last tokens.
        """
        session = self.session
        tokens, valid = pad(unit.inputs, left=True, device=self.forwards.device)
        positions = valid.long().cumsum(1) - 1
        with session.context(valid):
            self.forwards(tokens, valid, positions, new_cache(self.forwards.model))
        self._note_state()
        with session.decode(valid, frozen=True):
            return self.forwards(tokens, valid, positions, new_cache(self.forwards.model))

    def _ends(self, unit: Inputs) -> Tensor:
        """Run inputs dense but for their last token. The same as `_whole` returns."""
        session, device, cache = self.session, self.forwards.device, new_cache(self.forwards.model)
        before, seen = pad([row[:-1] for row in unit.inputs], left=True, device=device)
        dense = None
        if before.shape[1]:  # else none has a dense part
            with session.context(seen):
                dense = self.forwards(before, seen, seen.long().cumsum(1) - 1, cache)
            self._note_state()
        else:
            session.no_context(len(before), device)
        tokens, new = pad([row[-1:] for row in unit.inputs], left=False, device=device)
        valid, places = torch.cat([seen, new], 1), seen.long().sum(1, keepdim=True)
        with session.decode(new, frozen=True):
            hidden = self.forwards(tokens, valid, places, cache)
        return hidden if dense is None else torch.cat([dense, hidden], 1)
