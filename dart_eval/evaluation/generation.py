"""Generated texts: the prompt runs dense and makes the mask, every decoded token runs pruned.

lm-eval's `HFLM` draws tokens and prepares prompts. This module batches prompts, decides which new tokens count, and
records their cost.

A batch that draws its tokens has a stream of random numbers of its own, so draws do not depend on interruptions or on
where it runs. They do depend on which prompts share it, so the batch size is part of such a cell's key. (If memory runs
out and batches are halved, `halved` in the record says so.)
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from dart_eval.evaluation.batching import Budget, batches
from dart_eval.evaluation.cache import can_pad
from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.requests import Text
from dart_eval.evaluation.rotary import Angles
from dart_eval.evaluation.settings import check_generation
from dart_eval.evaluation.tasks import draws
from dart_eval.layers.find import decoder
from dart_eval.pruning.log import Log, Step
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

# Settings of `generate` that are none of a task's, and what to do instead.
ODD = {"max_length": "use max_gen_toks", "num_return_sequences": "leave it out"}


class Prompt(NamedTuple):
    """A prompt to be continued."""

    request: int  # its index
    name: str
    text: str
    tokens: int  # those that are read
    cut: bool  # it did not fit in full


class Prompts(NamedTuple):
    """Prompts that are continued together, the longest first.

    Attributes:
        longest: most tokens of a prompt.
        new_tokens: most new tokens of each.
        stop: texts that end an answer.
        kwargs: further arguments of `generate`.
        draws: whether tokens are drawn and not the likeliest.
    """

    prompts: list[Prompt]
    longest: int
    new_tokens: int
    stop: list[str]
    kwargs: dict[str, object]
    draws: bool

    @property
    def requests(self) -> list[int]:
        """Indices of its requests."""
        return [p.request for p in self.prompts]


class Generator:
    """Continues prompts on one model under a session.

    Args:
        lm: lm-eval's model.
        session: what prunes it, or lets it run dense.
        budget: sizes of batches.
        angles: of the model.
        documents: task -> field of its document that may be cut to fit.
        seed: of what draws its tokens.

    Attributes:
        ends: the tokens that end a text: the tokenizer's end of sequence, and those of the model's settings.
        state_bytes: largest method state seen, per sequence.

    Raises:
        UserError: nothing ends a text.
    """

    def __init__(
        self, lm: HFLM, session: Session, budget: Budget, angles: Angles, documents: Mapping[str, str], seed: int = 0
    ) -> None:
        if lm.eot_token_id is None:
            raise UserError("the tokenizer has no EOS token to end a text", "add one to tokenizer_config.json")
        self.lm, self.session, self.budget, self.angles = lm, session, budget, angles
        self.documents, self.seed, self.state_bytes = documents, seed, 0
        ends = getattr(lm.model.generation_config, "eos_token_id", None)
        self.ends = {lm.eot_token_id, *(ends if isinstance(ends, list) else [ends])}

    def units(self, requests: Sequence[tuple[str, Instance]]) -> list[Prompts]:
        """Return batches of prompts.

        Args:
            requests: distinct requests with their names.

        Raises:
            UserError: the new tokens leave no room for a prompt.
        """
        groups: dict[str, dict[int, tuple[str, Instance]]] = {}
        for i, named in enumerate(requests):
            groups.setdefault(json.dumps(named[1].args[1], sort_keys=True), {})[i] = named
        return [unit for group in groups.values() for unit in self._units(group)]

    def _units(self, group: dict[int, tuple[str, Instance]]) -> Iterator[Prompts]:
        """Yield the batches of requests with the same settings, by index."""
        given = next(iter(group.values()))[1].args[1]
        settings = {name: value for name, value in given.items() if value is not None}
        check_generation(settings)
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.lm.max_gen_toks))
        for name, remedy in ODD.items():
            if kwargs.pop(name, None) not in (None, 1):
                raise UserError(f"{name} is no setting of a task's generation", remedy)
        if kwargs.get("do_sample"):
            kwargs["temperature"] = float(kwargs.get("temperature", 1.0))  # not 0, as `HFLM` would have it
            if kwargs["temperature"] <= 0:
                raise UserError("do_sample draws tokens, and temperature 0 draws none", "leave one of them out")
        eos = self.lm.tok_decode([self.lm.eot_token_id], skip_special_tokens=False)
        stop = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        new: int = kwargs.pop("max_gen_toks")
        if new < 1:
            raise UserError(f"max_gen_toks={new} leaves no text to generate", "give max_gen_toks=1 or more")
        longest = self.lm.max_length - new
        if longest <= 0:
            raise UserError(f"{new} new tokens do not fit in a context of {self.lm.max_length}")
        prompts = []
        for i, (name, request) in group.items():
            text, cut = fit(self.lm, request, longest, self.documents.get(request.task_name or ""))
            prompts.append(Prompt(i, name, text, min(len(self.lm.tok_encode(text)), longest), cut))
        prompts.sort(key=lambda p: (p.tokens, p.request), reverse=True)
        for alike in self.angles.together([(p.tokens, p.tokens + new) for p in prompts]):
            sizes = [prompts[n].tokens + new for n in alike]
            # Every new token is a forward: full batches save more than padding costs.
            most, forward = self.budget.generated, new * self.budget.forward
            rows = self.budget.rows if self.session.writer is None else 1
            for part in batches(sizes, rows, most, forward, can_pad(self.lm.model)):
                together = [prompts[n] for n in alike[part]]
                yield Prompts(together, longest, new, stop, kwargs, draws(settings))

    @torch.no_grad()
    def run(self, unit: Prompts) -> list[tuple[int, Text]]:
        """Return the texts of a unit's requests, with their indices."""
        lm, prompts = self.lm, unit.prompts
        if unit.draws:
            digest = hashlib.sha256(json.dumps([self.seed, *(p.name for p in prompts)]).encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
        ids, attention = lm.tok_batch_encode([p.text for p in prompts], left_truncate_len=unit.longest)
        watch, log = LogitsWatch(len(ids)), GenerationLog(self.session)
        self.angles.reset()
        # A checkpoint's own `max_new_tokens` would stand before the task's.
        with log.watching(lm.model), patch.object(lm.model.generation_config, "max_new_tokens", None):
            output = lm._model_generate(
                context=ids.to(lm.device), attention_mask=attention.to(lm.device), stop=unit.stop,
                max_length=ids.shape[1] + unit.new_tokens, logits_processor=LogitsProcessorList([watch]), **unit.kwargs,
            )[:, ids.shape[1] :]  # fmt: skip
        self.state_bytes = max(self.state_bytes, self.session.state_bytes)
        texts, ends = [], unit.kwargs.get("eos_token_id")
        for row, prompt in enumerate(prompts):
            tokens = output[row].tolist()
            counted = self.counted(tokens, unit.stop, ends)  # a row that has ended may go on until its whole batch has
            text = self._answer(tokens[:counted], unit.stop)
            cost = log.cost(row, counted) + Cost(contexts=1, context_tokens=int(attention[row].sum()))
            # Of what a writer takes back logits were watched, too.
            usable = watch.usable(row, counted if self.session.writer is None else None)
            limited = counted == unit.new_tokens
            texts.append((prompt.request, Text(text, cost, prompt.cut, usable, tokens[:counted], limited)))
        return texts

    def _answer(self, tokens: list[int], stop: list[str]) -> str:
        """Return the text that a task scores, as in `HFLM`: after the end of thinking, up to a stop sequence."""
        end = self.lm.think_end_token
        if not isinstance(end, int):
            return postprocess_generated_text(self.lm.tok_decode(tokens), stop, end)
        if end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
        return postprocess_generated_text(self.lm.tok_decode(tokens).lstrip(), stop, None)

    def counted(self, tokens: list[int], stop: list[str], ends: object = None) -> int:
        """Return the number of generated tokens up to and with the end of sequence or the first stop sequence.

        Args:
            ends: `eos_token_id` of the request's settings: one token that ends a text, too, or several.
        """
        last = {*self.ends, *(ends if isinstance(ends, (list, tuple)) else [ends])}
        end = next((i + 1 for i, token in enumerate(tokens) if token in last), len(tokens))

        def stopped(count: int) -> bool:
            # Special tokens count, too: <|im_end|> may be a stop sequence of a base model.
            texts = [self.lm.tok_decode(tokens[:count], skip_special_tokens=skip) for skip in (True, False)]
            return any(s in text for text in texts for s in stop if s)

        # The shortest prefix with a stop sequence, if there is one.
        return 1 + bisect_left(range(1, end), True, key=stopped) if stopped(end) else end


def fit(lm: HFLM, request: Instance, budget: int, field: str | None) -> tuple[str, bool]:
    """Cut the end of the document in a prompt, so that the prompt has at most `budget` tokens.

    Args:
        lm: for its tokenizer.
        field: of the document that may be cut; None leaves the prompt to lm-eval, which keeps its last tokens.

    Returns:
        The prompt, and whether it was or will be cut.

    Raises:
        UserError: the rest of the prompt alone is too long, or the document is not in the prompt.
    """
    prompt: str = request.args[0]
    excess = len(lm.tok_encode(prompt)) - budget
    if excess <= 0:
        return prompt, False
    document = str(request.doc.get(field, "")).strip() if field else ""
    at = prompt.rfind(document) if document else -1
    if at < 0:
        if field is None:
            return prompt, True
        raise UserError(f"the document of {request.task_name} was not found in its prompt")
    pieces = lm.tok_encode(document, add_special_tokens=False)
    keep = len(pieces) - excess
    while True:
        if keep <= 0:
            raise UserError(
                f"a prompt of {request.task_name} leaves no room for its document in {budget} tokens",
                "use fewer shots, a larger --max-length, or a model with a longer context",
            )
        short = lm.tok_decode(pieces[:keep]).rstrip()
        cut = prompt[:at] + short + prompt[at + len(document) :]
        excess = len(lm.tok_encode(cut)) - budget
        if excess <= 0:
            return cut, True
        keep -= excess


class LogitsWatch(LogitsProcessor):
    """Notes during generation which rows had a logit of NaN or infinity, or no possible word.

    Args:
        rows: sequences of the batch.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._usable: list[Tensor] = []  # per token: [rows] bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._usable.append(scores.amax(-1).isfinite().view(self.rows, -1).all(1))  # several beams to a row
        return scores

    def usable(self, row: int, tokens: int | None) -> bool:
        """Whether the first `tokens` tokens of a row came from finite logits; None: all of them."""
        return all(bool(step[row]) for step in self._usable[:tokens])


class GenerationLog:
    """The session's log while a batch generates.

    A prefill makes a dense token, and each later forward a pruned one. There may be several prefills: where the rotary
    angles switch, Phi-3 recomputes the KV cache of the prompt and all tokens so far. To the session these are new
    contexts, with new masks and a new log.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        if not session.prunes:  # no hook runs, so that it would keep the steps of what was scored before
            session.log = Log()
        self._parts: list[tuple[list[Step], list[Json]]] = []  # steps and events since each prefill

    def watching(self, model: PreTrainedModel) -> RemovableHandle:
        """Log the forwards inside the returned context, which generate the batch."""
        return decoder(model).register_forward_hook(self._note)

    def _note(self, *_: object) -> None:
        if not self._parts or self._parts[-1][0] is not self.session.steps:
            self._parts.append((self.session.steps, self.session.events))

    def cost(self, row: int, tokens: int) -> Cost:
        """Return the cost of the first `tokens` tokens of a row."""
        steps: list[Step | None] = []  # None: a prefill
        remasks = 0
        for part, events in self._parts:
            remasks += sum(e["sequence"] == row and len(steps) + e["step"] < tokens for e in events)
            steps += [None, *part]
        counted = [step for step in steps[:tokens] if step is not None]
        not_read = [float(1 - step.read[row]) for step in counted]
        return Cost(
            tokens=tokens, pruned_tokens=sum(share != 0 for share in not_read), not_read_sum=sum(not_read),
            outside_sum=sum(float(1 - step.mask[row]) for step in counted), remasks=remasks,
            trace=self.session.trace(row, tokens - 1) if len(self._parts) == 1 else None,
        )  # fmt: skip
