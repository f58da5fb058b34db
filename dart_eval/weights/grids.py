"""The codes of FFN weights in quantised checkpoints, by format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dart_eval.layers.find import describe
from dart_eval.layers.projection import Step, features, weight_matrix
from dart_eval.layers.quantised import width_of
from dart_eval.util.bits import LEAST, MOST, Rounding
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json
from dart_eval.weights import codes
from dart_eval.weights.codes import Packed
from dart_eval.weights.stored import Files, method_of, quantisation_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WORD = 32  # bits of the integers that formats pack codes in
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # order of the eight codes in a word, from its lowest bits up


def note_codes(config: PretrainedConfig, files: Files, model: PreTrainedModel) -> None:
    """Note how the codes of a quantised model's FFN weights are found, except for experts.

    Args:
        config: of the model before it was loaded.
        files: of the checkpoint.
    """
    find, settings = FINDERS.get(method_of(config) or ""), quantisation_of(config)
    if find is None or (find is _compressed and _whole_numbers(settings) is None):
        return
    try:
        ffns = describe(model)
    except UserError:  # the model is refused later, with the reason
        return
    names = {id(module): name for name, module in model.named_modules()}
    for module in (m for f in ffns for m in f.projections if not isinstance(m, Step)):
        part = functools.partial(files.tensor, names[id(module)])
        codes.note(module, functools.partial(find, settings=settings, part=part))


Part = Callable[[str], "Tensor | None"]  # returns a projection's tensor in the files, by the end of its name


def _torchao(module: nn.Module, settings: Json, part: Part) -> Packed | None:
    """torchao: tensors of its own store codes in `qdata`."""
    weight = module.weight
    held, bits = getattr(weight, "qdata", None), width_of(getattr(weight, "target_dtype", None)) or 8
    group = list(getattr(weight, "block_size", ()))
    if not isinstance(held, Tensor) or held.is_floating_point() or len(group) != 2 or group[0] != 1:
        return None
    return codes.fitted(held, weight_matrix(module), Rounding(bits, int(group[1])))


def _whole_numbers(settings: Json) -> Json | None:
    """Return the settings of compressed-tensors if all weights are integer codes of one kind; else None."""
    groups = list((settings.get("config_groups") or {}).values())
    weights = groups[0].get("weights") if len(groups) == 1 and isinstance(groups[0], Mapping) else None
    fits = weights and weights.get("type", "int") == "int" and LEAST <= weights.get("num_bits", 8) <= MOST
    return weights if fits else None


def _compressed(module: nn.Module, settings: Json, part: Part) -> Packed | None:
    """compressed-tensors: a byte per code, or words of codes along a row, counted from 0."""
    if (weights := _whole_numbers(settings)) is None:
        return None
    bits, group = int(weights.get("num_bits", 8)), int(weights.get("group_size") or 0)
    held, words = part("weight"), part("weight_packed")
    if words is not None and WORD % bits == 0:
        rows = unpacked(words, bits)[:, : features(module)[0]]
        return codes.fitted(rows, weight_matrix(module), Rounding(bits, max(0, group)), unsigned=True)
    if held is None or held.is_floating_point():
        return None
    return codes.fitted(held, weight_matrix(module), Rounding(bits, max(0, group)))


def _gptq(module: nn.Module, settings: Json, part: Part) -> Packed | None:
    """GPTQ: words of codes along the inputs, [in / 8, out] for 4 bits."""
    words, bits = part("qweight"), int(settings.get("bits", 4))
    if words is None or WORD % bits:
        return None
    return _from_zero(module, settings, unpacked(words.T, bits), bits)


def _awq(module: nn.Module, settings: Json, part: Part) -> Packed | None:
    """AWQ: words of codes along the outputs, [in, out / 8], in an order of their own."""
    words = part("qweight")
    if words is None or int(settings.get("bits", 4)) != 4:
        return None
    return _from_zero(module, settings, unpacked(words, 4, AWQ).T, 4)


FINDERS = {"torchao": _torchao, "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq}


def _from_zero(module: nn.Module, settings: Json, held: Tensor, bits: int) -> Packed | None:
    """Fit codes [out, in] that begin at 0."""
    group = int(settings.get("group_size") or -1)
    return codes.fitted(held, weight_matrix(module), Rounding(bits, max(0, group)), unsigned=True)


def unpacked(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Unpack codes from 32-bit words, along the last dimension.

    Args:
        words: [rows, n] int32.
        bits: of a code.
        order: of the codes in a word, from its lowest bits up; None: ascending.

    Returns:
        [rows, 32 / bits * n] int32, from 0 on.
    """
    each = WORD // bits
    shifts = torch.arange(each, dtype=torch.int32, device=words.device) * bits
    unpacked_codes = (words.to(torch.int32)[..., None] >> shifts) & (2**bits - 1)
    if order is not None:
        unpacked_codes = unpacked_codes[..., torch.tensor(order).argsort()]
    return unpacked_codes.flatten(-2)
