"""Where the codes of a quantised checkpoint are: on the grid that the scales beside them say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dart_eval import codes
from dart_eval.bits import LEAST, MOST, Rounding
from dart_eval.checkpoint import model_file
from dart_eval.codes import Packed
from dart_eval.errors import UserError
from dart_eval.experts import Step
from dart_eval.ffn import describe, features, weight_matrix
from dart_eval.quantised import width_of
from dart_eval.stored import method_of, shards_of, told_of


def note_codes(config: Any, source: str, revision: str | None, model: Any) -> None:
    """Note of a quantised model that was just loaded how the codes of its FFN weights are found; not of experts.

    Args:
        config: as it was before it was loaded. source: its folder, or its name on the hub. revision: there.
    """
    method = method_of(config)
    if method not in FINDERS:
        return
    try:
        ffns = describe(model)
    except UserError:  # it is refused later, with the reason
        return
    names = {id(module): name for name, module in model.named_modules()}
    of_file = functools.partial(_of_file, source, revision)
    for module in (m for f in ffns for m in f.projections if not isinstance(m, Step)):
        find = FINDERS[method](module, names[id(module)], told_of(config), of_file)
        if find is not None:
            codes.note(module, find)


def _torchao(module: Any, name: str, told: dict[str, Any], of_file: Any) -> Callable[[], Packed | None] | None:
    """Tensors of its own hold codes in `qdata`, zero points and scales."""
    weight = module.weight
    scale, zero, held = (getattr(weight, name, None) for name in ("scale", "zero_point", "qdata"))
    bits = width_of(getattr(weight, "target_dtype", None)) or 8
    if not isinstance(scale, Tensor) or not isinstance(held, Tensor) or held.shape != weight.shape:
        return None

    def whole() -> Tensor:
        if zero is None:
            return held
        spread = zero.reshape(len(held), -1).repeat_interleave(held.numel() // zero.numel(), 1)
        return held.to(torch.int16) - spread.to(torch.int16)

    return functools.partial(_found, module, bits, lambda: scale, whole)


def _packed(module: Any, name: str, told: dict[str, Any], of_file: Any) -> Callable[[], Packed | None] | None:
    """GPTQ and AWQ: a module keeps its scales as [groups, out]."""
    scales = getattr(module, "scales", None)
    return None if scales is None else functools.partial(_found, module, int(told["bits"]), lambda: scales.T)


def _compressed(module: Any, name: str, told: dict[str, Any], of_file: Any) -> Callable[[], Packed | None] | None:
    """compressed-tensors: the file has the scales, and the configuration says how many bits a code has."""
    groups = list(told.get("config_groups", {}).values())
    weights = groups[0].get("weights") if len(groups) == 1 else None
    if not weights or weights.get("type") != "int" or not LEAST <= weights["num_bits"] <= MOST:
        return None
    scales = functools.partial(of_file, f"{name}.weight_scale")
    return functools.partial(_found, module, weights["num_bits"], scales, functools.partial(of_file, f"{name}.weight"))


FINDERS = {
    "torchao": _torchao, "gptq": _packed, "awq": _packed, "compressed-tensors": _compressed,
}  # fmt: skip


def _found(
    module: nn.Module,
    bits: int,
    scales: Callable[[], Tensor | None],
    stored: Callable[[], Tensor | None] = lambda: None,
) -> Packed | None:
    """The codes of a projection by its scales, one for a row or for equally many weights of it.

    Args:
        stored: its codes as whole numbers, where a file has them: 16 bits do not tell all codes of 8 bits apart.
    """
    width, rows = features(module)
    held = scales()
    if held is None or held.numel() % rows or width % (held.numel() // rows):  # one scale for many rows: another kind
        return None
    steps, group = held.reshape(rows, -1).float(), width * rows // held.numel()
    whole = stored()
    if whole is None or whole.is_floating_point():
        return codes.on_grid(weight_matrix(module), steps, Rounding(bits, group))
    return codes.on_grid(whole.float() * steps.repeat_interleave(group, 1), steps, Rounding(bits, group))


def _of_file(source: str, revision: str | None, name: str) -> Tensor | None:
    """A tensor of a checkpoint's files; None where they have none of that name."""
    for shard in shards_of(source, revision):
        if (file := model_file(source, shard, revision)) is not None:
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118 - no mapping
                    return opened.get_tensor(name)
    return None
