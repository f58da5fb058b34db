"""The FFNs of a model: described by the table of families, then checked by running some tokens."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

from torch import nn

from dart_eval.layers import experts, families, verify
from dart_eval.layers.activations import activation, lift
from dart_eval.layers.families import Layout, first, get
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import encoded, features
from dart_eval.layers.quantised import RECORDS, Record, stated_bits
from dart_eval.util.errors import UserError

GUARD = "_under_prune"  # an attribute of all modules of a model with a session


def _described(layer: nn.Module, number: int, index: int, before: nn.Module | None) -> list[FFN]:
    """Return the FFNs of a layer by the tables alone: none if no entry fits, several with experts.

    Args:
        number: of the layer.
        index: of its first FFN.
        before: the attention's output projection, of this layer or an earlier one.
    """
    ffns: list[FFN] = []
    for layout in families.LAYOUTS:
        ffn = _laid_out(layer, layout, number, index + len(ffns), before)
        if ffn is not None and all(ffn.down is not f.down for f in ffns):
            ffns.append(ffn)
    for module in layer.modules():
        if before is not None and experts.is_routed(module):
            ffns.append(_routed(layer, module, number, index + len(ffns), before))
    for ffn in ffns:
        ffn.joint = len(ffns) > 1
    return ffns


def _laid_out(layer: nn.Module, layout: Layout, number: int, index: int, attention: Any) -> FFN | None:
    """Return the FFN of a layer if a layout fits, else None. Arguments as of `_described`."""
    block, up, down = (get(layer, p) for p in (layout.block, layout.up, layout.down))
    gate = get(layer, layout.gate) if layout.gate else None
    act = activation(layer, layout)
    modules = [block, up, down, attention, *([gate] if layout.gate else [])]
    if act is None or not all(isinstance(m, nn.Module) for m in modules):
        return None
    post_norm = first(layer, families.OUTPUT_NORMS)
    residual, after = _residual(layer, block), get(layer, families.EMBEDDED)
    if getattr(layer, "do_layer_norm_before", True) is False:  # OPT-350m: the norm comes after the sum
        residual, after = block, get(layer, "final_layer_norm")
    size, width = features(down)
    scale = first(layer, families.SCALES)
    return FFN(
        layer=index, number=number, holder=layer, block=block, gate=gate, up=up, down=down, act=act,
        fused=layout.fused, residual=residual, output=post_norm if post_norm is not None else down,
        attention=attention, size=size, width=width, scale=1.0 if scale is None else float(scale), after=after,
        lift=lift(layer, layout), norm=get(layer, layout.norm) if layout.norm else None,
    )  # fmt: skip


def _routed(layer: nn.Module, module: object, number: int, index: int, attention: nn.Module) -> FFN:
    """Return the routed experts of a layer as an FFN. Arguments as of `_described`."""
    routed = experts.routed(module)
    return FFN(
        layer=index, number=number, holder=layer, block=routed.up, gate=None, up=routed.up, down=routed.down,
        act=routed.act, fused=routed.experts.has_gate, residual=_residual(layer, routed.up), attention=attention,
        output=first(layer, families.OUTPUT_NORMS) or routed.down, size=routed.size, width=routed.width, routed=routed,
        after=get(layer, families.EMBEDDED),
    )  # fmt: skip


def _residual(layer: nn.Module, block: nn.Module) -> nn.Module:
    """Return the module that the stream enters on its way to the FFN."""
    residual = first(layer, families.RESIDUAL_NORMS)
    if get(layer, "post_feedforward_layernorm") is not None and get(layer, "pre_feedforward_layernorm") is None:
        return block  # OLMo 2: without a norm
    return block if residual is None else residual


def _has_none(layer: nn.Module) -> bool:
    """Whether a layer is attention, or its replacement, and nothing else (Nemotron-H)."""
    parts = [m for m in layer.children() if any(p.dim() > 1 for p in m.parameters())]
    return len(parts) == 1 and first(layer, families.ATTENTION_OUTPUTS + families.RECURRENT_OUTPUTS) is not None


def base_of(model: Any) -> nn.Module:
    """Return the module that computes the last hidden states: the base model, or the decoder if that is the model."""
    base = getattr(model, "base_model", model)
    return decoder(model) if base is model else base


def decoder(model: nn.Module) -> nn.Module:
    """Return the module that owns the decoder layers and runs them in order (hooks on it see every forward)."""
    base = getattr(model, "base_model", model)
    for path in families.LAYER_LISTS:
        owner, _, name = path.rpartition(".")
        with contextlib.suppress(AttributeError):
            layers = getattr(module := base.get_submodule(owner), name)
            if isinstance(layers, nn.ModuleList) and len(layers):
                return module
    if all(get(base, path) is not None for path in families.STACKS):
        return base
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        remedy = "give model.get_base_model(), or the merged model"
        raise UserError(f"{type(model).__name__} wraps the model whose layers are to be pruned", remedy)
    raise UserError(
        f"the decoder layers of {type(model).__name__} were not found",
        "add the family to dart_eval/layers/families.py (docs/architecture.md, 'a model family')",
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a Hugging Face causal language model."""
    owner = decoder(model)
    layers = next(
        (m for p in families.LAYER_LISTS if (m := getattr(owner, p.rpartition(".")[2], None)) is not None), None
    )
    return nn.ModuleList(layer for path in families.STACKS for layer in get(owner, path)) if layers is None else layers


def refuse_second(model: nn.Module) -> None:
    """Refuse a model with a session on it or on a part of it, and an object that is not a model.

    Raises:
        UserError: with the reason.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"prune() needs a loaded model, and {model!r} is a {type(model).__name__}",
            "load it first, with transformers.AutoModelForCausalLM",
        )
    if any(GUARD in module.__dict__ for module in model.modules()):
        raise UserError("this model is already under another prune()", "leave that block")


# model -> the identities of its layers' parts when its FFNs were found, and these
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], list[FFN]]] = weakref.WeakKeyDictionary()


def find_ffns(model: nn.Module) -> list[FFN]:
    """Return the FFN of every layer, checked by running some tokens through the model.

    They are found once, and anew if adapters, dropped layers or quantisation change the layers' modules, parameters or
    activations.

    Raises:
        UserError: the family is unknown, the model fails, or its FFN does not compute what its description says.
    """
    modules = [module for layer in decoder_layers(model) for module in layer.modules()]
    parts = [id(part) for module in modules for part in (module, *module._parameters.values())]
    parts += [id(v) for m in modules for k, v in vars(m).items() if callable(v) and not hasattr(nn.Module, k)]
    known, ffns = _FOUND.get(model, ([], []))
    if known == parts:
        return ffns
    ffns = describe(model)
    for projection in (m for f in ffns for m in f.projections):
        if callable(getattr(projection, "weight", None)):
            raise UserError("torch's quantize_dynamic keeps weights that cannot be pruned", "quantise with torchao")
        if projection not in RECORDS and encoded(getattr(projection, "base_layer", projection)):
            RECORDS[projection] = Record(stated_bits(getattr(model, "config", None)))
    verify.verify(model, ffns)
    _FOUND[model] = parts, ffns
    return ffns


def describe(model: nn.Module) -> list[FFN]:
    """Return the FFN of every layer by the table alone, for a model without weights.

    Raises:
        UserError: the family is unknown.
    """
    ffns: list[FFN] = []
    attention = None
    for number, layer in enumerate(decoder_layers(model)):
        attention = first(layer, families.ATTENTION_OUTPUTS + families.RECURRENT_OUTPUTS) or attention
        described = _described(layer, number, len(ffns), attention)
        if not described and not _has_none(layer):
            raise UserError(
                f"the FFN of {type(layer).__name__} (layer {number} of {type(model).__name__}) is not understood "
                f"(its parts: {', '.join(n for n, _ in layer.named_children())})",
                "dense gated or plain FFNs are supported, and experts that transformers keeps in one module",
            )
        ffns += described
    if not ffns:
        raise UserError(f"{type(model).__name__} has no FFN in any layer", "there is nothing to prune")
    return ffns
