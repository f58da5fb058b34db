"""The lm-eval model: lm-eval's own `HFLM` with causal scoring under a pruning session.

Prompts, tokenisation, stop sequences and metrics stay lm-eval's. Replaced are the three places where tokens meet the
model: log-likelihoods (protocol `scored`, see `scoring`), rolling log-likelihoods (perplexity) and generation.
lm-eval's response cache must not be used with it: its key knows neither the model nor the method.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import LogitsProcessorList, PreTrainedModel

from dart_eval.errors import UserError
from dart_eval.evaluation import sampling
from dart_eval.evaluation.batching import Budget, batches, budget
from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.fitting import fit, truncated
from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.generated import GenerationLog
from dart_eval.evaluation.part import WHOLE, Call, Part, PartDone, Pilot
from dart_eval.evaluation.requests import Request, Score, Scoring, Text
from dart_eval.evaluation.rotary import Angles
from dart_eval.evaluation.scoring import scorer
from dart_eval.evaluation.unusable import LogitsWatch, Unusable
from dart_eval.pruning.dense import DenseSession
from dart_eval.pruning.session import Session
from dart_eval.results.journal import Journal

PERPLEXITY_CHUNK = 2048  # tokens; the first half of a chunk is context, the second half is scored
T = TypeVar("T")
A = TypeVar("A", Score, Text)


NO_SCORE, NO_TEXT = Score(0.0, False, Cost()), Text("", Cost())  # in place of what another part answers


@dataclass(frozen=True)
class _Generation:
    """A batch that generates: prompts by index of the request, the longest first; kwargs: of `generate`."""

    prompts: dict[int, str]
    stop: list[str]
    new_tokens: int
    longest: int  # tokens of a prompt
    kwargs: dict[str, Any]


class RollingLogLikelihood(float):
    """Log-likelihood of the scored half of a document, with the share of the document's bytes that it covers."""

    coverage: float = 1.0


class PrunedLM(HFLM):
    """`HFLM` on a loaded model, scoring causally under a session.

    Args:
        model, tokenizer: as loaded.
        batch_size: contexts per forward (their candidates run up to four times as many rows at a time), or `auto`.
        max_length: tokens, context and continuation together; default the model's.
        chunk: tokens per perplexity chunk, at most `max_length`.
        on_progress: called with the number of requests just finished.
        share_prefix: run a prefix that many contexts have in common once.

    Attributes:
        scope: which positions run pruned when answers are scored, see `scoring`. Perplexities and generated texts know
            only `scored`.
        cut: (task, doc_id) of the cell's documents whose prompt does not fit whole.
        planned, budget: sizes of forwards that units are planned by, and that may be used now: smaller ones, where
            memory has run out, run a unit in pieces. So units stay the same for all who share a cell.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        batch_size: int | str = 8,
        max_length: int | None = None,
        chunk: int = PERPLEXITY_CHUNK,
        on_progress: Callable[[int], None] = lambda n: None,
        share_prefix: bool = True,
    ) -> None:
        # HFLM's own batch size is never used, and its `auto` would try sizes out.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length)
        self.planned = self.budget = budget(batch_size, model)
        self.share_prefix = share_prefix
        self.chunk = chunk
        self.on_progress = on_progress
        self.session: Session | DenseSession = DenseSession()
        self.scope = "scored"
        self.documents: Mapping[str, str] = {}  # task -> field of its document that may be cut to fit
        self.costs: dict[tuple[str, int], Cost] = defaultdict(Cost)  # of each (task, doc_id)
        self.cut: set[tuple[str, int]] = set()
        self.journal = Journal()  # answers of the running cell
        self._clock = time.monotonic()
        self._head, self._angles = output_head(model), Angles(model)
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.part: Part | Pilot = WHOLE
        self.calls: list[Call] = []  # of the cell, so far
        self._kinds = 0  # how many calls there will be
        self._unusable = Unusable()  # answers of the last call
        self._scores: list[Score] = []  # of the last call, in the order of its requests
        self._cut: list[bool] = []

    def begin(
        self,
        session: Session | DenseSession,
        documents: Mapping[str, str],
        journal: Journal | None = None,
        scope: str = "scored",
        part: Part | Pilot = WHOLE,
        kinds: int = 0,
    ) -> None:
        """Start a cell, or go on with one: what the journal has answered is not asked again.

        Args:
            part: what of the cell to run. kinds: of requests that the cell will ask, one call each; after the last
                one a part that is not the whole raises `PartDone`.
        """
        self.part, self.calls, self._kinds = part, [], kinds
        self.session, self.documents, self.scope = session, documents, scope
        self.journal = Journal() if journal is None else journal  # an empty journal is falsy
        self.costs, self.cut = defaultdict(Cost), set()
        self._clock = time.monotonic()

    def _asked_once(self) -> None:
        if not self.part.whole and len(self.calls) == self._kinds:
            raise PartDone

    def _keep(self, answers: Mapping[str, Score | Text], state_bytes: int) -> None:
        """A batch is done: into the journal with it and the time since the last one.

        Raises:
            UserError: no answer of the call has been a number, and there were many.
        """
        now = time.monotonic()
        usable = self._unusable.sift(answers)
        self._unusable.check(over=False)
        new = {name: dataclasses.asdict(answer) for name, answer in usable.items() if name not in self.journal}
        self.journal.add(new, state_bytes, now - self._clock)
        self._clock = now
        self.on_progress(len(answers))

    # -- log-likelihoods -------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers = super().loglikelihood(requests, disable_tqdm=True)
        for request, score, cut in zip(requests, self._scores, self._cut, strict=True):
            self._record(request, score.cost, cut)
        self._asked_once()
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        fitting = [truncated(context, continuation, self.max_length) for _, context, continuation in requests]
        self._cut = [len(r.context) < len(whole) for r, (_, whole, _) in zip(fitting, requests, strict=True)]
        self._scores = self._score(fitting)
        return [(s.logprob, s.greedy) for s in self._scores]

    def _score(self, requests: list[Request], kind: str = "loglikelihood") -> list[Score]:
        """Scores of the requests, in order, from the journal where it has them."""
        names = [_name(r.context, r.continuation) for r in requests]
        distinct = dict(zip(names, requests, strict=True))
        scoring = self._scorer(self.planned)
        todo = list(distinct)
        self._unusable = Unusable(len(todo))
        units = scoring.units(list(distinct.values()))
        sizes = [unit.tokens for unit in units]
        self.calls.append(Call(kind, len(todo), [n + self.planned.forward for n in sizes], sum(sizes)))
        for unit in self._mine(units, lambda unit: [todo[i] for i in unit.requests]):
            if self.budget is self.planned:
                self._keep({todo[i]: score for i, score in scoring.run(unit)}, scoring.state_bytes)
                continue
            left = [todo[i] for i in unit.requests if todo[i] not in self.journal]
            smaller = self._scorer(self.budget)
            for piece in smaller.units([distinct[n] for n in left]):
                self._keep({left[i]: score for i, score in smaller.run(piece)}, smaller.state_bytes)
        self._unusable.check(over=True)
        return [self._answer(name, NO_SCORE) for name in names]

    def _answer(self, name: str, missing: A) -> A:
        """The journal's answer to a request."""
        if (kept := self.journal.get(name)) is None:
            return missing
        return type(missing)(**{**kept, "cost": Cost(**kept["cost"])})

    def _scorer(self, size: Budget) -> Scoring:
        return scorer(self.model, self._head, self.session, size, self.scope, self.share_prefix)

    def _mine(self, units: Sequence[T], names: Callable[[T], list[str]]) -> Iterator[T]:
        """Units of the last call that are to be run here: of our part of the cell, not answered before as a whole."""
        call = self.calls[-1]
        before = sum(len(c.sizes) for c in self.calls[:-1])
        for place, unit in enumerate(units):
            if not self.part.takes(before + place, place, len(units)):
                continue
            if all(name in self.journal for name in names(unit)):
                self.on_progress(len(names(unit)))
                continue
            start = time.monotonic()
            yield unit
            call.seconds[place] = time.monotonic() - start

    def _record(self, request: Instance, cost: Cost, cut: bool = False) -> None:
        assert request.task_name is not None and request.doc_id is not None
        if cut:
            self.cut.add((request.task_name, request.doc_id))
        self.costs[request.task_name, request.doc_id] += cost

    # -- perplexity ------------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Per chunk of a document, the second half given the first. Every chunk begins with the prefix token.

        The result's `coverage` lets `tasks.rolling_results` weight the metric by the text that was scored.
        """
        size = min(self.chunk, self.max_length)
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
        answers = []
        for i, value in enumerate(sums):
            answer = RollingLogLikelihood(value)
            answer.coverage = scored_bytes[i] / total_bytes[i] if total_bytes[i] else 0.0
            answers.append(answer)
        self._asked_once()
        return list(answers)

    def _bytes(self, tokens: list[int]) -> int:
        return len(self.tok_decode(tokens).encode())

    # -- generation ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Dense prefill, mask at its end, every decoded token pruned."""
        if self.eot_token_id is None:
            raise UserError("the tokenizer has no EOS token to end a text", "name one in its tokenizer_config.json")
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        draw = [sampling.draws(r.args[1]) for r in requests]
        names = sampling.named([r.args for r in requests], draw, _name)
        seed = torch.initial_seed()
        self._unusable = Unusable(len(set(names)))
        call = Call("generate_until", 0, [], 0)
        self.calls.append(call)
        planned: list[_Generation] = []
        cut: set[int] = set()
        for members in groups.values():
            kwargs = dict(normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks))
            stop = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
            new_tokens: int = kwargs.pop("max_gen_toks")
            budget = self.max_length - new_tokens
            if budget <= 0:
                raise UserError(f"{new_tokens} new tokens do not fit in a length of {self.max_length}")
            fields = {i: self.documents.get(requests[i].task_name or "") for i in members}
            fitted = {i: fit(self, requests[i], budget, fields[i]) for i in members}
            prompts = {i: prompt for i, (prompt, _) in fitted.items()}
            cut |= {i for i, (_, shorter) in fitted.items() if shorter}
            todo = list({names[i]: i for i in reversed(members)}.values())
            lengths = {i: len(self.tok_encode(prompts[i])) for i in todo}
            todo.sort(key=lambda i: (lengths[i], i), reverse=True)
            # Every new token is a forward: full batches save more than padding costs.
            forwards = new_tokens * self.planned.forward
            for group in self._angles.together([(lengths[i], lengths[i] + new_tokens) for i in todo]):
                sizes = [lengths[todo[n]] + new_tokens for n in group]
                for part in batches(sizes, self.planned.rows, self.planned.generated, forwards):
                    batch = {i: prompts[i] for i in (todo[n] for n in group[part])}
                    planned.append(_Generation(batch, stop, new_tokens, budget, kwargs))
                    call.sizes.append(sum(sizes[part]) + forwards)
                    call.tokens += sum(sizes[part])
            call.requests += len(todo)
        for work in self._mine(planned, lambda work: [names[i] for i in work.prompts]):
            left = [i for i in work.prompts if names[i] not in self.journal or self.budget is self.planned]
            rows = max(1, len(work.prompts) * self.budget.rows // self.planned.rows)
            for start in range(0, len(left), rows):
                piece = {i: work.prompts[i] for i in left[start : start + rows]}
                if draw[left[start]]:
                    sampling.begin_stream(seed, [names[i] for i in piece])
                answers = self._generate(dataclasses.replace(work, prompts=piece))
                state_bytes = self.session.state_bytes // len(answers)
                self._keep({names[i]: answer for i, answer in answers.items()}, state_bytes)
        self._unusable.check(over=True)
        texts = []
        for i, (name, request) in enumerate(zip(names, requests, strict=True)):
            answer = self._answer(name, NO_TEXT)
            self._record(request, answer.cost, i in cut)
            texts.append(answer.text)
        self._asked_once()
        return texts

    def _generate(self, work: _Generation) -> dict[int, Text]:
        """A batch's texts."""
        ids, attention = self.tok_batch_encode(list(work.prompts.values()), left_truncate_len=work.longest)
        watch, log = LogitsWatch(len(ids)), GenerationLog(self.session)
        self._angles.reset()
        with log.watching(self.model):
            output = self._model_generate(
                context=ids.to(self.device), attention_mask=attention.to(self.device), stop=work.stop,
                max_length=ids.shape[1] + work.new_tokens, logits_processor=LogitsProcessorList([watch]), **work.kwargs,
            )[:, ids.shape[1] :]  # fmt: skip
        answers = {}
        for row, i in enumerate(work.prompts):
            tokens = output[row].tolist()
            kept = self._kept(tokens, work.stop)  # a row that has ended may write on until its whole batch has
            text = postprocess_generated_text(self.tok_decode(tokens[:kept]), work.stop, None)
            cost = log.cost(row, kept) + Cost(contexts=1, context_tokens=int(attention[row].sum()))
            answers[i] = Text(text, cost, watch.usable(row, kept))
        return answers

    def _kept(self, tokens: list[int], stop: list[str]) -> int:
        """How many generated tokens count: up to and with the end of sequence or the first stop sequence."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        low, high = 1, end  # the shortest prefix that holds a stop sequence, if the whole does
        if not any(s in self.tok_decode(tokens[:end]) for s in stop if s):
            return end
        while low < high:
            middle = (low + high) // 2
            if any(s in self.tok_decode(tokens[:middle]) for s in stop if s):
                high = middle
            else:
                low = middle + 1
        return low


def _name(*request: Any) -> str:
    """A request's name in the journal: equal requests have equal answers."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
