"""Log-likelihoods without looking ahead (scope `scored`), and under two protocols of other papers.

For each context: all tokens but the last run dense, once, and build the mask. The last context token and the
continuation run pruned through the KV cache, so every log-probability that counts was produced by pruned FFNs, one-
token answers included. Candidates share the context, its cache and its mask. Where a method may renew its mask, the
continuation runs in blocks that end where a mask may change: the numbers equal token-by-token decoding.

Scope `all` (the public code's of arXiv 2601.22632): each answer with its context is one forward; the mask is made from
all its tokens, the answer's too, and prunes all of them. It looks ahead. Scope `last` (GRIFFIN's for classification,
arXiv 2404.01365): all tokens but the last run dense and make the mask; the last input token alone runs pruned.

Rows of a batch are left-padded contexts; nothing crosses rows. Which rows run together (`batching`) and whether a
prefix of several contexts is computed once (scope `scored`) move last digits only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dart_eval.errors import UserError
from dart_eval.evaluation.batching import Budget, Group, batches, budget, shared_prefixes
from dart_eval.evaluation.cache import can_share_prefix, fork, from_prefix, new_cache, prefix_cache
from dart_eval.evaluation.logits import Answers
from dart_eval.ffn import cache_argument
from dart_eval.pruning.session import Session
from dart_eval.pruning.state import SequenceState

SCOPES = ("scored", "all", "last")
# An output head beyond a processor's caches is read from memory once a run: small batches wait for each other until so
# many tokens have been computed, some seconds' work on a CPU. It is what a stopped run may lose.
LARGE_HEAD, HELD_TOKENS = 1 << 24, 1024


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


@dataclass
class _Row:
    """One distinct input of the pruned forward, and the requests it answers."""

    parent: int  # row of the context batch
    inputs: tuple[int, ...]  # tokens after the context's forward, but the continuation's last
    nodes: list[int]  # of `Answers`: where each token of the continuation is predicted
    targets: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # request, continuation


@dataclass(frozen=True)
class _Cost:
    """What a row cost: the fields of `Score` that do not depend on its last token."""

    masked: int = 0
    pruned: float = 0.0
    outside: float = 0.0
    remasks: int = 0
    trace: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Prefix:
    """A token prefix of several contexts, run once: its length, KV cache of one row, and the method's state."""

    length: int
    cache: Any
    state: SequenceState | None


class Scorer:
    """Scores requests on one model, pruned by `session` (None: dense).

    Args:
        head: see `output_head`.
        batch_size: contexts per forward, `auto`, or a budget. Moves last digits only.
        scope: one of SCOPES.
        share_prefix: run a long prefix of several contexts once (scope `scored`). Moves last digits only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: Callable[[Tensor], Tensor],
        session: Session | None,
        batch_size: int | str | Budget,
        scope: str = "scored",
        share_prefix: bool = True,
    ) -> None:
        self.model, self.head, self.session, self.scope = model, head, session, scope
        self.budget = batch_size if isinstance(batch_size, Budget) else budget(batch_size, model)
        self.share_prefix = share_prefix and can_share_prefix(model)
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
        self.state_bytes = 0  # largest method state seen, per sequence
        # Pruned, the context's last token runs under the mask that the tokens before it make.
        self._last = 0 if session is None else 1
        # The last tokens of a context that are computed even if a shared prefix holds them: one to go on from, and
        # those whose FFN inputs are kept.
        self._least = max(1, session.recent if session is not None else 0)
        config = model.config.get_text_config()
        self._hold = HELD_TOKENS if config.vocab_size * config.hidden_size > LARGE_HEAD else 0
        self._tokens = 0  # computed since the output head last ran
        self._cache_name = cache_argument(model)
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters

    @torch.no_grad()
    def score(
        self, requests: Sequence[Request], done: Callable[[list[tuple[int, Score]]], None] = lambda batch: None
    ) -> list[Score]:
        """One score per request, in order. Long contexts first, so that running out of memory shows at once.

        done: called after each batch, or a few small ones, with (index of the request, its score).
        """
        if self.scope != "scored":
            return self._score_alone(requests, done)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, request in enumerate(requests):
            by_context.setdefault(request.context, []).append(i)
        contexts = sorted(by_context, key=lambda c: (len(c), c), reverse=True)
        scores: dict[int, Score] = {}
        answers, waiting, self._tokens = self._answers(), [], 0
        for members, shared in self._context_batches(contexts):
            waiting += self._run(members, shared, by_context, requests, answers)
            if self._tokens >= self._hold:
                scores |= self._finish(waiting, answers, done)
                answers, waiting, self._tokens = self._answers(), [], 0
        if waiting:
            scores |= self._finish(waiting, answers, done)
        return [scores[i] for i in range(len(requests))]

    def _context_batches(
        self, contexts: list[tuple[int, ...]]
    ) -> Iterator[tuple[list[tuple[int, ...]], _Prefix | None]]:
        """Batches of contexts (longest first), each with the prefix that it shares, which has been run."""
        for group in self._groups(contexts):
            members = [contexts[i] for i in group.members]  # still the longest first
            shared = self._run_prefix(members[0][: group.prefix]) if group.prefix else None
            for part in self._batches([len(c) - self._last for c in members], group.prefix):
                yield members[part], shared

    def _finish(
        self,
        waiting: list[tuple[_Row, _Cost]],
        answers: Answers,
        done: Callable[[list[tuple[int, Score]]], None],
    ) -> dict[int, Score]:
        """Run the output head, and hand over the scores of rows that waited for it."""
        answers.run()
        found = _scores(waiting, answers)
        done(found)
        return dict(found)

    def _groups(self, contexts: list[tuple[int, ...]]) -> list[Group]:
        """Contexts (longest first) by the prefix that they share, the group of the longest first."""
        if not self.share_prefix:
            return [Group(0, list(range(len(contexts))))] if contexts else []
        parts = [c[: len(c) - self._last] for c in contexts]
        groups = [Group(g.prefix, sorted(g.members)) for g in shared_prefixes(parts, self.budget.forward, self._least)]
        return sorted(groups, key=lambda g: g.members[0])

    def _batches(self, lengths: list[int], prefix: int = 0) -> list[slice]:
        """Batches of contexts of these lengths (falling) with a shared prefix.

        Contexts of no tokens leave nothing to make a mask from.
        """
        todo = [max(n - prefix, min(n, self._least)) for n in lengths]
        tokens = self.budget.tokens
        if tokens is not None and self.budget.cached is not None and lengths[0]:
            tokens = min(tokens, self.budget.cached * todo[0] // lengths[0])  # the cache holds the prefix for every row
        return self._cut(todo, self.budget.rows, tokens)

    def _cut(self, lengths: list[int], rows: int, tokens: int | None) -> list[slice]:
        """Batches of rows of these lengths (falling); rows without tokens run apart."""
        longer = sum(n > 0 for n in lengths)
        empty = [slice(longer + p.start, longer + p.stop) for p in batches(lengths[longer:], rows)]
        return batches(lengths[:longer], rows, tokens, self.budget.forward) + empty

    def _run_prefix(self, tokens: tuple[int, ...]) -> _Prefix:
        """Run a prefix of several contexts, densely; a method's state observes it."""
        ids, valid = _pad([tokens], left=True, device=self.device)
        cache, session = prefix_cache(), self.session
        positions = torch.arange(len(tokens), device=self.device)[None]
        if session is None:
            self._forward(ids, valid, positions, cache)
            return _Prefix(len(tokens), cache, None)
        with session.context(valid):
            self._forward(ids, valid, positions, cache)
        return _Prefix(len(tokens), cache, session.state)

    def _run_contexts(self, contexts: list[tuple[int, ...]], shared: _Prefix | None) -> tuple[Any, Tensor, Tensor]:
        """Run contexts densely, as a batch with its padding on the left: their cache, valid [B, N], hidden [B, T, D].

        A shared prefix fills the cache's first columns instead of being computed; as padding stays on the left, a row's
        tokens stay side by side, which sliding windows need. So rows shorter than the longest compute some of the
        prefix's last tokens again, in columns that the longest row fills with its own.
        """
        tokens, valid = _pad(contexts, left=True, device=self.device)
        positions, session, batch = valid.long().cumsum(1) - 1, self.session, len(contexts)
        if tokens.shape[1] == 0:
            assert session is not None
            session.no_context(batch, self.device)
            return new_cache(self.model), valid, tokens[..., None]
        start = 0 if shared is None else max(0, min(shared.length, tokens.shape[1] - self._least))
        if shared is None or not start:
            cache = new_cache(self.model)
            if session is None:
                return cache, valid, self._forward(tokens, valid, positions, cache)
            with session.context(valid):
                hidden = self._forward(tokens, valid, positions, cache)
        else:
            cache = from_prefix(self.model, shared.cache, positions[:, :start].clamp_min(0))
            block, places = tokens[:, start:], positions[:, start:]
            if session is None:
                return cache, valid, self._forward(block, valid, places, cache)
            session.fork(shared.state, torch.zeros(batch, dtype=torch.long, device=self.device))
            real = valid[:, start:]
            with session.extend(real, real & (places >= shared.length)):
                hidden = self._forward(block, valid, places, cache)
        self.state_bytes = max(self.state_bytes, session.state_bytes // batch)
        return cache, valid, hidden

    def _run(
        self,
        contexts: list[tuple[int, ...]],
        shared: _Prefix | None,
        by_context: dict[tuple[int, ...], list[int]],
        requests: Sequence[Request],
        answers: Answers,
    ) -> list[tuple[_Row, _Cost]]:
        """Run a batch of contexts and their candidates: hidden states go into `answers`."""
        session = self.session
        cache, valid, hidden = self._run_contexts([c[: len(c) - self._last] for c in contexts], shared)
        rows: dict[tuple[int, tuple[int, ...]], _Row] = {}
        for parent, context in enumerate(contexts):
            root = answers.root()
            if session is None:
                answers.give([root], hidden[parent, -1:])
            for i in by_context[context]:
                continuation = requests[i].continuation
                inputs = (*context[len(context) - self._last :], *continuation[:-1])
                if (row := rows.get((parent, inputs))) is None:
                    # What an oracle's mask is made from is the row's own tokens: rows have no hidden state in common.
                    alone = session is not None and session.looks_ahead
                    row = _Row(parent, inputs, answers.ask(answers.root() if alone else root, continuation))
                    rows[parent, inputs] = row
                answers.ask(row.nodes[0], continuation)
                row.targets.append((i, continuation))
        ordered = sorted(rows.values(), key=lambda r: len(r.inputs), reverse=True)
        state = session.state if session is not None else None
        found: list[tuple[_Row, _Cost]] = []
        lengths, most = [len(r.inputs) for r in ordered], self.budget.candidates
        if self.budget.cached is not None:  # every row has a copy of its context's cache
            most = max(1, min(most, self.budget.cached // (valid.shape[1] + lengths[0])))
        for part in self._cut(lengths, most, self.budget.tokens):
            batch = ordered[part]
            if not batch[0].inputs:  # dense one-token answers: the context's forward has answered them
                found += [(row, _Cost()) for row in batch]
                continue
            parents = torch.tensor([r.parent for r in batch], device=self.device)
            forked = fork(cache, parents)
            if session is not None:
                session.fork(state, parents)
                if session.looks_ahead:
                    self._rehearse(batch, valid[parents], fork(forked))
            found += zip(batch, self._run_rows(batch, valid[parents], forked, answers), strict=True)
        return found

    def _rehearse(self, rows: list[_Row], seen: Tensor, cache: Any) -> None:
        """Let an oracle see what is to be scored. The cache is used up."""
        assert self.session is not None
        tokens, valid = _pad([r.inputs for r in rows], left=False, device=self.device)
        positions = seen.long().sum(1, keepdim=True) + torch.arange(tokens.shape[1], device=self.device)
        with self.session.foresee(valid):
            self._forward(tokens, torch.cat([seen, valid], 1), positions, cache)

    # -- scopes of other papers ------------------------------------------------------------------------------

    def _score_alone(self, requests: Sequence[Request], done: Callable[[list[tuple[int, Score]]], None]) -> list[Score]:
        """Scopes `all` and `last`: each distinct input is a sequence of its own; no context is shared."""
        rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            inputs = (*request.context, *request.continuation[:-1])
            rows.setdefault((inputs, len(request.continuation)), []).append(i)
        order = sorted(rows, key=lambda r: (len(r[0]), r), reverse=True)
        scores: dict[int, Score] = {}
        for part in self._batches([len(inputs) for inputs, _ in order]):
            targets = [[(i, requests[i].continuation) for i in rows[r]] for r in order[part]]
            found = self._score_whole([inputs for inputs, _ in order[part]], targets)
            scores.update(found)
            done(found)
        return [scores[i] for i in range(len(requests))]

    def _score_whole(
        self, inputs: list[tuple[int, ...]], targets: list[list[tuple[int, tuple[int, ...]]]]
    ) -> list[tuple[int, Score]]:
        """Score rows whose inputs end with the answer; the answer's share of them differs from row to row."""
        tokens, valid = _pad(inputs, left=True, device=self.device)
        positions, session = valid.long().cumsum(1) - 1, self.session
        if session is None:
            hidden = self._forward(tokens, valid, positions, new_cache(self.model))
            step = None
        elif self.scope == "all":
            with session.context(valid):
                self._forward(tokens, valid, positions, new_cache(self.model))
            self.state_bytes = max(self.state_bytes, session.state_bytes // len(inputs))
            step = session.shares(len(inputs))
            with session.decode(valid, frozen=True):
                hidden = self._forward(tokens, valid, positions, new_cache(self.model))
        else:
            cache, before = new_cache(self.model), tokens.shape[1] - 1
            parts = []
            if before:
                with session.context(valid[:, :-1]):
                    parts.append(self._forward(tokens[:, :-1], valid[:, :-1], positions[:, :-1], cache))
                self.state_bytes = max(self.state_bytes, session.state_bytes // len(inputs))
            else:
                session.no_context(len(inputs), self.device)
            step = session.shares(len(inputs))
            with session.decode(valid[:, -1:], frozen=True):
                parts.append(self._forward(tokens[:, -1:], valid, positions[:, -1:], cache))
            hidden = torch.cat(parts, 1)
        # The longest answer's columns, moved so that every row's answer begins in the first one.
        lengths = [len(continuation) for ((_, continuation), *_) in targets]
        width = max(lengths)
        shift = torch.tensor([[width - n] for n in lengths]) + torch.arange(width)
        index = (hidden.shape[1] - width + shift).clamp_max(hidden.shape[1] - 1).to(hidden.device)
        answers = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
        asked = self._answers()
        made = []
        for i, (row, found) in enumerate(zip(inputs, targets, strict=True)):
            root = asked.root()
            paths = [asked.ask(root, continuation) for _, continuation in found]
            nodes = paths[0]  # they differ in their last tokens only
            asked.give(nodes, answers[i, : len(nodes)])
            ran = len(nodes) if self.scope == "all" else 1
            pruned, outside = (0.0, 0.0) if step is None else (float(1 - step.read[i]), float(1 - step.mask[i]))
            cost = _Cost(ran if pruned > 0 else 0, pruned * ran, outside * ran)
            made.append((_Row(i, row, nodes, found), cost))
        asked.run()
        return _scores(made, asked)

    # -- scope `scored` --------------------------------------------------------------------------------------

    def _run_rows(self, rows: list[_Row], seen: Tensor, cache: Any, answers: Answers) -> list[_Cost]:
        """Run candidates after their contexts' caches, in blocks that end where a mask may change."""
        tokens, valid = _pad([r.inputs for r in rows], left=False, device=self.device)
        offset = seen.long().sum(1, keepdim=True)  # real context tokens, so the next position
        pruned, outside = torch.zeros(2, len(rows), dtype=torch.float64)
        masked = torch.zeros(len(rows), dtype=torch.long)
        session = self.session
        start = 0
        while start < tokens.shape[1]:
            room = session.room() if session is not None else None
            end = min(tokens.shape[1], start + room) if room else tokens.shape[1]
            block, mask = tokens[:, start:end], valid[:, start:end]
            positions = offset + torch.arange(start, end, device=self.device)
            seen = torch.cat([seen, mask], 1)
            if session is not None:
                step, counted = session.shares(len(rows)), mask.sum(1).cpu()
                pruned += (1 - step.read) * counted
                outside += (1 - step.mask) * counted
                masked += (step.read < 1) * counted
                with session.decode(mask):
                    hidden = self._forward(block, seen, positions, cache)
            else:
                hidden = self._forward(block, seen, positions, cache)
            for i, row in enumerate(rows):
                nodes = row.nodes[len(row.nodes) - len(row.inputs) :][start:end]  # dense: the context gave the first
                answers.give(nodes, hidden[i, : len(nodes)])
            start = end
        remasks = session.state.remasks.tolist() if session is not None and session.state else [0] * len(rows)
        traces = [session.trace(i) if session is not None else None for i in range(len(rows))]
        return [
            _Cost(int(masked[i]), float(pruned[i]), float(outside[i]), remasks[i], traces[i]) for i in range(len(rows))
        ]

    def _answers(self) -> Answers:
        return Answers(self.head, self.model.config.get_text_config().vocab_size)

    def _forward(self, tokens: Tensor, attention: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Last hidden states [B, T, D]. attention: [B, past + T] bool; positions: [B, T]."""
        self._tokens += tokens.numel()
        kwargs: dict[str, Any] = {self._cache_name: cache}
        if self._takes_positions:
            kwargs["position_ids"] = positions.clamp_min(0)
        base = self.model.base_model
        return base(input_ids=tokens, attention_mask=attention.long(), use_cache=True, **kwargs)[0]


def _scores(rows: list[tuple[_Row, _Cost]], answers: Answers) -> list[tuple[int, Score]]:
    """Scores of the requests that these rows answer."""
    found = []
    for row, cost in rows:
        for request, continuation in row.targets:
            total = sum(answers.logprobs(row.nodes, continuation))
            greedy = answers.greedy(row.nodes, continuation)
            own = (cost.masked, cost.pruned, cost.outside, cost.remasks, cost.trace)
            found.append((request, Score(total, greedy, len(continuation), *own)))
    return found


def _pad(rows: list[tuple[int, ...]], left: bool, device: Any) -> tuple[Tensor, Tensor]:
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


@torch.no_grad()
def output_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """hidden [N, D] -> logits [N, V] as the model itself computes them, checked on three tokens.

    Raises:
        UserError: the model does more between its last hidden state and its logits than is known here.
    """
    config, linear = model.config.get_text_config(), model.get_output_embeddings()

    def head(hidden: Tensor) -> Tensor:
        logits = linear(hidden.to(linear.weight.device))
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = cap * torch.tanh(logits / cap)
        return logits

    device: Any = model.get_input_embeddings().weight.device
    tokens = torch.tensor([[0, 1, 2]], device=device)
    theirs = model(input_ids=tokens).logits[0].float().cpu()
    ours = head(model.base_model(input_ids=tokens)[0][0]).float().cpu()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
        raise UserError(
            f"the output head of {type(model).__name__} is not understood",
            "add it to dart_eval/evaluation/scoring.py",
        )
    return head
