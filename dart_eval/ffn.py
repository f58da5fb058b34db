"""The FFN of every layer, whatever the family: what it computes, and the modules that it is made of."""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval import experts, quantised, trial
from dart_eval.acts import Act, activation, lift
from dart_eval.errors import UserError
from dart_eval.families import (
    ATTENTION_OUTPUTS,
    EMBEDDED,
    LAYOUTS,
    OUTPUT_NORMS,
    RECURRENT_OUTPUTS,
    RESIDUAL_NORMS,
    SCALES,
    Layout,
    decoder_layers,
    first,
    get,
)


@dataclass(eq=False)
class FFN:
    """One layer's FFN, whatever the family. F neurons, model width D.

    Its neurons may stand in another order than they were loaded in (`pruning.permuted`): what the projections give and
    take is then in the order of their rows; `by_neuron` and `by_row` translate.

    Attributes:
        layer: its index among the FFNs. number: of the decoder layer, for people. holder: that layer.
        block: module whose first input is the FFN's input x, [B, T, D].
        gate, up, down: the projections (gate None for a plain FFN; `fused`: up holds gate and up).
        act: the activation. lift: what is done to up x before it is multiplied; None. norm: between h and down; None.
        residual: module whose first input is the residual stream y that enters the FFN, [B, T, D].
        output: module whose output is what the FFN adds to the stream, [B, T, D].
        attention: the output projection of the attention, or of what stands in for it, in the same layer or before.
        size, width: F, D. dtype: of x, as the trial forward saw it.
        scale: factor on the output before it is added (Granite).
        after: module whose first input is the stream that leaves the FFN; None: the layer's output is that.
        adds: whether that stream is y + scale * what `output` gives (+ `attention`'s output, if side by side), as the
            trial forward saw it. joint: its layer has others, too; all of them add to that stream then.
        runs: how often it runs for a token.
        routed: the experts whose neurons these are, others for every token; None.
        order: [F] int32, the neuron at each row, or None: as loaded.
    """

    layer: int
    number: int
    holder: nn.Module
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
    joint: bool = False
    lift: Callable[[Tensor], Tensor] | None = None
    norm: nn.Module | None = None
    runs: int = 1
    routed: experts.Routed | None = None
    dtype: torch.dtype | None = None
    order: Tensor | None = None

    def by_neuron(self, x: Tensor) -> Tensor:
        """[..., F] in the order of the rows -> in the order of the neurons."""
        return x if self.order is None else torch.empty_like(x).index_copy_(-1, self.order.long(), x)

    def by_row(self, x: Tensor) -> Tensor:
        """[..., F] in the order of the neurons -> in the order of the rows."""
        return x if self.order is None else x.index_select(-1, self.order)

    @property
    def into(self) -> nn.Module:
        """Module whose first input is h."""
        return self.down if self.norm is None else self.norm

    @property
    def pool(self) -> int:
        """Neurons that it has: more than a token's where experts are routed."""
        return self.routed.pool if self.routed else self.size

    def of_token(self, mask: Tensor, batch: int) -> Tensor:
        """A mask [B or 1, pool], by row, as each token of the forward under way has it: [B or 1, T or 1, F]."""
        return self.routed.gather(mask, batch) if self.routed else mask[:, None]

    def spread(self, h: Tensor, some: slice = slice(None), tokens: int | None = None) -> Tensor:
        """[B, t, F] of each token's experts -> [B, t, pool] with 0 for the others; else as it is.

        Args:
            some: which of the `tokens` of the forward under way these are; without them its last ones.
        """
        return self.routed.spread(h, some, tokens) if self.routed else h

    def take(self, take: Callable[[Tensor, Tensor], Tensor], scores: Tensor, keep: Tensor) -> Tensor:
        """A mask of the best neurons, [B, pool] bool: equally many of each expert.

        Args:
            take: makes a mask of scores [n, ...] and counts [n]. scores: [B, pool]. keep: [B], of a token's neurons.
        """
        return self.routed.take(take, scores, keep) if self.routed else take(scores, keep)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """a = act(gate x) and u = up x, each [..., F], by row; of a plain FFN act(up x) and None."""
        if self.gate is not None:
            return self.act(self.gate(x)), self.lifted(self.up(x))
        if self.fused:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.act(gate), self.lifted(up)
        return self.act(self.up(x)), None

    def lifted(self, up: Tensor) -> Tensor:
        """[..., F], what act(gate x) is multiplied by. up: up x."""
        return up if self.lift is None else self.lift(up)

    def intermediate(self, x: Tensor) -> Tensor:
        """h = act(gate x) * (up x), or act(up x) for a plain FFN: [..., D] -> [..., F], by row."""
        a, u = self.parts(x)
        return a if u is None else a * u

    def input_weights(self) -> list[Tensor]:
        """The matrices that make h, each [F, D], by row (gate and up, or up alone)."""
        if self.routed:
            return self.routed.input_weights()
        if self.gate is not None:
            return [self.matrix(self.gate), self.matrix(self.up)]
        return list(self.matrix(self.up).chunk(2)) if self.fused else [self.matrix(self.up)]

    def output_weight(self) -> Tensor:
        """The down projection, [D, F], by row."""
        return self.routed.output_weight() if self.routed else self.matrix(self.down)

    def matrix(self, projection: nn.Module) -> Tensor:
        """The weight of one of its projections, [out, in], in the dtype that it computes in."""
        weight = weight_matrix(projection)
        return weight.to(self.dtype) if self.dtype is not None and encoded(projection) else weight

    def write(self, h: Tensor) -> Tensor:
        """The down projection of h ([..., F], by row) without its bias: [..., D] fp32."""
        bias = quantised.bias_of(self.down)
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
    """A projection's weight as [out, in], to be read: GPT-2's Conv1D stores it transposed, and quantised ones are made
    anew (`quantised.values`)."""
    if encoded(linear) and not isinstance(linear, experts.Step):
        return quantised.values(linear, features(linear)[0])
    return plain_matrix(linear)


def plain_matrix(linear: nn.Module) -> Tensor:
    """The same where the weight itself is to be changed, or put elsewhere.

    Raises:
        UserError: the weight is no matrix of plain numbers.
    """
    if reason := encoded(linear):
        raise UserError(
            f"the weights of {type(linear).__name__} {reason}: others cannot stand in their place",
            "load the model unquantised, or use a method that leaves weights as they are",
        )
    if isinstance(linear, experts.Step):
        return linear.matrix()
    quantised.refuse_offloaded(linear)
    weight: Any = linear.weight
    return weight.T if is_conv1d(linear) else weight


PLAIN = (Tensor, nn.Parameter)  # what holds its numbers as they are


def encoded(linear: nn.Module) -> str | None:
    """Why a projection's weight is no matrix of plain numbers (`are ...`), or None."""
    if (form := quantised.form(linear)) is not None:
        return form
    step = isinstance(linear, experts.Step)
    weight = linear.held if isinstance(linear, experts.Step) else getattr(linear, "weight", None)
    if weight is None or quantised.is_packed(linear):
        return "are kept in a form of their own"
    if type(weight) not in PLAIN:  # a library's own tensor, whatever dtype it claims to have
        return f"are quantised or wrapped ({type(weight).__name__})"
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.dim() != 2 + step:
        return f"are quantised ({str(weight.dtype).removeprefix('torch.')})"
    return None


def stored_bits(linear: nn.Module) -> float:
    """Bits of a weight of a quantised projection, or of experts, as it is held now."""
    if isinstance(linear, experts.Step):
        return quantised.bits([linear.held], math.prod(linear.held.shape))
    return quantised.bits(quantised.held(linear), math.prod(features(linear)))


def is_conv1d(linear: Any) -> bool:
    """Whether this is GPT-2's projection, whose weight is stored [in, out]."""
    return type(linear).__name__ == "Conv1D"


def device_of(ffn: FFN) -> torch.device:
    """Where an FFN's weights are, as parameters or, of some libraries, as buffers; torch packs them for CPUs alone."""
    quantised.refuse_offloaded(ffn.down)
    held = itertools.chain(ffn.down.parameters(), ffn.down.buffers())
    return next((tensor.device for tensor in held), torch.device("cpu"))


def features(linear: Any) -> tuple[int, int]:
    """(in, out) features of a projection, without touching its (perhaps quantised) weight."""
    if is_conv1d(linear):
        return int(linear.nx), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)


def cache_argument(model: nn.Module) -> str:
    """Name of forward's KV cache argument: transformers 5 renames `past_key_values` to `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _described(layer: nn.Module, number: int, index: int, before: Any) -> list[FFN]:
    """The FFNs of a layer by the tables alone; none where no entry fits. More than one where there are experts.

    Args:
        number: of the layer. index: of the first FFN. before: the attention's output projection, here or in the layers
            before.
    """
    found: list[FFN] = []
    for layout in LAYOUTS:
        ffn = _laid_out(layer, layout, number, index + len(found), before)
        if ffn is not None and all(ffn.down is not f.down for f in found):
            found.append(ffn)
    for module in layer.modules():
        if before is not None and experts.is_routed(module):
            found.append(_routed(layer, module, number, index + len(found), before))
    for ffn in found:
        ffn.joint = len(found) > 1
    return found


def _laid_out(layer: nn.Module, layout: Layout, number: int, index: int, attention: Any) -> FFN | None:
    """The FFN of a layer where a layout fits, else None. Arguments as of `_described`."""
    block, up, down = (get(layer, p) for p in (layout.block, layout.up, layout.down))
    gate = get(layer, layout.gate) if layout.gate else None
    act = activation(layer, layout)
    modules = [block, up, down, attention, *([gate] if layout.gate else [])]
    if act is None or not all(isinstance(m, nn.Module) for m in modules):
        return None
    post_norm = first(layer, OUTPUT_NORMS)
    residual, after = _residual(layer, block), get(layer, EMBEDDED)
    if getattr(layer, "do_layer_norm_before", True) is False:  # OPT-350m: the norm comes after the sum
        residual, after = block, get(layer, "final_layer_norm")
    size, width = features(down)
    scale = first(layer, SCALES)
    return FFN(
        layer=index, number=number, holder=layer, block=block, gate=gate, up=up, down=down, act=act,
        fused=layout.fused, residual=residual, output=post_norm if post_norm is not None else down,
        attention=attention, size=size, width=width, scale=1.0 if scale is None else float(scale), after=after,
        lift=lift(layer, layout), norm=get(layer, layout.norm) if layout.norm else None,
    )  # fmt: skip


def _routed(layer: nn.Module, module: Any, number: int, index: int, attention: Any) -> FFN:
    """The routed experts of a layer, of whose neurons a token has those of its experts. See `_described`."""
    routed = experts.routed(module)
    return FFN(
        layer=index, number=number, holder=layer, block=routed.up, gate=None, up=routed.up, down=routed.down,
        act=routed.act, fused=routed.experts.has_gate, residual=_residual(layer, routed.up), attention=attention,
        output=first(layer, OUTPUT_NORMS) or routed.down, size=routed.size, width=routed.width, routed=routed,
        after=get(layer, EMBEDDED),
    )  # fmt: skip


def _residual(layer: nn.Module, block: nn.Module) -> Any:
    """The module that the stream enters on its way to the FFN."""
    residual = first(layer, RESIDUAL_NORMS)
    if get(layer, "post_feedforward_layernorm") is not None and get(layer, "pre_feedforward_layernorm") is None:
        return block  # OLMo 2: without a norm
    return block if residual is None else residual


def _has_none(layer: nn.Module) -> bool:
    """Whether a layer is attention, or what stands in for it, and nothing else (Nemotron-H)."""
    parts = [m for m in layer.children() if any(p.dim() > 1 for p in m.parameters())]
    return len(parts) == 1 and first(layer, ATTENTION_OUTPUTS + RECURRENT_OUTPUTS) is not None


# Of a model: its FFNs, and what its layers were made of when they were found.
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[list[FFN], list[int]]] = weakref.WeakKeyDictionary()


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFN of every layer, checked by running some tokens through the model.

    Raises:
        UserError: the family is unknown, the model fails, or its FFN does not compute what its description says.
    """
    known = _FOUND.get(model)
    if known is not None and unchanged(model, known[0]):
        return known[0]
    ffns = describe(model)
    for module in (m for f in ffns for m in f.projections if encoded(m)):
        quantised.note(module, stored_bits(module))
    trial.check(model, ffns)
    _FOUND[model] = ffns, _made_of(model)
    return ffns


def unchanged(model: nn.Module, ffns: Sequence[FFN]) -> bool:
    """Whether these are still the FFNs of the model: adapters, dropped layers and quantisation make others.

    It is asked at every prompt: layers are described anew only where something in them is not what it was.
    """
    found, made_of = _FOUND.get(model, (None, None))
    now = _made_of(model)
    if found is ffns and made_of == now:
        return True
    try:
        same = [_parts(f) for f in describe(model)] == [_parts(f) for f in ffns]
    except UserError:
        return False
    if same and found is ffns:
        _FOUND[model] = found, now
    return same


def _made_of(model: nn.Module) -> list[int]:
    """All that layers are made of, by identity: modules, parameters, functions (but for a module's own methods)."""
    modules = [m for layer in decoder_layers(model) for m in layer.modules()]
    parameters = (p for m in modules for p in m._parameters.values())
    functions = (v for m in modules for k, v in vars(m).items() if callable(v) and not hasattr(nn.Module, k))
    return [id(x) for x in itertools.chain(modules, parameters, functions)]


def _parts(ffn: FFN) -> list[int]:
    """Its modules and their parameters, by identity (a weight that is made anew each time has none)."""
    modules: list[Any] = [ffn.block, ffn.gate, ffn.up, ffn.down, ffn.residual, ffn.output, ffn.attention]
    modules += [ffn.norm, ffn.routed or (ffn.act.act if isinstance(ffn.act, Act) else ffn.act)]
    projections = ffn.projections
    return [id(x) for x in (*modules, *(p for m in projections for p in m._parameters.values()))]


def describe(model: nn.Module) -> list[FFN]:
    """The FFN of every layer by the table alone: for a model that cannot run, since it has no weights.

    Raises:
        UserError: the family is unknown.
    """
    ffns: list[FFN] = []
    attention = None
    for number, layer in enumerate(decoder_layers(model)):
        attention = first(layer, ATTENTION_OUTPUTS + RECURRENT_OUTPUTS) or attention
        found = _described(layer, number, len(ffns), attention)
        if not found and not _has_none(layer):
            raise UserError(
                f"the FFN of {type(layer).__name__} (layer {number} of {type(model).__name__}) is not understood "
                f"(its parts: {', '.join(n for n, _ in layer.named_children())})",
                "dense gated or plain FFNs are supported, and experts that transformers keeps in one module",
            )
        ffns += found
    if not ffns:
        raise UserError(f"{type(model).__name__} has no FFN in any layer", "there is nothing to prune")
    return ffns
