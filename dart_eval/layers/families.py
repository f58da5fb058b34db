"""The table of model families: attribute paths of the parts of a decoder layer.

Nothing is guessed: `find.find_ffns` runs some tokens through the model, and refuses it if its FFN does not compute what
the table says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    pass

# The last two: Llama 4, whose name does not give its base model.
LAYER_LISTS = (
    "layers", "h", "decoder.layers", "language_model.layers", "blocks", "model.layers", "language_model.model.layers",
)  # fmt: skip
# Stacks that run by turns: HRM's.
STACKS = ("L_module.layers", "H_module.layers")


@dataclass(frozen=True)
class Layout:
    """Attribute paths inside a decoder layer.

    Attributes:
        block: module whose first input is the FFN's.
        up, down, gate: the projections. gate is None for plain FFNs; `fused` halves of up hold gate, up.
        act: the activation: the first of these paths that exists, or a function.
        factors: of gate x, before the activation. Most families have neither these nor the next four.
        lifts: factors of up x.
        limit: upper bound of gate x before the activation, and of the absolute value of up x.
        alpha: replaces act by x sigmoid(alpha x), times up x + 1.
        norm: between h and down.
    """

    block: str
    up: str
    down: str
    act: tuple[str | Callable[[Tensor], Tensor], ...]
    gate: str | None = None
    fused: bool = False
    factors: tuple[str, ...] = ()
    lifts: tuple[str, ...] = ()
    limit: str | None = None
    alpha: str | None = None
    norm: str | None = None


# Experts of every token, beside the routed ones.
SHARED = (
    "mlp.shared_expert", "mlp.shared_experts", "mlp.shared_mlp", "feed_forward.shared_expert", "mixer.shared_experts",
)  # fmt: skip


def _shared(block: str) -> tuple[Layout, ...]:
    """Return the layouts of experts of every token: gated, in one projection (MiniMax M3), plain."""
    up, down, gate = (f"{block}.{name}" for name in ("up_proj", "down_proj", "gate_proj"))
    acts = (f"{block}.act_fn", f"{block}.activation_fn")
    gated = Layout(block, up, down, acts, gate=gate, limit=f"{block}.limit")
    return gated, _bounded(block), Layout(block, up, down, acts)


def _bounded(block: str) -> Layout:
    """Return the layout with gpt-oss's gate, outside of experts (MiniMax M3)."""
    up, down, limit, alpha = (f"{block}.{n}" for n in ("gate_up_proj", "down_proj", "swiglu_limit", "swiglu_alpha"))
    return Layout(block, up, down, (), fused=True, limit=limit, alpha=alpha)


def _gated(block: str) -> Layout:
    up, down, act, gate = (f"{block}.{name}" for name in ("up_proj", "down_proj", "act_fn", "gate_proj"))
    return Layout(block, up, down, (act,), gate=gate)


LAYOUTS = (
    # Llama, Mistral, Qwen2/3/3.5, Gemma 1-4, OLMo, SmolLM, Granite, Cohere, StableLM; BitNet's norm, Dory's factors
    Layout(
        "mlp", "mlp.up_proj", "mlp.down_proj", ("mlp.act_fn", "mlp.activation_fn"), gate="mlp.gate_proj",
        factors=("mlp.suv_gate", "mlp.suv_scale"), lifts=("mlp.suv_up", "mlp.suv_scale"), norm="mlp.ffn_sub_norm",
    ),
    # Phi-3, GLM-4
    Layout("mlp", "mlp.gate_up_proj", "mlp.down_proj", ("mlp.activation_fn", "mlp.act_fn"), fused=True),
    _bounded("mlp"),
    Layout("mlp", "mlp.up_proj", "mlp.down_proj", ("mlp.act_fn",)),  # Nemotron, Arcee, Apertus, Jais 2
    Layout("mlp", "mlp.c_fc", "mlp.c_proj", ("mlp.act",)),  # GPT-2, GPT-Neo, GPT-BigCode, StarCoder2
    # GPT-NeoX, Falcon; BLOOM
    Layout("mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", ("mlp.act", "mlp.gelu_impl")),
    Layout("mlp", "mlp.fc1", "mlp.fc2", ("mlp.activation_fn", "mlp.act")),  # Phi
    Layout("mlp", "mlp.fc_in", "mlp.fc_out", ("mlp.act",)),  # GPT-J
    Layout("mlp", "mlp.Wi", "mlp.Wo", ("mlp.act",), fused=True),  # ModernBERT's decoder
    Layout("fc1", "fc1", "fc2", ("activation_fn",)),  # OPT
    # Bamba, Falcon-H1, Llama 4
    Layout(
        "feed_forward", "feed_forward.up_proj", "feed_forward.down_proj",
        ("feed_forward.act_fn", "feed_forward.activation_fn"), gate="feed_forward.gate_proj",
        factors=("feed_forward.gate_multiplier",),
    ),
    *(_gated(block) for block in ("shared_transf.feed_forward", "mlp_block")),  # Zamba; RecurrentGemma
    # LFM2, LFM3
    Layout("feed_forward", "feed_forward.w3", "feed_forward.w2", (nn.functional.silu,), gate="feed_forward.w1"),
    # Granite 4.0
    Layout("shared_mlp", "shared_mlp.input_linear", "shared_mlp.output_linear", ("shared_mlp.activation",), fused=True),
    Layout("mixer", "mixer.up_proj", "mixer.down_proj", ("mixer.act_fn",)),  # Nemotron-H
    Layout("ffn", "ffn.up_proj", "ffn.down_proj", ("ffn.act",)),  # MPT
    Layout("ffn", "ffn.0", "ffn.2", ("ffn.1",)),  # CTRL
    *(layout for block in SHARED for layout in _shared(block)),
)  # fmt: skip

# The norm whose input is the residual stream that enters the FFN, most specific first.
RESIDUAL_NORMS = (
    "pre_mlp_layernorm", "pre_feedforward_layernorm", "pre_ff_layernorm", "feedforward_layernorm", "ffn_norm",
    "mlp_norm", "channel_pre_norm", "ln_2", "norm_2", "layernorm2", "ln_mlp", "final_layer_norm",
    "post_attention_layernorm", "input_layernorm", "ln_1", "norm",
)  # fmt: skip
# A norm between the FFN and the residual stream (Gemma 2/3, OLMo 2; GLM-4; HyperCLOVA X; LFM3): the FFN's effect leaves
# it.
OUTPUT_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_norm2", "post_ffn_norm")
EMBEDDED = "per_layer_input_gate"  # where the token's own embedding joins the stream, behind the FFN (Gemma 4 E2B)
# Of the FFN's output: Granite, HyperCLOVA X; MiniCPM3; Falcon-H1; Inkling.
SCALES = ("residual_multiplier", "residual_scale", "feed_forward.down_multiplier", "mlp.global_scale")
ATTENTION_OUTPUTS = (
    "self_attn.o_proj.linear",  # Inkling 2: behind a gate
    "self_attn.o_proj", "self_attn.o_b_proj", "self_attn.dense", "self_attn.out_proj", "attn.c_proj", "attn.out_proj",
    "attn.Wo",
    "attn.attention.out_proj", "attention.dense", "self_attention.dense", "multi_head_attention.dense",
    "temporal_block.o_proj", "mixer.o_proj", "shared_transf.self_attn.o_proj",
)  # fmt: skip
# In place of attention: state spaces, linear attention, short convolutions. They keep no keys and values of tokens.
RECURRENT_OUTPUTS = (
    "linear_attn.out_proj", "linear_attn.o_proj", "mamba.out_proj", "conv.out_proj", "temporal_block.linear_out",
    "mixer.out_proj",
)  # fmt: skip

# Parts of a layer with matrices that are no FFN: norms with a gate (A.X K2); modules that spread the stream over many
# (DeepSeek V4, Hy4, Qwen4), mix and correct these (Gemma 3n), or add a token's own embedding; convolutions of a few
# tokens behind attention and FFN (Inkling); a router beside experts (Gemma 4). Zamba adds its FFN's output to the input
# of a state space; Inkling 2's loops gate their output.
STREAMS = (
    "input_layernorm", "post_attention_layernorm", "attn_hc", "ffn_hc", "attn_hyper_connection", "mlp_hyper_connection",
    "ple", "altup", "laurel", "per_layer_input_gate", "per_layer_projection", "attn_sconv", "mlp_sconv",
    "router", "mamba_decoder", "linear", "q_message_gate", "k_message_gate", "v_message_gate", "mlp_message_gate",
)  # fmt: skip


def get(module: object, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def first(layer: nn.Module, paths: Sequence[str]) -> Any:
    return next((m for p in paths if (m := get(layer, p)) is not None), None)


def cache_argument(model: nn.Module) -> str:
    """Return the name of forward's KV cache argument: transformers 5 renames `past_key_values` to `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
