"""Log-likelihoods after contexts that run dense. The scopes that cut inputs elsewhere are in `scopes`.

Scope `scored`, ours: for each context all tokens but the last run dense, once, and build the mask. The last context
token and the continuation run pruned through the KV cache, so every log-probability that counts was produced by pruned
FFNs, one-token answers included. Candidates share the context, its cache and its mask. Where a method may re-mask, the
continuation runs in blocks that end where a mask may change: the numbers equal token-by-token decoding.

Scope `continuation` (COUNTDOWN's, arXiv 2505.17701): the same, but the context's last token runs dense with the others.
It predicts the answer's first token, and an answer of one token is dense.

Scope `decode` (code that prunes where one token is computed alone, such as CoreInfer's, arXiv 2410.18311): an answer
that is given is computed at once, with its context, so nothing runs pruned. The numbers are those of dense.

Rows of a batch are left-padded contexts; nothing crosses rows. Which rows run together (`batching`) and whether a
prefix of several contexts is computed once move last digits only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from dart_eval.evaluation.batching import Budget, Group, batches, budget, shared_prefixes
from dart_eval.evaluation.cache import can_share_prefix, fork, from_prefix, new_cache
from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.forwards import Forwards
from dart_eval.evaluation.logits import Answers
from dart_eval.evaluation.requests import InputRow, Request, Score, Scoring, pad, scores
from dart_eval.evaluation.scopes import WholeInputs
from dart_eval.evaluation.states import States
from dart_eval.pruning.rows import Rows
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError


class Batch(NamedTuple):
    """Contexts of a forward, the longest first; the first `prefix` tokens are the same in all.

    asked: context -> (index of the request, continuation). angles: of all rows, see `rotary.Angles`.
    """

    contexts: list[tuple[int, ...]]
    prefix: int
    angles: int
    asked: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]]

    @property
    def requests(self) -> list[int]:
        """Indices of the requests that it answers."""
        return [i for found in self.asked.values() for i, _ in found]


class _Prefix(NamedTuple):
    """A token prefix of several contexts, run once: its KV cache of one row, and the method's state."""

    tokens: tuple[int, ...]
    angles: int
    cache: Cache
    rows: Rows | None


def scorer(
    model: PreTrainedModel,
    head: Callable[[Tensor], Tensor],
    session: Session,
    batch_size: int | str | Budget,
    scope: str = "scored",
    share_prefix: bool = True,
    states: States | None = None,
) -> Scoring:
    """Return what scores requests on one model under a session.

    Args:
        head: see `forwards.output_head`.
        batch_size: contexts per forward, `auto`, or a budget. Moves last digits only.
        scope: one of `sweep.options.SCOPES`; it does not matter where nothing is pruned.
        share_prefix: run a long prefix of several contexts once (not where `scopes` cuts them). Moves last digits only.
        states: of dense at the scored positions, from which the distances are measured; or to be gathered, of a model
            that runs dense. They move no other number.

    Raises:
        UserError: the method writes texts its own way, and gives no answer a score.
    """
    if session.writer is not None:
        raise UserError(f"{session.writer.name} writes texts, and scores no given answers", "use a task with texts")
    forwards = Forwards(model, head)
    most = batch_size if isinstance(batch_size, Budget) else budget(batch_size, model)
    if session.prunes and scope in ("all", "last"):
        return WholeInputs(forwards, session, most, scope, states)
    return Scorer(forwards, session, most, scope, share_prefix, states)


class Scorer(Scoring):
    """Scores requests in the scopes `scored`, `continuation` and `decode`. Made by `scorer`; see there."""

    def __init__(
        self, forwards: Forwards, session: Session, budget: Budget, scope: str, share_prefix: bool,
        states: States | None,
    ) -> None:  # fmt: skip
        self.forwards, self.budget, self.states = forwards, budget, states
        # In the scope `decode` the model is its own meanwhile, and no token counts as pruned.
        self.session, self._paused = (Session(), session) if scope == "decode" else (session, Session())
        self.share_prefix = share_prefix and can_share_prefix(forwards.model)
        self._prefix: _Prefix | None = None  # the last one that was run
        # Pruned, the context's last token runs with the answer, under the mask that the tokens before it make. Dense,
        # it runs with the context, whose forward thus predicts every answer's first token.
        self._last = int(self.session.prunes and scope != "continuation")

    def units(self, requests: Sequence[Request]) -> list[Batch]:
        """Return batches of contexts, each context once for each kind of angles that its answers' lengths give it.

        Long contexts come first, so that running out of memory shows at once.
        """
        by_angles: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for i, request in enumerate(requests):
            angles = self.forwards.angles.least_length(len(request.context) + len(request.continuation) - 1)
            by_angles.setdefault(angles, {}).setdefault(request.context, []).append(i)
        units = []
        for angles in sorted(by_angles, reverse=True):
            by_context = by_angles[angles]
            contexts = sorted(by_context, key=lambda c: (len(c), c), reverse=True)
            for members, prefix in self._context_batches(contexts):
                asked = {c: [(i, requests[i].continuation) for i in by_context[c]] for c in members}
                units.append(Batch(members, prefix, angles, asked))
        return units

    @torch.no_grad()
    def run(self, unit: Batch) -> list[tuple[int, Score]]:
        """Return the scores of a batch's requests, with their indices."""
        answers = self.forwards.answers(self.states)
        with self._paused.paused():
            with self.forwards.angles.held(unit.angles):
                rows = self._run(unit, answers)
            answers.run()
        return scores(rows, answers)

    def _context_batches(self, contexts: list[tuple[int, ...]]) -> Iterator[tuple[list[tuple[int, ...]], int]]:
        """Yield batches of contexts (longest first), and the length of the prefix that each shares.

        Contexts of no tokens leave nothing to make a mask from.
        """
        groups, most = [Group(0, list(range(len(contexts))))], self.budget
        if self.share_prefix:
            groups = shared_prefixes([c[: len(c) - self._last] for c in contexts], most.forward)
            groups = [Group(g.prefix, sorted(g.members)) for g in groups]  # still the longest first
        for group in sorted(groups, key=lambda g: g.members[0]):
            members = [contexts[i] for i in group.members]
            lengths = [len(c) - self._last for c in members]
            todo = [max(n - group.prefix, min(n, 1)) for n in lengths]  # one token to go on from
            tokens = most.tokens
            if tokens is not None and most.cached is not None and lengths[0]:
                tokens = min(tokens, most.cached * todo[0] // lengths[0])  # the cache holds the prefix for every row
            for part in batches(todo, most.rows, tokens, most.forward, self.forwards.padded):
                yield members[part], group.prefix

    def _run_prefix(self, tokens: tuple[int, ...], angles: int) -> _Prefix:
        """Run a prefix of several contexts, densely; a method's state observes it."""
        ids, valid = pad([tokens], left=True, device=self.forwards.device)
        # It keeps every token in every layer; sliding layers are masked to their window.
        cache, positions = DynamicCache(), torch.arange(len(tokens), device=self.forwards.device)[None]
        with self.session.context(valid):
            self.forwards(ids, valid, positions, cache)
        return _Prefix(tokens, angles, cache, self.session.rows)

    def _run_contexts(self, contexts: list[tuple[int, ...]], shared: _Prefix | None) -> tuple[object, Tensor, Tensor]:
        """Run contexts densely, as a batch with its padding on the left: their cache, valid [B, N], hidden [B, T, D].

        A shared prefix fills the cache's first columns instead of being computed; as padding stays on the left, a row's
        tokens stay side by side, which sliding windows need. So rows shorter than the longest compute some of the
        prefix's last tokens again, in columns that the longest row fills with its own.
        """
        tokens, valid = pad(contexts, left=True, device=self.forwards.device)
        positions, session, batch = valid.long().cumsum(1) - 1, self.session, len(contexts)
        if tokens.shape[1] == 0:
            session.no_context(batch, self.forwards.device)
            return new_cache(self.forwards.model), valid, tokens[..., None]
        start = 0 if shared is None else max(0, min(len(shared.tokens), tokens.shape[1] - 1))
        if shared is None or not start:
            cache = new_cache(self.forwards.model)
            with session.context(valid):
                hidden = self.forwards(tokens, valid, positions, cache)
        else:
            cache = from_prefix(self.forwards.model, shared.cache, positions[:, :start].clamp_min(0))
            block, places = tokens[:, start:], positions[:, start:]
            session.fork(shared.rows, torch.zeros(batch, dtype=torch.long, device=self.forwards.device))
            real = valid[:, start:]
            with session.extend(real & (places >= len(shared.tokens)), real):
                hidden = self.forwards(block, valid, places, cache)
        self._note_state()
        return cache, valid, hidden

    def _run(self, batch: Batch, answers: Answers) -> list[tuple[InputRow, Cost]]:
        """Run a batch of contexts and their candidates: hidden states go into `answers`."""
        session, contexts = self.session, batch.contexts
        prefix = contexts[0][: batch.prefix]
        if self._prefix is None or (self._prefix.tokens, self._prefix.angles) != (prefix, batch.angles):
            self._prefix = self._run_prefix(prefix, batch.angles) if prefix else None
        cut = [c[: len(c) - self._last] for c in contexts]
        cache, valid, hidden = self._run_contexts(cut, self._prefix)
        rows: dict[tuple[int, tuple[int, ...]], InputRow] = {}
        for parent, context in enumerate(contexts):
            root = answers.root(context, batch.angles)
            if not self._last:
                answers.give([root], hidden[parent, -1:])
            for i, continuation in batch.asked[context]:
                inputs = (*context[len(context) - self._last :], *continuation[:-1])
                if (row := rows.get((parent, inputs))) is None:
                    # What an oracle's mask is made from is the row's own tokens: rows have no hidden state in common.
                    own = answers.root(context, batch.angles) if session.method.looks_ahead else root
                    row = InputRow(parent, len(context), inputs, answers.ask(own, continuation))
                    rows[parent, inputs] = row
                answers.ask(row.nodes[0], continuation)
                row.targets.append((i, continuation))
        ordered = sorted(rows.values(), key=lambda r: len(r.inputs), reverse=True)
        sequences = session.rows
        found: list[tuple[InputRow, Cost]] = []
        lengths, most = [len(r.inputs) for r in ordered], self.budget.candidates
        if self.budget.cached is not None:  # every row has a copy of its context's cache
            most = max(1, min(most, self.budget.cached // (valid.shape[1] + lengths[0])))
        for part in batches(lengths, most, self.budget.tokens, self.budget.forward):
            part_rows = ordered[part]
            if not part_rows[0].inputs:  # dense one-token answers: the context's forward has answered them
                found += [(row, Cost()) for row in part_rows]
                continue
            parents = torch.tensor([r.parent for r in part_rows], device=self.forwards.device)
            forked = fork(cache, parents)
            session.fork(sequences, parents)
            if session.method.looks_ahead:
                self._foresee(part_rows, valid[parents], fork(forked))
            found += zip(part_rows, self._run_rows(part_rows, valid[parents], forked, answers), strict=True)
        return found

    def _foresee(self, rows: list[InputRow], seen: Tensor, cache: Cache) -> None:
        """Run candidates dense, for a method that must see them. The cache is used up."""
        tokens, valid = pad([r.inputs for r in rows], left=False, device=self.forwards.device)
        positions = seen.long().sum(1, keepdim=True) + torch.arange(tokens.shape[1], device=self.forwards.device)
        for part in self.forwards.blocks(tokens.shape[1]):
            seen = torch.cat([seen, valid[:, part]], 1)
            with (self.session.extend if part.start else self.session.foresee)(valid[:, part]):
                self.forwards(tokens[:, part], seen, positions[:, part], cache)

    def _run_rows(self, rows: list[InputRow], seen: Tensor, cache: Cache, answers: Answers) -> list[Cost]:
        """Run candidates after their contexts' caches, in blocks that end where a mask may change."""
        tokens, valid = pad([r.inputs for r in rows], left=False, device=self.forwards.device)
        offset = seen.long().sum(1, keepdim=True)  # real context tokens, so the next position
        pruned_tokens, not_read, outside = torch.zeros(3, len(rows), dtype=torch.float64)  # sums over tokens
        session, start = self.session, 0
        while start < tokens.shape[1]:
            room = self.forwards.room or session.room()
            end = min(tokens.shape[1], start + room) if room else tokens.shape[1]
            block, mask = tokens[:, start:end], valid[:, start:end]
            positions = offset + torch.arange(start, end, device=self.forwards.device)
            seen = torch.cat([seen, mask], 1)
            with session.decode(mask):
                hidden = self.forwards(block, seen, positions, cache)
            step, counted = session.steps[-1], mask.sum(1).cpu()
            pruned_tokens += (step.read < 1) * counted
            not_read += (1 - step.read) * counted
            outside += (1 - step.mask) * counted
            for i, row in enumerate(rows):
                nodes = row.nodes[len(row.nodes) - len(row.inputs) :][start:end]  # dense: the context gave the first
                answers.give(nodes, hidden[i, : len(nodes)])
            start = end
        remasks = session.remasks or [0] * len(rows)
        return [
            Cost(
                pruned_tokens=int(pruned_tokens[i]), not_read_sum=float(not_read[i]), outside_sum=float(outside[i]),
                remasks=remasks[i], trace=session.trace(i),
            )
            for i in range(len(rows))
        ]  # fmt: skip
