"""FFN weights that a checkpoint holds in few bits: what they cost, and what they stand for.

Quantisation libraries keep weights in forms of their own. Two things hold for all of them: what a projection has to
read is what it holds, and what its weights stand for is what its own forward makes of unit vectors. No state dict is
asked for: that of bitsandbytes 0.50 turns weights back that it has turned around for a CPU, and leaves wrong scales.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.util.bits import OWN_BITS
from dart_eval.util.errors import UserError

CHUNK = 1024  # unit vectors that go through a projection at a time
# What libraries keep beside parameters and buffers, in objects of their own, and what of it is no part of the weights.
OBJECTS = ("quant_state", "state2", "state")
NO_PART = ("bias", "code")  # the other: the values that codes stand for, the same for all

_NOTED: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


def note(linear: nn.Module, width: float) -> None:
    """Keep how many bits a weight of a projection has in its checkpoint, before what holds it changes.

    Weights of a GGUF file are expanded when it is loaded, and bitsandbytes rounds scales when it first runs on a CPU.
    """
    _NOTED.setdefault(linear, width)


def noted(linear: nn.Module) -> float | None:
    """What was noted of a projection; None: nothing."""
    return _NOTED.get(linear)


_FORMS: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def note_form(linear: nn.Module, form: str) -> None:
    """Keep of a projection without weights what the checkpoint's will be: `are quantised (bitsandbytes)`."""
    _FORMS[linear] = form


def form(linear: nn.Module) -> str | None:
    """What was noted of a projection by `note_form`."""
    return _FORMS.get(linear)


def bits(tensors: Iterable[Any], weights: int) -> float:
    """Bits of a weight, its part of scales and zero points included, of a matrix that these tensors hold.

    Args:
        weights: how many they stand for.
    """
    return sum(found for tensor in tensors for found in _bits(tensor, weights)) / weights


def nbytes(model: nn.Module) -> int:
    """Bytes of all parameters as they lie in memory, tied ones once, with what libraries keep beside them."""
    named = [("", p) for p in model.parameters()] + [part for m in model.modules() for part in _packed(m)]
    return round(sum(found for tensor in _apart(named) for found in _bits(tensor, 0, as_kept=True)) / 8)


def held(linear: nn.Module) -> list[Tensor]:
    """The tensors in which a projection holds its weights."""
    return _apart([*linear.named_parameters(), *linear.named_buffers(), *_beside(linear), *_packed(linear)])


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the parameters of a module elsewhere, and brings them for each forward."""
    return "_hf_hook" in vars(module) and any(p.is_meta for p in module.parameters(recurse=False))


def refuse_offloaded(linear: nn.Module) -> None:
    """Refuse to read weights that are there only while their module runs.

    Raises:
        UserError: these are.
    """
    if offloaded(linear):
        raise UserError(
            f"the weights of {type(linear).__name__} are offloaded: they are in memory only while it runs",
            "load the model without offload, or take a method that reads no weights, such as griffin",
        )


def input_device(model: Any) -> torch.device:
    """Where a model wants its tokens."""
    embeddings = model.get_input_embeddings()
    return embeddings._hf_hook.execution_device if offloaded(embeddings) else embeddings.weight.device


def is_packed(linear: Any) -> bool:
    """Whether a projection gives its weight when asked alone: torch's own, of `quantize_dynamic`."""
    return callable(getattr(linear, "weight", None)) and callable(getattr(linear, "bias", None))


def bias_of(linear: Any) -> Tensor | None:
    """The bias of a projection, whatever holds its weights."""
    return linear.bias() if is_packed(linear) else getattr(linear, "bias", None)


def _packed(linear: Any) -> Iterator[tuple[str, Tensor]]:
    """The codes that such a projection gives; with scales and zero points as kernels hold them, 32 bits each."""
    if not is_packed(linear):
        return
    weight: Tensor = linear.weight()
    yield "weight", weight
    if weight.is_quantized:
        channels = "channel" in str(weight.qscheme())
        scales = weight.q_per_channel_scales() if channels else torch.tensor([weight.q_scale()])
        yield "scales", scales.float()
        yield "zero_points", torch.zeros(len(scales), dtype=torch.int32)


def _apart(named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """These tensors and what stands beside them, each memory once."""
    plain = [value for _, value in named if not hasattr(value, "__tensor_flatten__")]  # others name their own parts
    found: dict[tuple[int, int], Tensor] = {}
    for name, tensor in [*named, *(one for value in plain for one in _beside(value))]:
        if name.rpartition(".")[2] not in NO_PART:
            place = 0 if hasattr(tensor, "__tensor_flatten__") else tensor.data_ptr()  # 0 also of shapes alone
            found.setdefault((place or id(tensor), tensor.numel()), tensor)
    return list(found.values())


def _beside(holder: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that stand as plain attributes of a parameter, or of a library's object."""
    if not isinstance(holder, nn.Module):
        yield from ((n, v) for n, v in getattr(holder, "__dict__", {}).items() if isinstance(v, Tensor) and n != "grad")
    for name in OBJECTS:
        if (inner := getattr(holder, name, None)) is not None and not isinstance(inner, (Tensor, nn.Module)):
            yield from _beside(inner)


def _bits(value: Any, weights: int, as_kept: bool = False) -> Iterator[float]:
    """The bits of every tensor inside one of a library's own. as_kept: also where that is more than they need."""
    if not isinstance(value, Tensor):
        return
    if not hasattr(value, "__tensor_flatten__"):
        plain = value.is_floating_point() and value.numel() == weights  # under another name: see `OWN_BITS`
        yield float(value.numel() * min(8 * value.element_size(), OWN_BITS if plain else 64))
        return
    names, _ = value.__tensor_flatten__()
    narrow = 0 if as_kept else width_of(getattr(value, "target_dtype", None))
    for name in names:
        part = getattr(value, name)
        if narrow and name == "qdata":  # torchao keeps codes of few bits in a byte each where no kernel takes them
            yield float(narrow * part.numel())
        else:
            yield from _bits(part, weights, as_kept)


def width_of(dtype: Any) -> int:
    """Bits of a dtype of less than a byte (`torch.int4`); 0: of any other."""
    found = re.fullmatch(r"torch\.u?int([1-7])", str(dtype))
    return int(found.group(1)) if found else 0


@torch.no_grad()
def values(linear: Any, width: int) -> Tensor:
    """[out, in], what the weights of a projection stand for: its forward of unit vectors, without its bias.

    Exact for weights that are rounded, in the dtype that the projection computes in. Inputs that are rounded on the way
    do not matter: a unit vector's largest entry is its only one.

    Args:
        linear: the projection. width: of its inputs.
    """
    device, dtype = next(t.device for t in held(linear)), _computes_in(linear)
    bias = bias_of(linear)
    columns = []
    for start in range(0, width, CHUNK):
        count = min(CHUNK, width - start)
        units = torch.zeros(count, width, device=device, dtype=dtype)
        units[torch.arange(count), torch.arange(start, start + count)] = 1
        made = linear.forward(units)  # without the hooks that prune it
        columns.append(made if bias is None else made - bias)
    return torch.cat(columns).T.contiguous()


def _computes_in(linear: Any) -> torch.dtype:
    """The dtype of what a projection is given."""
    found: Any = getattr(linear, "compute_dtype", None)  # bitsandbytes
    weight = getattr(linear, "weight", None)
    for dtype in (found, getattr(weight, "dtype", None), *(t.dtype for t in held(linear))):
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.float32
