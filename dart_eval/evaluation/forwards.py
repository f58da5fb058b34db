"""Forwards of a model's decoder, and its separate output head."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dart_eval.evaluation.cache import can_pad, new_cache
from dart_eval.evaluation.logits import Answers
from dart_eval.evaluation.rotary import Angles
from dart_eval.evaluation.states import States
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import base_of
from dart_eval.layers.finite import refuse_not_finite
from dart_eval.layers.projection import input_device
from dart_eval.layers.verify import explaining
from dart_eval.pruning.session import cache_in
from dart_eval.util.errors import UserError

# Models that compute several tokens after a cached context wrongly, but one token correctly: Jamba's state space begins
# anew. `output_head` detects them.
_ONE_BY_ONE: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


class Forwards:
    """Runs a model up to its last hidden states.

    Args:
        head: see `output_head`.

    Attributes:
        angles: rotary angles that depend on the length of rows. Rows of a forward have the same
            (`Angles.least_length`), and it runs inside `angles.held`.
        padded: whether rows of a forward may have padding on their left (`cache.can_pad`).
        room: most tokens at once on a filled cache; None for any number.
    """

    def __init__(self, model: PreTrainedModel, head: Callable[[Tensor], Tensor]) -> None:
        self.model, self.head = model, head
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
        self.angles, self.padded, self.room = Angles(model), can_pad(model), 1 if model in _ONE_BY_ONE else None
        self._cache_name = cache_argument(model)
        self._base = base_of(model)
        self._takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters

    def __call__(self, tokens: Tensor, attention: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Return last hidden states [B, T, D]. tokens: [B, T]; attention: [B, past + T] bool; positions: [B, T]."""
        kwargs: dict[str, object] = {self._cache_name: cache}
        if self._takes_positions:
            # Padding has position 0; else padding after a short row would count as its length (`Angles`).
            kwargs["position_ids"] = positions.masked_fill(~attention[:, -tokens.shape[1] :], 0)
        return self._base(input_ids=tokens, attention_mask=attention.long(), use_cache=True, **kwargs)[0]

    def blocks(self, tokens: int) -> list[slice]:
        """Cut tokens into the forwards that run on a filled cache: one, or one per token."""
        size = self.room or max(tokens, 1)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def answers(self, states: States | None = None) -> Answers:
        """Return a new `Answers` on the output head. states: see there."""
        return Answers(self.head, self.model.config.get_text_config().vocab_size, states)


@torch.no_grad()
def output_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the function hidden [N, D] -> logits [N, V] of the model, checked on a few tokens.

    Raises:
        UserError: the model has an unknown step between hidden states and logits, logits that are NaN or infinite, no
            KV cache, wrong logits after a cached context, or an error of its own.
    """
    config, linear = model.config.get_text_config(), model.get_output_embeddings()
    before = getattr(model, "lm_head", linear)
    before = None if before is linear else before  # ModernBERT's decoder: a projection and a norm

    def head(hidden: Tensor) -> Tensor:
        logits = linear((hidden if before is None else before(hidden)).to(linear.weight.device))
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if factor := getattr(config, "logits_scaling", None):  # Granite divides by what HyperCLOVA X multiplies by
            logits = logits * factor if config.model_type == "hyperclovax" else logits / factor
        if width := getattr(config, "logits_mup_width_multiplier", None):  # Inkling
            logits = logits / width
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = cap * torch.tanh(logits / cap)
        if words := getattr(config, "unpadded_vocab_size", None):  # Inkling; the rest has no meaning
            logits = _padded(logits[..., :words], config.vocab_size)
        return logits

    _check_head(model, head)
    _check_cache(model, head)
    return head


def _check_head(model: PreTrainedModel, head: Callable[[Tensor], Tensor]) -> None:
    """Check that a head gives the model's own logits. See `output_head`."""
    tokens = torch.tensor([[0, 1, 2]], device=input_device(model))
    with explaining(model):
        theirs = _all_words(model, tokens)
        ours = head(base_of(model)(input_ids=tokens)[0][0]).float().cpu()
    for found in (theirs, ours):
        refuse_not_finite(found.amax(1), "largest logits of a token", model.dtype)
    if _apart(ours, theirs) > 2e-2:
        raise UserError(
            f"the output head of {type(model).__name__} is unknown", "add it to dart_eval/evaluation/forwards.py"
        )


def _check_cache(model: PreTrainedModel, head: Callable[[Tensor], Tensor]) -> None:
    """Check that tokens have the same logits after a cached context as in the whole text. See `output_head`.

    If they have them only one by one, they will run so (`Forwards.room`). Then check a row behind padding.
    """
    name, forwards = type(model).__name__, Forwards(model, head)
    tokens = (torch.arange(9, device=forwards.device) % model.config.get_text_config().vocab_size)[None]
    # Relative to the largest logit: rounding is far less in single precision, and less than ten times this in 16 bits.
    least = 1e-3 if model.dtype.itemsize > 2 else 1e-2
    with explaining(model):
        whole = _all_words(model, tokens)
        output = model(input_ids=tokens[:, :CONTEXT], use_cache=True)
        try:
            cache_in(output, name)
        except UserError:
            raise UserError(f"{name} gives no KV cache after which an answer could be scored", NOT_RUN) from None
        _ONE_BY_ONE.discard(model)
        off = _apart(_after_cache(model, head, tokens), whole)
        if off > least:
            _ONE_BY_ONE.add(model)
            alone = _apart(_after_cache(model, head, tokens), whole)
            if off <= 4 * alone:  # rounding
                _ONE_BY_ONE.discard(model)
            off = min(off, alone)
        if off > 10 * least:
            raise UserError(f"{name} gives different logits after a cached context and in the whole text", NOT_RUN)
        if can_pad(model) and _apart(_behind_padding(model, head, tokens), whole) > max(10 * least, 4 * off):
            raise UserError(
                f"{name} gives different logits to a row with padding and to the row alone",
                "its answers and texts cannot be scored in batches",
            )


NOT_RUN = "`dart-eval run` cannot evaluate it; in Python prune() prunes what it generates"
CONTEXT = 3  # tokens of the context in these trials, and columns of padding


def _all_words(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return [T, V] fp32 on the CPU: a model's own logits of [1, T] tokens, with -inf for missing words."""
    return _padded(model(input_ids=tokens).logits[0].float().cpu(), model.config.get_text_config().vocab_size)


def _padded(logits: Tensor, words: int) -> Tensor:
    """Pad logits to at least `words` words with -inf."""
    return torch.nn.functional.pad(logits, (0, max(0, words - logits.shape[-1])), value=float("-inf"))


def _after_cache(model: PreTrainedModel, head: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Return [n, V] fp32 on the CPU: logits of the last n of [1, T] tokens, run on the cache of the others."""
    forwards, cache, hidden = Forwards(model, head), new_cache(model), []
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    blocks = forwards.blocks(tokens.shape[1] - CONTEXT)
    for part in (slice(CONTEXT), *(slice(CONTEXT + b.start, CONTEXT + b.stop) for b in blocks)):
        valid = torch.ones(1, part.stop, dtype=torch.bool, device=tokens.device)
        hidden.append(forwards(tokens[:, part], valid, positions[:, part], cache)[0])
    return head(torch.cat(hidden[1:])).float().cpu()


def _behind_padding(model: PreTrainedModel, head: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Return the logits of all tokens, in one forward, after some columns of padding."""
    padding = torch.zeros_like(tokens[:, :CONTEXT])
    valid = torch.cat([padding, torch.ones_like(tokens)], 1).bool()
    forward = Forwards(model, head)
    hidden = forward(torch.cat([padding, tokens], 1), valid, valid.long().cumsum(1) - 1, new_cache(model))
    return head(hidden[0, CONTEXT:]).float().cpu()


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of logits / the largest logit. theirs: [T, V]; ours: [n, V], of the last n."""
    theirs = theirs[-len(ours) :]
    words = theirs.isfinite()
    if not bool((words == ours.isfinite()).all()):
        return float("inf")
    return float((ours - theirs)[words].abs().max() / theirs[words].abs().max())
