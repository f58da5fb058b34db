"""Log-likelihoods in the scopes of other papers that let a part of an input run pruned: each input is a sequence.

An input is a context and an answer but its last token: n tokens, of which the last ones predict the answer. Each scope
says how many of them run pruned, counted from the end (`pruned_inputs`). Those before run dense, and make the mask of a
method that has one from its prompt; no mask is made anew inside an input.

`last`     one: GRIFFIN's for classification (arXiv 2404.01365).
`last-50`  n / 2: the public code of TEAL (arXiv 2408.14690).
`last-99`  .99 n: that of WINA (arXiv 2505.19427).
`all`      all n: the public code of arXiv 2601.22632. A mask is made from all of them too, so it looks ahead.

Under the others no token sees a mask that was made from itself or from later ones. But where the answer reaches into
the dense part, its own first tokens help to make the mask that its last ones run under.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.evaluation.batching import Budget, batches
from dart_eval.evaluation.cache import fork, new_cache
from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.forwards import Forwards
from dart_eval.evaluation.requests import InputRow, Request, Score, Scoring, pad, scores
from dart_eval.evaluation.settings import SHARES, check_released
from dart_eval.pruning.log import Step
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError


def pruned_inputs(scope: str, inputs: int) -> int:
    """How many of so many inputs run pruned, the last ones: a share is rounded down, but to no less than one.

    So it is in the code of TEAL, where one token alone counts as decoded, and in WINA's, whose slice of the last 0
    tokens is the whole input.
    """
    return 1 if scope == "last" else max(1, inputs * SHARES[scope] // 100)


@dataclass(frozen=True)
class Inputs:
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

    @property
    def answers(self) -> list[int]:
        """For each input, how many tokens the answers have that it is for."""
        return [len(continuation) for ((_, continuation), *_) in self.targets]


class WholeInputs(Scoring):
    """Scores requests by inputs that run whole, in the scopes of `pruned_inputs`."""

    session: Session

    def __init__(
        self, forwards: Forwards, session: Session, budget: Budget, scope: str, distances: bool = False
    ) -> None:
        check_released(session.method, scope)
        if forwards.room and scope not in ("all", "last"):
            raise UserError(
                f"{type(forwards.model).__name__} runs only one token at a time after a cached context, and scope "
                f"{scope} runs several",
                "use --scope scored",
            )
        self.forwards, self.session, self.budget = forwards, session, budget
        self.scope, self.distances = scope, distances

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
            return self.forwards.angles.least_length(len(row[0])), len(row[0]) > pruned_inputs(self.scope, len(row[0]))

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
            found = self._whole(unit) if self.scope == "all" else self._ends(unit)
            return self._scores(unit, found, self.session.steps[-1])

    def _whole(self, unit: Inputs) -> list[tuple[Tensor, Tensor]]:
        """Run inputs pruned from their first token on, under masks that are made from all of them.

        Returns:
            For each input the hidden states that predict its answers, [n, D], and dense's where they are pruned.
        """
        session = self.session
        tokens, valid = pad(unit.inputs, left=True, device=self.forwards.device)
        positions = valid.long().cumsum(1) - 1
        with session.context(valid):
            dense = self.forwards(tokens, valid, positions, new_cache(self.forwards.model))
        self._note_state(len(unit.inputs))
        with session.decode(valid, frozen=True):
            hidden = self.forwards(tokens, valid, positions, new_cache(self.forwards.model))
        return [(hidden[i, -n:], dense[i, -n:]) for i, n in enumerate(unit.answers)]

    def _ends(self, unit: Inputs) -> list[tuple[Tensor, Tensor]]:
        """Run inputs dense up to where the scope begins, and pruned from there on. The same as `_whole` returns."""
        session, device, cache = self.session, self.forwards.device, new_cache(self.forwards.model)
        ends = [pruned_inputs(self.scope, len(row)) for row in unit.inputs]
        before = [row[: len(row) - end] for row, end in zip(unit.inputs, ends, strict=True)]
        tokens, seen = pad(before, left=True, device=device)
        dense = None
        if before[0]:  # else none has a dense part
            with session.context(seen):
                dense = self.forwards(tokens, seen, seen.long().cumsum(1) - 1, cache)
            self._note_state(len(before))
        else:
            session.no_context(len(before), device)
        tokens, new = pad([row[-end:] for row, end in zip(unit.inputs, ends, strict=True)], left=False, device=device)
        places = torch.arange(tokens.shape[1], device=device)
        scored = torch.tensor([[end - n] for end, n in zip(ends, unit.answers, strict=True)], device=device) <= places
        valid, places = torch.cat([seen, new], 1), seen.long().sum(1, keepdim=True) + places
        twin = None
        if self.distances:
            with session.paused():
                twin = self.forwards(tokens, valid, places, fork(cache))
        with session.decode(new & scored, frozen=True):
            hidden = self.forwards(tokens, valid, places, cache)
        found = []
        for i, (end, n) in enumerate(zip(ends, unit.answers, strict=True)):
            row = hidden[i, :end] if dense is None else torch.cat([dense[i], hidden[i, :end]])
            found.append((row[-n:], (hidden if twin is None else twin)[i, max(0, end - n) : end]))
        return found

    def _scores(self, unit: Inputs, hidden: Sequence[tuple[Tensor, Tensor]], step: Step) -> list[tuple[int, Score]]:
        """Scores of the requests.

        Args:
            hidden: see `_whole`.
            step: what the scored tokens used that ran pruned; under `all` the mean over all inputs, where it varies.
        """
        asked = self.forwards.answers(self.distances)
        made = []
        for i, (row, found) in enumerate(zip(unit.inputs, unit.targets, strict=True)):
            root = asked.root()
            paths = [asked.ask(root, continuation) for _, continuation in found]
            nodes = paths[0]  # they differ in their last tokens only
            states, dense = hidden[i]
            asked.give(nodes, states)
            if self.distances:
                asked.compare(nodes[len(nodes) - len(dense) :], dense)
            ran = min(len(nodes), pruned_inputs(self.scope, len(row)))
            not_read, outside = float(1 - step.read[i]), float(1 - step.mask[i])
            cost = Cost(pruned_tokens=ran * (not_read > 0), not_read_sum=not_read * ran, outside_sum=outside * ran)
            made.append((InputRow(i, len(row) + 1 - len(nodes), row, nodes, found), cost))
        asked.run()
        return scores(made, asked)
