"""The lm-eval model: lm-eval's own `HFLM` with causal scoring under a pruning session.

Prompts, tokenisation, stop sequences and metrics stay lm-eval's. Three calls of the model are replaced:
log-likelihoods (scope `scored`, see `scoring`), rolling log-likelihoods (perplexity) and generation. lm-eval's response
cache must not be used with it, since its key contains neither the model nor the method.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dart_eval.evaluation.batching import Budget, budget
from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.generation import Generator
from dart_eval.evaluation.requests import A, Request, Score, Scoring, Text, stored_answer
from dart_eval.evaluation.rotary import Angles
from dart_eval.evaluation.scoring import scorer
from dart_eval.evaluation.states import States
from dart_eval.evaluation.tasks import RollingLogLikelihood, draws
from dart_eval.layers.finite import REMEDY
from dart_eval.pruning.session import Session
from dart_eval.results.store import Journal
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

PERPLEXITY_CHUNK = 2048  # tokens; the first half of a chunk is context, the second half is scored
HOPELESS = 64  # answers without a usable one after which a cell ends


class PrunedLM(HFLM):
    """`HFLM` on a loaded model, scoring causally under a session.

    Args:
        model, tokenizer: as loaded.
        batch_size: contexts per forward (their candidates run up to four times as many rows at a time), or `auto`.
        max_length: tokens, context and continuation together; default the model's.
        chunk: tokens per perplexity chunk, at most `max_length`.
        enable_thinking: what the chat template is told of thinking; None: nothing.
        think_end_token: an answer is what a text says after it; its text, or its id in digits.
        add_bos_token: whether prompts begin with the tokenizer's first token; None: as the tokenizer does.
        states: of dense, see `scoring.scorer`.

    Attributes:
        scope: which positions run pruned when answers are scored, see `scoring`. Perplexities and generated texts have
            only `scored`.
        texts: (task, doc_id) -> its text, or the first of several.
        cut: (task, doc_id) of the cell's documents whose prompt does not fit in full.
        on_progress: called with the number of requests just finished, and of all that are known of.
        planned: sizes of forwards by which units are planned.
        budget: sizes of forwards in use. After memory has run out they are smaller, and units run in pieces.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str = 8,
        max_length: int | None = None,
        chunk: int = PERPLEXITY_CHUNK,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        states: States | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        # HFLM's own batch size is never used, and its `auto` would try sizes out.
        # And it would tie an output head that its owner has untied.
        with patch.object(model, "tie_weights", lambda *_, **__: None):
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length,
                enable_thinking=enable_thinking, think_end_token=think_end_token,
                **({} if add_bos_token is None else {"add_bos_token": add_bos_token}),
            )  # fmt: skip
        self.planned = self.budget = budget(batch_size, model)
        self.states = states
        self.chunk = chunk
        self.on_progress: Callable[[int, int], None] = lambda n, of: None
        self._head, self._angles = output_head(model), Angles(model)
        self._scored: list[tuple[Score, bool]] = []  # of the last call: scores, and whether a context was cut
        self.begin(Session(), {})

    def begin(
        self,
        session: Session,
        documents: Mapping[str, str],
        journal: Journal | None = None,
        scope: str = "scored",
        whole_tokens: bool = False,
    ) -> None:
        """Start or resume a cell: answers in the journal are not computed again.

        Args:
            documents: task -> field of its document that may be cut to fit.
            whole_tokens: whether an answer begins with a token that crosses the end of the context. Else that token
                is lost, as in stock lm-eval.
        """
        self.whole_tokens = whole_tokens
        self.session, self.documents, self.scope = session, documents, scope
        self.journal = Journal() if journal is None else journal  # an empty journal is falsy
        self.kinds: set[str] = set()  # of the calls of the model so far
        self.costs: dict[tuple[str, int], Cost] = defaultdict(Cost)  # of each (task, doc_id)
        self.cut: set[tuple[str, int]] = set()
        self.texts: dict[tuple[str, int], Text] = {}
        self._known, self._clock = 0, time.monotonic()

    def _ask(
        self, kind: str, requests: Json, make: Callable[[Budget], Scoring | Generator], answer: type[A]
    ) -> dict[str, A]:
        """Return the answers to the requests of a call, by name. Those that have none yet run, and go into the journal.

        Args:
            kind: `loglikelihood`, `loglikelihood_rolling` or `generate_until`.
            requests: by their names in the journal.
            make: returns the scorer or generator for a size of forwards.
            answer: type of the answers; anything else in the journal does not count.

        Answers of NaN or infinity stay out of it. A log-likelihood of -inf counts too: log_softmax in fp32 returns it
        only for a logit of -inf, which is an overflow or a word that the model rules out, and it ranks no answer.

        Raises:
            UserError: answers are NaN or infinite: at the end, or earlier if none was usable for long.
        """
        asked, answering = list(requests.values()), make(self.planned)
        names: list[str] = list(requests)
        seen = wrong = 0
        self.kinds.add(kind)
        self._known += len(names)
        for name in names:
            if name in self.journal and stored_answer(self.journal[name], answer) is None:
                del self.journal[name]
        for unit in answering.units(asked):
            if all(names[i] in self.journal for i in unit.requests):
                self.on_progress(len(unit.requests), self._known)
                continue
            open_requests, pieces = [*range(len(names))], [unit]
            if self.budget is not self.planned:
                open_requests = [i for i in unit.requests if names[i] not in self.journal]
                answering = make(self.budget)
                pieces = answering.units([asked[i] for i in open_requests])
            for piece in pieces:
                answers = {names[open_requests[i]]: found for i, found in answering.run(piece)}
                usable = {name: found for name, found in answers.items() if found.usable}
                seen, wrong = seen + len(answers), wrong + len(answers) - len(usable)
                if wrong == seen >= HOPELESS:
                    raise UserError(f"{wrong} of the first {seen} of {len(names)} answers are NaN or infinite", REMEDY)
                now = time.monotonic()
                new = {name: dataclasses.asdict(found) for name, found in usable.items() if name not in self.journal}
                self.journal.add(new, answering.state_bytes, now - self._clock)  # with the time since the last batch
                self._clock = now
                self.on_progress(len(answers), self._known)
        if wrong:
            raise UserError(f"{wrong} of {len(names)} answers are NaN or infinite", REMEDY)
        stored = {name: stored_answer(self.journal[name], answer) for name in names}
        return {name: found for name, found in stored.items() if found is not None}

    def _record(self, request: Instance, cost: Cost, cut: bool = False) -> None:
        assert request.task_name is not None and request.doc_id is not None
        if cut:
            self.cut.add((request.task_name, request.doc_id))
        self.costs[request.task_name, request.doc_id] += cost

    # -- log-likelihoods -------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers = super().loglikelihood(requests, disable_tqdm=True)
        for request, (score, cut) in zip(requests, self._scored, strict=True):
            self._record(request, score.cost, cut)
        return answers

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Return the tokens of a text.

        Raises:
            UserError: one of them, such as a special token of a chat, lies beyond the model's embeddings.
        """
        tokens: list[int] = super().tok_encode(string, *args, **kwargs)
        rows = self.model.get_input_embeddings().weight.shape[0]
        if (largest := max(tokens, default=0)) >= rows:
            raise UserError(
                f"a prompt has the token {self.tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}, and the "
                f"model {rows} embeddings",
                "give the model its own tokenizer, or save it after resize_token_embeddings",
            )
        return tokens

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if not self.whole_tokens:
            return before, after
        whole = self.tok_encode(context + continuation)
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return whole[:shared], whole[shared:]

    def _loglikelihood_tokens(
        self, requests: list[tuple[object, list[int], list[int]]], *args: object, **kwargs: object
    ) -> list[tuple[float, bool]]:
        fitting = [
            truncated(context or [self.prefix_token_id], continuation, self.max_length)
            for _, context, continuation in requests
        ]
        cut = [len(r.context) < len(whole) for r, (_, whole, _) in zip(fitting, requests, strict=True)]
        self._scored = list(zip(self._score(fitting), cut, strict=True))
        return [(s.logprob, s.greedy) for s, _ in self._scored]

    def _score(self, requests: list[Request], kind: str = "loglikelihood") -> list[Score]:
        """Return the scores of the requests, in order."""
        mark = ("kl",) if self.states and self.states.known else ()  # no answer without KL is one with it
        names = [_name(r.context, r.continuation, *mark) for r in requests]
        answers = self._ask(kind, dict(zip(names, requests, strict=True)), lambda size: scorer(
            self.model, self._head, self.session, size, self.scope, states=self.states
        ), Score)  # fmt: skip
        return [answers[name] for name in names]

    # -- perplexity ------------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Score the second half of each chunk of a document, given the first. Every chunk begins with the prefix token.

        The result's `coverage` lets `tasks.weigh_scored_text` weight the metric by the text that was scored.
        """
        size = max(2, min(self.chunk, self.max_length))  # the last token is only predicted
        chunks: list[tuple[int, Request]] = []
        total_bytes, scored_bytes = [0] * len(requests), [0] * len(requests)
        for i, request in enumerate(requests):
            tokens = list(self.tok_encode(request.args[0]))
            if tokens and tokens[0] == self.prefix_token_id:
                tokens = tokens[1:]
            for start in range(0, len(tokens), size - 1):
                piece = [self.prefix_token_id, *tokens[start : start + size - 1]]
                half = (len(piece) + 1) // 2
                total_bytes[i] += self._bytes(piece[1:])
                if len(piece) > half:
                    chunks.append((i, Request(tuple(piece[:half]), tuple(piece[half:]))))
                    scored_bytes[i] += self._bytes(piece[half:])
        sums = [0.0] * len(requests)
        for (i, _), score in zip(chunks, self._score([c for _, c in chunks], "loglikelihood_rolling"), strict=True):
            sums[i] += score.logprob
            self._record(requests[i], score.cost)
        answers = [RollingLogLikelihood(value) for value in sums]
        for answer, scored, total in zip(answers, scored_bytes, total_bytes, strict=True):
            answer.coverage = scored / total if total else 0.0
        return list(answers)

    def _bytes(self, tokens: list[int]) -> int:
        return len(self.tok_decode(tokens).encode())

    # -- generation ------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generate: dense prefill, mask at its end, every decoded token pruned."""
        names: list[str] = []
        seen: Counter[str] = Counter()
        distinct: dict[str, tuple[str, Instance]] = {}
        for request in requests:
            name = _name(*request.args)
            if draws(request.args[1]):  # equal requests have answers of their own
                seen[name] += 1
                name = _name(*request.args, seen[name])
            names.append(name)
            distinct.setdefault(name, (name, request))
        seed = torch.initial_seed()
        answers = self._ask("generate_until", distinct, lambda size: Generator(
            self, self.session, size, self._angles, self.documents, seed
        ), Text)  # fmt: skip
        texts = [answers[name] for name in names]
        for request, text in zip(requests, texts, strict=True):
            self._record(request, text.cost, text.cut)
            self.texts.setdefault((request.task_name, request.doc_id), text)
        return [text.text for text in texts]


def truncated(context: list[int], continuation: list[int], max_length: int) -> Request:
    """Cut from the left as `HFLM` does: at most max_length + 1 tokens, the last of which is only predicted.

    Raises:
        UserError: the continuation alone is too long, or empty.
    """
    if not continuation:
        raise UserError("an answer has no token of its own after its context", "check the task's target_delimiter")
    if len(continuation) > max_length:
        raise UserError(
            f"a continuation of {len(continuation)} tokens does not fit in {max_length}", "use a larger --max-length"
        )
    whole = (context + continuation)[-(max_length + 1) :]
    split = len(whole) - len(continuation)
    return Request(tuple(whole[:split]), tuple(whole[split:]))


def _name(*request: object) -> str:
    """Return a request's name in the journal: equal requests have equal names."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
