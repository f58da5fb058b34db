"""Where the FFN of every layer lives in each model family: the one adapter table.

A family is described by attribute paths inside a decoder layer. Nothing is guessed: `find_ffns` runs some tokens
through the model (`trial`) and refuses a model whose FFN does not compute what its description says.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval import trial
from dart_eval.errors import UserError

LAYER_LISTS = ("layers", "h", "decoder.layers", "language_model.layers")


@dataclass(frozen=True)
class Layout:
    """Attribute paths inside a decoder layer. `gate` is None for plain FFNs; `fused` halves hold gate, up."""

    block: str
    up: str
    down: str
    act: tuple[str, ...]
    gate: str | None = None
    fused: bool = False


LAYOUTS = (
    # Llama, Mistral, Qwen2/3, Gemma 1-3, OLMo, SmolLM, Granite, Cohere, StableLM
    Layout("mlp", "mlp.up_proj", "mlp.down_proj", ("mlp.act_fn", "mlp.activation_fn"), gate="mlp.gate_proj"),
    # Phi-3, GLM-4
    Layout("mlp", "mlp.gate_up_proj", "mlp.down_proj", ("mlp.activation_fn", "mlp.act_fn"), fused=True),
    Layout("mlp", "mlp.c_fc", "mlp.c_proj", ("mlp.act",)),  # GPT-2, GPT-BigCode, StarCoder2
    Layout("mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", ("mlp.act",)),  # GPT-NeoX, Falcon
    Layout("mlp", "mlp.fc1", "mlp.fc2", ("mlp.activation_fn", "mlp.act")),  # Phi
    Layout("mlp", "mlp.fc_in", "mlp.fc_out", ("mlp.act",)),  # GPT-J
    Layout("fc1", "fc1", "fc2", ("activation_fn",)),  # OPT
)

# The norm whose input is the residual stream that enters the FFN, most specific first.
RESIDUAL_NORMS = (
    "pre_feedforward_layernorm", "ln_2", "ln_mlp", "final_layer_norm",
    "post_attention_layernorm", "input_layernorm", "ln_1",
)  # fmt: skip
# A norm between the FFN and the residual stream (Gemma 2/3, OLMo 2; GLM-4; HyperCLOVA X): the FFN's effect leaves it.
OUTPUT_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_norm2")
SCALES = ("residual_multiplier", "residual_scale")  # of the FFN's output: Granite, HyperCLOVA X; MiniCPM3
ATTENTION_OUTPUTS = (
    "self_attn.o_proj", "self_attn.dense", "self_attn.out_proj",
    "attn.c_proj", "attn.out_proj", "attention.dense", "self_attention.dense",
)  # fmt: skip


@dataclass(eq=False)
class FFN:
    """One layer's FFN, whatever the family. F neurons, model width D.

    Its neurons may stand in another order than they were loaded in (`pruning.permuted`): what the projections give and
    take is then in the order of their rows; `by_neuron` and `by_row` translate.

    Attributes:
        layer: index of the decoder layer.
        block: module whose first input is the FFN's input x, [B, T, D].
        gate, up, down: the projections (gate None for a plain FFN; `fused`: up holds gate and up).
        act: the activation.
        residual: module whose first input is the residual stream y that enters the FFN, [B, T, D].
        output: module whose output is what the FFN adds to the stream, [B, T, D].
        attention: the attention's output projection in the same layer.
        size, width: F, D.
        scale: factor on the output before it is added (Granite).
        after: module whose first input is the stream that leaves the FFN; None: the layer's output is that.
        adds: whether that stream is y + scale * what `output` gives (+ `attention`'s output, where both run side by
            side), as the trial forward saw it.
        order: [F] int32, the neuron at each row, or None: as loaded.
    """

    layer: int
    block: nn.Module
    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    act: Callable[[Tensor], Tensor]
    fused: bool
    residual: nn.Module
    output: nn.Module
    attention: nn.Module
    size: int
    width: int
    scale: float = 1.0
    after: nn.Module | None = None
    adds: bool = True
    order: Tensor | None = None

    def by_neuron(self, x: Tensor) -> Tensor:
        """[..., F] in the order of the rows -> in the order of the neurons."""
        return x if self.order is None else torch.empty_like(x).index_copy_(-1, self.order.long(), x)

    def by_row(self, x: Tensor) -> Tensor:
        """[..., F] in the order of the neurons -> in the order of the rows."""
        return x if self.order is None else x.index_select(-1, self.order)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """a = act(gate x) and u = up x, each [..., F], by row; of a plain FFN act(up x) and None."""
        if self.gate is not None:
            return self.act(self.gate(x)), self.up(x)
        if self.fused:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.act(gate), up
        return self.act(self.up(x)), None

    def intermediate(self, x: Tensor) -> Tensor:
        """h = act(gate x) * (up x), or act(up x) for a plain FFN: [..., D] -> [..., F], by row."""
        a, u = self.parts(x)
        return a if u is None else a * u

    def input_weights(self) -> list[Tensor]:
        """The matrices that make h, each [F, D], by row (gate and up, or up alone)."""
        if self.gate is not None:
            return [weight_matrix(self.gate), weight_matrix(self.up)]
        return list(weight_matrix(self.up).chunk(2)) if self.fused else [weight_matrix(self.up)]

    def output_weight(self) -> Tensor:
        """The down projection, [D, F], by row."""
        return weight_matrix(self.down)

    def write(self, h: Tensor) -> Tensor:
        """The down projection of h ([..., F], by row) without its bias: [..., D] fp32."""
        bias = getattr(self.down, "bias", None)
        added = self.down(h).float()
        return added if bias is None else added - bias.float()

    @property
    def projections(self) -> list[nn.Module]:
        """Gate, where there is one, up and down."""
        return [m for m in (self.gate, self.up, self.down) if m is not None]

    @property
    def matrices(self) -> int:
        """How many F x D matrices a token multiplies: 3 for gated FFNs, 2 for plain ones."""
        return 3 if self.gated else 2

    @property
    def gated(self) -> bool:
        """Whether h is a product of act(gate x) and up x."""
        return self.gate is not None or self.fused


def weight_matrix(linear: nn.Module) -> Tensor:
    """A projection's weight as [out, in]; GPT-2's Conv1D stores it transposed."""
    if reason := encoded(linear):
        raise UserError(
            f"the weights of {type(linear).__name__} {reason} and cannot be read",
            "load the model unquantised, or use a method that scores activations",
        )
    weight: Any = linear.weight
    return weight.T if is_conv1d(linear) else weight


PLAIN = (Tensor, nn.Parameter)  # what holds its numbers as they are


def encoded(linear: nn.Module) -> str | None:
    """Why a projection's weight is no matrix of plain numbers (`are ...`), or None."""
    weight = getattr(linear, "weight", None)
    if weight is None:
        return "are kept in a form of their own"
    if type(weight) not in PLAIN:  # a library's own tensor, whatever dtype it claims to have
        return f"are quantised or wrapped ({type(weight).__name__})"
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.dim() != 2:
        return f"are quantised ({str(weight.dtype).removeprefix('torch.')})"
    return None


def is_conv1d(linear: Any) -> bool:
    """Whether this is GPT-2's projection, whose weight is stored [in, out]."""
    return type(linear).__name__ == "Conv1D"


def device_of(ffn: FFN) -> torch.device:
    """Where an FFN's weights are."""
    return next(ffn.down.parameters()).device


def features(linear: Any) -> tuple[int, int]:
    """(in, out) features of a projection, without touching its (perhaps quantised) weight."""
    if is_conv1d(linear):
        return int(linear.nx), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)


def _get(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def _first(layer: nn.Module, paths: tuple[str, ...]) -> Any:
    return next((m for p in paths if (m := _get(layer, p)) is not None), None)


FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm between the last layer and the output head, if the model has one."""
    return _first(decoder(model), FINAL_NORMS)


def gain(norm: nn.Module | None, width: int) -> Tensor:
    """[D] fp32: the elementwise factor of a norm, read off its response to +1, -1, +1 ... (ones without a norm).

    Such a vector has mean 0 and mean square 1, so that RMS and layer norms alike answer with their factor alone.
    """
    if norm is None:
        return torch.ones(width)
    weight = next(norm.parameters(), None)
    probe = 1.0 - 2.0 * (torch.arange(width) % 2).float()
    x = probe if weight is None else probe.to(weight.device, weight.dtype)
    with torch.no_grad():
        return ((norm(x) - norm(-x)) / 2).float().cpu() * probe


def decoder(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers and runs them in order (hooks on it see every forward)."""
    base = getattr(model, "base_model", model)
    for path in LAYER_LISTS:
        layers = _get(base, path)
        if isinstance(layers, nn.ModuleList) and len(layers):
            owner, _, _ = path.rpartition(".")
            return _get(base, owner) if owner else base
    raise UserError(
        f"the decoder layers of {type(model).__name__} were not found",
        "add the family to dart_eval/ffn.py (docs/architecture.md, 'a model family')",
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a Hugging Face causal language model."""
    owner = decoder(model)
    return next(m for p in LAYER_LISTS if (m := getattr(owner, p.rpartition(".")[2], None)) is not None)


def cache_argument(model: nn.Module) -> str:
    """Name of forward's KV cache argument: transformers 5 renames `past_key_values` to `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _describe(layer: nn.Module, index: int) -> FFN | None:
    for layout in LAYOUTS:
        block, up, down = (_get(layer, p) for p in (layout.block, layout.up, layout.down))
        gate = _get(layer, layout.gate) if layout.gate else None
        act = _first(layer, layout.act)
        attention = _first(layer, ATTENTION_OUTPUTS)
        if any(m is None for m in (block, up, down, act, attention)) or (layout.gate and gate is None):
            continue
        post_norm = _first(layer, OUTPUT_NORMS)
        residual = _first(layer, RESIDUAL_NORMS)
        if _get(layer, "post_feedforward_layernorm") is not None and _get(layer, "pre_feedforward_layernorm") is None:
            residual = block  # OLMo 2: the stream enters the FFN without a norm
        after = _get(layer, "per_layer_input_gate")  # Gemma 4 E2B: adds what the token's own embedding says
        if getattr(layer, "do_layer_norm_before", True) is False:  # OPT-350m: the norm comes after the sum
            residual, after = block, _get(layer, "final_layer_norm")
        size, width = features(down)
        return FFN(
            layer=index, block=block, gate=gate, up=up, down=down, act=act, fused=layout.fused,
            residual=residual if residual is not None else block,
            output=post_norm if post_norm is not None else down,
            attention=attention, size=size, width=width,
            scale=float(next((getattr(layer, name) for name in SCALES if hasattr(layer, name)), 1.0)), after=after,
        )  # fmt: skip
    return None


_FOUND: weakref.WeakKeyDictionary[nn.Module, list[FFN]] = weakref.WeakKeyDictionary()


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFN of every layer, checked by running some tokens through the model.

    Raises:
        UserError: the family is unknown, the model fails, or its FFN does not compute what its description says.
    """
    known = _FOUND.get(model)
    if known is not None and unchanged(model, known):
        return known
    ffns = describe(model)
    trial.check(model, ffns, decoder_layers(model))
    _FOUND[model] = ffns
    return ffns


def check_depth(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Refuse the allocation `depth` where what it compares is not what enters an FFN and what the FFN adds.

    Raises:
        UserError: a layer of this model does more than add its FFN's output to the stream.
    """
    if unknown := [f.layer for f in ffns if not f.adds]:
        raise UserError(
            f"the allocation depth does not fit {type(model).__name__}: layer {unknown[0]} does more than add its "
            "FFN's output to the stream that enters it",
            "use allocation=uniform",
        )


def unchanged(model: nn.Module, ffns: Sequence[FFN]) -> bool:
    """Whether these are still the FFNs of the model: adapters, dropped layers and quantisation make others."""
    try:
        return [_parts(f) for f in describe(model)] == [_parts(f) for f in ffns]
    except UserError:
        return False


def _parts(ffn: FFN) -> list[int]:
    """Its modules and their parameters, by identity (a weight that is made anew each time has none)."""
    modules = [ffn.block, ffn.gate, ffn.up, ffn.down, ffn.act, ffn.residual, ffn.output, ffn.attention]
    projections = ffn.projections
    return [id(x) for x in (*modules, *(p for m in projections for p in m._parameters.values()))]


def describe(model: nn.Module) -> list[FFN]:
    """The FFN of every layer by the table alone: for a model that cannot run, since it has no weights.

    Raises:
        UserError: the family is unknown.
    """
    ffns = []
    for index, layer in enumerate(decoder_layers(model)):
        ffn = _describe(layer, index)
        if ffn is None:
            raise UserError(
                f"the FFN of {type(layer).__name__} (layer {index} of {type(model).__name__}) is not understood "
                f"(its parts: {', '.join(n for n, _ in layer.named_children())})",
                "dense gated or plain FFNs are supported; mixtures of experts are not",
            )
        ffns.append(ffn)
    return ffns
