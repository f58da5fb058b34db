"""FLOPs and bytes, counted from the shapes of the loaded model.

A multiply-add is two FLOPs. The matrix products are counted (projections, attention scores and values, output head),
as an eager kernel executes them: a prompt's attention over its full square, a decoded token's over its KV cache.
Norms, activations and softmax are left out, as torch's own flop counter leaves them out; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dart_eval import quantised
from dart_eval.families import ATTENTION_OUTPUTS, decoder, decoder_layers, first
from dart_eval.ffn import FFN, features
from dart_eval.pruning.method import Pruner


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model from which its cost follows.

    Attributes:
        layers, width: L and D.
        ffn_sizes: F of every layer.
        ffn_matrices: matrices of an FFN (3 gated, 2 plain).
        other_weights: weights of all other projections of the decoder, multiplied once per token.
        head_weights: weights of the output head, multiplied where logits are wanted.
        attention_widths: for each layer, heads * (width of a head's keys + width of its values).
        windows: tokens that each layer can look back to (itself included), None for all.
        weight_bytes: bytes of all parameters, tied ones once.
    """

    layers: int
    width: int
    ffn_sizes: tuple[int, ...]
    ffn_matrices: int
    other_weights: int
    head_weights: int
    attention_widths: tuple[int, ...]
    windows: tuple[int | None, ...]
    weight_bytes: int

    @property
    def ffn_weights(self) -> int:
        """The number of weights of all FFNs."""
        return self.ffn_matrices * self.width * sum(self.ffn_sizes)

    @property
    def ffn_share(self) -> float:
        """The share of the FFNs in the weights that a decoded token reads."""
        return self.ffn_weights / (self.ffn_weights + self.other_weights + self.head_weights)

    def prefill(self, tokens: int) -> int:
        """FLOPs of a dense prompt of that many tokens, with logits at its last position only."""
        per_token = 2 * (self.ffn_weights + self.other_weights)
        return tokens * per_token + 2 * sum(self.attention_widths) * tokens * tokens + 2 * self.head_weights

    def decode(self, position: int, weights_read: float = 1.0) -> int:
        """FLOPs of one decoded token.

        Args:
            position: how many tokens it attends to, itself included.
            weights_read: the share of the FFN weights that it multiplies.
        """
        ffn = round(2 * self.ffn_weights * weights_read)
        seen = [position if w is None else min(position, w) for w in self.windows]
        attention = 2 * sum(width * n for width, n in zip(self.attention_widths, seen, strict=True))
        return ffn + 2 * (self.other_weights + self.head_weights) + attention


def shape_of(model: nn.Module, ffns: Sequence[FFN]) -> ModelShape:
    """Read the sizes off a loaded Hugging Face causal language model."""
    ffn_modules = {id(m) for f in ffns for m in f.projections}
    other = 0
    for module in decoder(model).modules():  # some project before and after their layers (OPT-350m)
        if id(module) not in ffn_modules and _is_projection(module):
            n_in, n_out = features(module)
            other += n_in * n_out
    config: Any = model.config
    config = config.get_text_config()
    head = model.get_output_embeddings()  # type: ignore[operator]
    n_in, n_out = features(head)
    return ModelShape(
        layers=len(ffns), width=ffns[0].width, ffn_sizes=tuple(f.size for f in ffns), ffn_matrices=ffns[0].matrices,
        other_weights=other, head_weights=n_in * n_out,
        attention_widths=tuple(map(_attention_width, decoder_layers(model))),
        windows=_windows(config, len(decoder_layers(model))),
        weight_bytes=quantised.nbytes(model),
    )  # fmt: skip


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, as the KV cache keeps it."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])


def _attention_width(layer: nn.Module) -> int:
    """The widths of all keys and values; 0 where tokens leave none.

    In latent attention (DeepSeek, MiniCPM3) keys are wider than values.
    """
    output = first(layer, ATTENTION_OUTPUTS)
    if output is None:
        return 0
    if not _is_projection(output):  # JetMoE: the heads of a token are its experts'
        return 2 * int(output.num_heads) * int(output.head_dim)
    values, _ = features(output)
    attention = next(m for m in layer.modules() if any(part is output for part in m.children()))
    head, compared = getattr(attention, "v_head_dim", None), getattr(attention, "qk_head_dim", None)
    count = sum(type(m) is type(attention) for m in layer.modules())  # LongCat has two
    return count * (2 * values if not head or not compared else values + values // head * compared)


def _is_projection(module: nn.Module) -> bool:
    named = type(module).__name__
    return hasattr(module, "weight") and (hasattr(module, "in_features") or named == "Conv1D")


@dataclass(frozen=True)
class Overhead:
    """The work that a method adds.

    Attributes:
        prefill: FLOPs of observing the prompt's tokens, by all parts (an upper bound: five operations per neuron and
            token, which token normalisation needs). Sorting scores takes comparisons, which are not counted.
        decode_step: FLOPs per decoded token: the detector, and choosing neurons where tokens do.
        remask: FLOPs of one re-mask. A re-mask from the ring computes gate and up densely on the ring's inputs and
            observes them; where something stands in for the pruned neurons, it also multiplies their columns of down
            once. A re-mask from dense tokens observes these; what each computes more than a pruned token counts too.
        remask_read: FFN weights that a re-mask reads / all FFN weights. The ring reads each once, however many inputs
            it has; of dense tokens counts what each reads more than a pruned one.
    """

    prefill: int
    decode_step: float
    remask: int
    remask_read: float


def overhead(method: Pruner, shape: ModelShape, tokens: int, weights_read: float) -> Overhead:
    """The work that a method adds: the sum over its parts, with one FLOP for each element and operation.

    Args:
        method: the method.
        shape: sizes of the model.
        tokens: how many the prompt has.
        weights_read: the share of the FFN weights that a pruned token multiplies.
    """
    neurons, remask = sum(shape.ffn_sizes), method.mask.remask
    mask = 1.0 if method.mask.whole else method.choice.mask_share(weights_read, shape.ffn_matrices)
    observing = neurons * sum(part.flops_per_neuron() for part in method.observers)
    # Down's columns of the pruned neurons, once.
    at_once = method.compensation.adds and not (method.mask.fixed and method.compensation.calibrates)
    constants = round(2 * shape.width * (neurons - mask * neurons)) if at_once else 0
    parts = method.parts()
    prefill = tokens * (observing + sum(part.flops_per_token(shape) for part in parts)) + constants
    step = sum(part.flops_per_step(shape, mask * neurons) for part in parts)
    flops, read = 0, 0.0
    if remask.needs_ring:
        read = (shape.ffn_matrices - 1) / shape.ffn_matrices
        flops = remask.ring * (round(2 * shape.ffn_weights * read) + observing)
    elif remask.alarms_remask and remask.dense_tokens:
        read = remask.dense_tokens * (1 - weights_read)
        flops = remask.dense_tokens * observing + round(2 * shape.ffn_weights * read)
    if flops:
        flops += 3 * neurons + constants  # old and recent scores blended
        read += (1 - mask) / shape.ffn_matrices if constants else 0.0
    return Overhead(round(prefill), step, flops, read)


def describe(
    method: Pruner, shape: ModelShape, context: float, weights_read: float, remasks_per_token: float
) -> dict[str, Any]:
    """The costs that a record holds, in FLOPs.

    `overhead_decode_step` includes the re-masks that were seen, spread over the tokens. `remask_reads` is the share of
    the FFN weights that these re-masks read, again for each decoded token.

    Args:
        method: the method.
        shape: sizes of the model.
        context: mean length of the contexts that were run.
        weights_read: the share of the FFN weights that tokens which ran pruned multiplied.
        remasks_per_token: how many re-masks were seen for each token.
    """
    tokens = max(1, round(context))
    added = overhead(method, shape, tokens, weights_read)
    dense = shape.decode(tokens + 1)
    per_token = added.decode_step + added.remask * remasks_per_token
    return {
        "context_tokens": tokens,
        "prefill": shape.prefill(tokens),
        "decode_step_dense": dense,
        "decode_step_pruned": shape.decode(tokens + 1, weights_read),
        "overhead_prefill": added.prefill,
        "overhead_decode_step": per_token,
        "overhead_share": per_token / dense,
        "remask": added.remask,
        "remask_reads": added.remask_read * remasks_per_token,
        "ffn_share": shape.ffn_share,
    }
