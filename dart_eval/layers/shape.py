"""The sizes of a model, which give FLOPs and bytes.

A multiply-add is two FLOPs. Matrix products count (projections, attention scores and values, output head), as an eager
kernel executes them: a prompt's attention over its full square, a decoded token's over its KV cache. Norms, activations
and softmax do not count, as in torch's own flop counter; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from dart_eval.layers.families import ATTENTION_OUTPUTS, first
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import decoder, decoder_layers
from dart_eval.layers.projection import encoded, features, is_conv1d
from dart_eval.layers.quantised import nbytes, stated_bits
from dart_eval.util.bits import OWN_BITS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, which give its cost.

    Attributes:
        layers, width: L and D.
        ffn_sizes: F of every layer.
        ffn_matrices: matrices of an FFN (3 gated, 2 plain).
        other_weights: weights of all other projections of the decoder, multiplied once per token.
        head_weights: weights of the output head, multiplied for logits.
        attention_widths: for each layer, heads * (width of a head's keys + width of its values).
        windows: tokens that each layer attends to, the current one included; None for all.
        weight_bytes: bytes of all parameters, tied ones once.
        ffn_pools: all neurons of every layer; with routed experts more than a token has.
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
    ffn_pools: tuple[int, ...] = ()

    @property
    def ffn_weights(self) -> int:
        """Number of weights of all FFNs."""
        return self.ffn_matrices * self.width * sum(self.ffn_sizes)

    @property
    def ffn_share(self) -> float:
        """Share of the FFNs in the weights that a decoded token reads."""
        return self.ffn_weights / (self.ffn_weights + self.other_weights + self.head_weights)

    def prefill(self, tokens: int) -> int:
        """Return the FLOPs of a dense prompt, with logits at its last position only."""
        per_token = 2 * (self.ffn_weights + self.other_weights)
        return tokens * per_token + 2 * sum(self.attention_widths) * tokens * tokens + 2 * self.head_weights

    def decode(self, position: int, weights_read: float = 1.0) -> int:
        """Return the FLOPs of one decoded token.

        Args:
            position: tokens that it attends to, itself included.
            weights_read: share of the FFN weights that it multiplies.
        """
        ffn = round(2 * self.ffn_weights * weights_read)
        seen = [position if w is None else min(position, w) for w in self.windows]
        attention = 2 * sum(width * n for width, n in zip(self.attention_widths, seen, strict=True))
        return ffn + 2 * (self.other_weights + self.head_weights) + attention


def shape_of(model: nn.Module, ffns: Sequence[FFN]) -> ModelShape:
    """Return the sizes of a loaded Hugging Face causal language model."""
    other = sum(math.prod(features(module)) for module in _others(model, ffns))
    config: Any = model.config
    config = config.get_text_config()
    head = model.get_output_embeddings()  # type: ignore[operator]
    n_in, n_out = features(head)
    return ModelShape(
        layers=len(ffns), width=ffns[0].width, ffn_sizes=tuple(f.size for f in ffns), ffn_matrices=ffns[0].matrices,
        other_weights=other, head_weights=n_in * n_out,
        attention_widths=tuple(map(_attention_width, decoder_layers(model))),
        windows=_windows(config, len(decoder_layers(model))),
        weight_bytes=nbytes(model), ffn_pools=tuple(f.pool for f in ffns),
    )  # fmt: skip


def _others(model: nn.Module, ffns: Sequence[FFN]) -> list[nn.Module]:
    """Return the decoder's projections outside its FFNs."""
    own = {id(part) for f in ffns for m in f.projections for part in m.modules()}  # of peft, its base too
    return [  # some project before and after their layers (OPT-350m)
        m for m in decoder(model).modules()
        if id(m) not in own and _is_projection(m) and not hasattr(m, "base_layer")
    ]  # fmt: skip


def stored_share(model: nn.Module, ffns: Sequence[FFN]) -> float:
    """Return about the share of the FFNs in the bytes that a decoded token reads of the weights as they lie in memory.

    Where FFNs are quantised, the decoder's other projections count as many bits.
    """
    shape, parts = shape_of(model, ffns), (ffns[0].down, model.get_output_embeddings())  # type: ignore[operator]
    bits, of_head = (stated_bits(model.config).total if encoded(part) else OWN_BITS for part in parts)
    of_ffns, others = shape.ffn_weights * bits, shape.other_weights * bits
    return of_ffns / (of_ffns + others + shape.head_weights * of_head)


def _windows(config: PretrainedConfig, layers: int) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, as in the KV cache."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])


def _attention_width(layer: nn.Module) -> int:
    """Return the widths of all keys and values; 0 for layers without them.

    In latent attention (DeepSeek, MiniCPM3) keys are wider than values.
    """
    output = first(layer, ATTENTION_OUTPUTS)
    if output is None:
        return 0
    values, _ = features(output)
    attention = next(m for m in layer.modules() if any(part is output for part in m.children()))
    head, compared = getattr(attention, "v_head_dim", None), getattr(attention, "qk_head_dim", None)
    return 2 * values if not head or not compared else values + values // head * compared


def _is_projection(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or is_conv1d(module)  # some quantised ones have no `weight`
