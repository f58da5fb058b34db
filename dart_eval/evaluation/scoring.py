"""Log-likelihoods without looking ahead (scope `scored`), and under two protocols of other papers.

For each context: all tokens but the last run dense, once, and build the mask. The last context token and the
continuation run pruned through the KV cache, so every log-probability that counts was produced by pruned FFNs, one-
token answers included. Candidates share the context, its cache and its mask. Where a method may renew its mask, the
continuation runs in blocks that end where a mask may change: the numbers equal token-by-token decoding.

Scope `all` (the public code's of arXiv 2601.22632): each answer with its context is one forward; the mask is made from
all its tokens, the answer's too, and prunes all of them. It looks ahead. Scope `last` (GRIFFIN's for classification,
arXiv 2404.01365): all tokens but the last run dense and make the mask; the last input token alone runs pruned.

Rows of a batch are left-padded contexts; nothing crosses rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dart_eval.errors import UserError
from dart_eval.ffn import cache_argument
from dart_eval.pruning.session import Session

SCOPES = ("scored", "all", "last")
LOGIT_BYTES = 256 << 20  # of fp32 logits held at a time
CANDIDATES_PER_CONTEXT = 4  # candidate rows per forward, in multiples of the batch size


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
    inputs: tuple[int, ...]  # last context token, then the continuation but its last token
    targets: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # request, continuation


class Scorer:
    """Scores requests on one model, pruned by `session` (None: dense)."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Callable[[Tensor], Tensor],
        session: Session | None,
        batch_size: int,
        scope: str = "scored",
    ) -> None:
        self.model, self.head, self.session, self.batch_size, self.scope = model, head, session, batch_size, scope
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
        self.state_bytes = 0  # largest method state seen, per sequence
        self._cache_name = cache_argument(model)
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters

    @torch.no_grad()
    def score(
        self, requests: Sequence[Request], done: Callable[[list[tuple[int, Score]]], None] = lambda batch: None
    ) -> list[Score]:
        """One score per request, in order. Long contexts first, so that running out of memory shows at once.

        done: called after each batch with (index of the request, its score).
        """
        if self.scope != "scored":
            return self._score_alone(requests, done)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, request in enumerate(requests):
            by_context.setdefault(request.context, []).append(i)
        contexts = sorted(by_context, key=lambda c: (len(c), c), reverse=True)
        scores: dict[int, Score] = {}
        for part in _batches([len(c) for c in contexts], self.batch_size):
            found = self._score_contexts(contexts[part], by_context, requests)
            scores.update(found)
            done(found)
        return [scores[i] for i in range(len(requests))]

    def _score_contexts(
        self,
        contexts: list[tuple[int, ...]],
        by_context: dict[tuple[int, ...], list[int]],
        requests: Sequence[Request],
    ) -> list[tuple[int, Score]]:
        prefix, valid = _pad([c[:-1] for c in contexts], left=True, device=self.device)
        cache, session = self._cache(), self.session
        if prefix.shape[1] == 0:
            if session is not None:
                session.no_context(len(contexts), self.device)
        elif session is not None:
            with session.context(valid):
                self._forward(prefix, valid, valid.long().cumsum(1) - 1, cache)
            self.state_bytes = max(self.state_bytes, session.state_bytes // len(contexts))
        else:
            self._forward(prefix, valid, valid.long().cumsum(1) - 1, cache)

        rows: dict[tuple[int, tuple[int, ...]], _Row] = {}
        for parent, context in enumerate(contexts):
            for i in by_context[context]:
                continuation = requests[i].continuation
                inputs = (context[-1], *continuation[:-1])
                rows.setdefault((parent, inputs), _Row(parent, inputs)).targets.append((i, continuation))
        ordered = sorted(rows.values(), key=lambda r: len(r.inputs), reverse=True)
        state = session.state if session is not None else None
        results: list[tuple[int, Score]] = []
        size = CANDIDATES_PER_CONTEXT * self.batch_size
        for first in range(0, len(ordered), size):
            part = ordered[first : first + size]
            parents = torch.tensor([r.parent for r in part], device=self.device)
            forked = copy.deepcopy(cache)
            if prefix.shape[1]:
                forked.batch_select_indices(parents)
            if session is not None:
                session.fork(state, parents)
            if session is not None and session.looks_ahead:
                self._rehearse(part, valid[parents], copy.deepcopy(forked))
            results += self._score_rows(part, valid[parents], forked)
        return results

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
        for part in _batches([len(inputs) for inputs, _ in order], self.batch_size):
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
            hidden = self._forward(tokens, valid, positions, self._cache())
            step = None
        elif self.scope == "all":
            with session.context(valid):
                self._forward(tokens, valid, positions, self._cache())
            self.state_bytes = max(self.state_bytes, session.state_bytes // len(inputs))
            step = session.shares(len(inputs))
            with session.decode(valid, frozen=True):
                hidden = self._forward(tokens, valid, positions, self._cache())
        else:
            cache, before = self._cache(), tokens.shape[1] - 1
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
        made = [_Row(i, row, found) for i, (row, found) in enumerate(zip(inputs, targets, strict=True))]
        logprobs: list[list[Tensor]] = [[] for row in made for _ in row.targets]
        greedy = [True] * len(logprobs)
        self._collect(answers, made, 0, logprobs, greedy)
        results, k = [], 0
        for i, row in enumerate(made):
            for request, continuation in row.targets:
                total = float(torch.cat(logprobs[k]).double().sum())
                ran = len(continuation) if self.scope == "all" else 1
                pruned, outside = (0.0, 0.0) if step is None else (float(1 - step.read[i]), float(1 - step.mask[i]))
                cost = (ran if pruned > 0 else 0), pruned * ran, outside * ran, 0
                results.append((request, Score(total, greedy[k], len(continuation), *cost)))
                k += 1
        return results

    def _cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    # -- scope `scored` --------------------------------------------------------------------------------------

    def _score_rows(self, rows: list[_Row], seen: Tensor, cache: Any) -> list[tuple[int, Score]]:
        tokens, valid = _pad([r.inputs for r in rows], left=False, device=self.device)
        offset = seen.long().sum(1, keepdim=True)  # real context tokens, so the next position
        logprobs: list[list[Tensor]] = [[] for r in rows for _ in r.targets]
        greedy = [True] * len(logprobs)
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
            self._collect(hidden, rows, start, logprobs, greedy)
            start = end
        remasks = session.state.remasks.tolist() if session is not None and session.state else [0] * len(rows)
        results, k = [], 0
        for i, row in enumerate(rows):
            trace = session.trace(i) if session is not None else None
            for request, continuation in row.targets:
                total = float(torch.cat(logprobs[k]).double().sum())
                cost = int(masked[i]), float(pruned[i]), float(outside[i]), remasks[i]
                results.append((request, Score(total, greedy[k], len(continuation), *cost, trace)))
                k += 1
        return results

    def _collect(
        self, hidden: Tensor, rows: list[_Row], start: int, logprobs: list[list[Tensor]], greedy: list[bool]
    ) -> None:
        """Log-probabilities of the targets in this block; logits only there, a few at a time. hidden: [R, T, D]."""
        places = []  # (target list, row, position in the block, token ids)
        k = 0
        for i, row in enumerate(rows):
            for _, continuation in row.targets:
                wanted = continuation[start : start + hidden.shape[1]]
                if wanted:
                    places.append((k, i, wanted))
                k += 1
        if not places:
            return
        row_ids = torch.tensor([i for _, i, w in places for _ in w], device=hidden.device)
        steps = torch.tensor([t for _, _, w in places for t in range(len(w))], device=hidden.device)
        targets = torch.tensor([t for _, _, w in places for t in w], device=hidden.device)
        found, best = [], []
        per = max(1, LOGIT_BYTES // (4 * self.model.config.get_text_config().vocab_size))
        for part in torch.arange(len(targets), device=hidden.device).split(per):
            logits = self.head(hidden[row_ids[part], steps[part]]).float()  # [n, V]
            target = targets[part, None].to(logits.device)
            # log_softmax, as stock lm-eval has it: over 262 144 words in fp32 it is off by 1e-4 against fp64, where
            # logsumexp is off by 2e-5; equal numbers are worth more here than the last digit.
            found.append(logits.log_softmax(1).gather(1, target).squeeze(1).cpu())
            best.append((logits.argmax(1, keepdim=True) == target).squeeze(1).cpu())
        sizes = [len(w) for _, _, w in places]
        for (k, _, _), logprob, equal in zip(
            places, torch.cat(found).split(sizes), torch.cat(best).split(sizes), strict=True
        ):
            logprobs[k].append(logprob)
            greedy[k] = greedy[k] and bool(equal.all())

    def _forward(self, tokens: Tensor, attention: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Last hidden states [B, T, D]. attention: [B, past + T] bool; positions: [B, T]."""
        kwargs: dict[str, Any] = {self._cache_name: cache}
        if self._takes_positions:
            kwargs["position_ids"] = positions.clamp_min(0)
        base = self.model.base_model
        return base(input_ids=tokens, attention_mask=attention.long(), use_cache=True, **kwargs)[0]


def _batches(lengths: Sequence[int], size: int) -> Iterator[slice]:
    """Slices of at most `size` rows, longest first; one-token rows, which leave nothing to make a mask from, apart."""
    longer = sum(n > 1 for n in lengths)
    for first, last in ((0, longer), (longer, len(lengths))):
        for start in range(first, last, size):
            yield slice(start, min(start + size, last))


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
