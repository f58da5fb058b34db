"""Sirius (arXiv 2409.03856): the dense model checks what a pruned one writes, k tokens at a time, and corrects it.

    block   a token of dense, then k - 1 pruned ones: t_0 .. t_(k-1)
    check   dense runs t_0 .. t_(k-1) in one pass over the cache, whose entries become its own
    keep    t_1 .. t_n, up to the first with softmax(logits_(i-1) / .6)[t_i] < threshold
    go on   the argmax of logits_n is t_0 of the next block: a correction, or the token after the whole block

A block reads the weights (k - 1) d + 1 times, where a pruned token reads d, and gives n + 1 tokens: about d + 1/k a
token, and more by what is taken back. Its products are the same with k in place of 1.

As in the authors' code (Infini-AI-Lab/Sirius, 5f3032a, `CommonSenseReasoning/llama12.py`, tree width 1) decoding is
greedy, and a token that ends the text is checked before it counts. The state of a method that makes new masks while it
decodes (`dart`) goes back with the tokens; of a whole block it does not see the last one, which runs dense alone.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from dart_eval.layers.families import cache_argument
from dart_eval.pruning.method import Method, option
from dart_eval.pruning.methods.dense import Dense
from dart_eval.pruning.registry import check_name, make
from dart_eval.util.errors import UserError, naming

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.session import Session

TEMPERATURE = 0.6
KEYS_ALONE = (DynamicLayer, DynamicSlidingWindowLayer)  # of a cache: keys and values per token, and nothing else
# What the method inside says and does.
OF_INNER = (
    "by_token", "calibrates", "check", "check_sparsity", "exact", "fits_all", "granularity", "keeps_state",
    "needs_context", "observe_flops", "prompt_flops", "releases", "remask_cost", "replaces",
)  # fmt: skip


class Sirius(Method):
    """A pruned model that dense corrects."""

    name = "sirius"
    summary = "lets dense check and correct what another method writes, some tokens at a time"
    paper = "2409.03856"
    of: str = option("griffin", "name of the method that writes, with its default options")
    every: int = option(16, "k, the tokens of a block", least=2, most=4096)
    threshold: float = option(0.1, "least probability under dense of a token that is kept", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        with naming("of: "):
            check_name(self.of)
        self._inner = make(self.of) if self.of != self.name else Dense()
        if not self._inner.sized or self._inner.looks_ahead:
            raise UserError(f"of is {self.of!r}", "it must prune while it writes, such as griffin")

    @torch.no_grad()
    def write(self, session: Session, model: Any, input_ids: Tensor, **of_generate: Any) -> object:
        config, ends = of_generate["generation_config"], of_generate["stopping_criteria"]
        name, processor = cache_argument(model), of_generate["logits_processor"]
        _refuse(model, input_ids, config, of_generate.get(name), of_generate.get("attention_mask"))
        cache, follows, row = DynamicCache(), type(session.method).after is not Method.after, torch.tensor([0])

        def forward(tokens: Tensor) -> Tensor:
            real = torch.ones(1, cache.get_seq_length() + tokens.shape[1], dtype=torch.long, device=tokens.device)
            return model(input_ids=tokens, attention_mask=real, use_cache=True, **{name: cache}).logits[0].float()

        def likeliest(ids: Tensor, logits: Tensor) -> Tensor:
            return torch.cat([ids, processor(ids, logits[None]).argmax(-1, keepdim=True)], 1)

        ids = likeliest(input_ids, forward(input_ids)[-1])
        over = _ended(ends, ids)
        while not over:
            start, length = len(session.steps), ids.shape[1]
            states = [(session.rows, session.log.mark())]
            while ids.shape[1] < length + self.every - 1 and not over:
                ids = likeliest(ids, forward(ids[:, -1:])[-1])
                rows = session.rows.select(row) if follows and session.rows is not None else session.rows
                states.append((rows, session.log.mark()))
                over = _ended(ends, ids)
            block = ids[:, length - 1 :]
            session.rewind(block.shape[1] - 1, states[-1][0])
            with session.over(block.shape[1]):
                logits = forward(block)
            kept = self._kept(logits, block[0])
            if back := block.shape[1] - 1 - kept:
                rows, mark = states[kept + 1]
                session.rewind(back, rows)
                session.log.cut(mark)
                ids, over = ids[:, :-back], False
            session.spread(start, kept if over else kept + 1, read=1.0)
            if not over:
                ids = likeliest(ids, logits[kept])
                over = _ended(ends, ids)
        return GenerateDecoderOnlyOutput(ids) if config.return_dict_in_generate else ids  # type: ignore[arg-type]

    def _kept(self, logits: Tensor, block: Tensor) -> int:
        """Return how many of a block's pruned tokens dense keeps. logits: [k, V], dense's; block: [k]."""
        share = (logits[:-1] / TEMPERATURE).softmax(-1).gather(1, block[1:, None].to(logits.device))[:, 0]
        return int((share >= self.threshold).long().cumprod(0).sum())

    def computed(self, read: float) -> float:
        """As if every block had all of its tokens: those that a text's end cut short count alike."""
        pruned = 1 - self.inner.sparsity
        tokens = ((self.every - 1) * pruned + 1) / read  # that a block gives
        return ((self.every - 1) * self.inner.computed(pruned) + self.every) / tokens

    def fetched(self, read: float) -> float | None:
        """Of the same blocks; dense fetches what it reads."""
        pruned, rest = 1 - self.inner.sparsity, self.every - 1
        lines = self.inner.fetched(pruned)
        return lines and read * (rest * lines + 1) / (rest * pruned + 1)

    def step_flops(self, shape: ModelShape) -> float:
        """With dense's attention and head, which run again for each token (of tokens taken back they do not count)."""
        return self.inner.step_flops(shape) + shape.decode(1, 0.0)


for name in OF_INNER:
    setattr(Sirius, name, property(operator.attrgetter(f"inner.{name}")))


def _refuse(model: Any, ids: Tensor, config: Any, cache: Any, mask: Tensor | None) -> None:
    """Refuse what cannot be written so: several sequences, padding, draws, caches that cannot be cut."""
    if len(ids) > 1 or (mask is not None and not bool(mask.all())):
        raise UserError("sirius writes one sequence at a time, without padding", "pass one prompt to generate()")
    if config.do_sample:
        raise UserError("sirius writes the likeliest tokens, and draws none", "leave do_sample out")
    layers, of_model = getattr(cache, "layers", ()), model.config.get_text_config()
    kinds = {*(getattr(of_model, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if cache is not None and cache.get_seq_length():
        raise UserError("sirius begins with a whole prompt, and the KV cache is filled", "leave the cache out")
    if kinds or type(cache) is not DynamicCache or any(type(layer) not in KEYS_ALONE for layer in layers):
        raise UserError(f"the cache of {type(model).__name__} cannot be rewound", "take the method without sirius")
    angles = getattr(of_model, "rope_parameters", None) or {}
    if {"longrope", "dynamic"} & {a.get("rope_type") for a in (angles, *angles.values()) if isinstance(a, dict)}:
        raise UserError("sirius does not follow rotary angles that depend on the length", "take the method without it")


def _ended(criteria: Sequence[Any], ids: Tensor) -> bool:
    """Whether a text is over. Criteria are copies: lm-eval's remember an end that dense may take back."""
    found = False
    for criterion in criteria:
        fresh = copy.copy(criterion)
        vars(fresh).update({name: [*value] for name, value in vars(criterion).items() if isinstance(value, list)})
        found |= bool(torch.as_tensor(fresh(ids, None)).all())
    return found
