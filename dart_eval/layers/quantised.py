"""FFN weights that a checkpoint stores in few bits: their bytes and their values.

Quantisation libraries store weights in forms of their own. For all of them, a projection reads the tensors that it
holds, and its forward of unit vectors gives the values. State dicts are avoided: that of bitsandbytes 0.50 restores
weights that it has reordered for a CPU, and leaves wrong scales.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.util.bits import OWN_BITS
from dart_eval.util.errors import UserError

CHUNK = 1024  # unit vectors that go through a projection at a time
# Objects of libraries that hold tensors beside parameters and buffers.
OBJECTS = ("quant_state", "state2", "state")
NO_PART = ("bias", "code")  # tensors that are not weights; code: the values of codes, the same for all weights

_NOTED: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


def note(linear: nn.Module, width: float) -> None:
    """Note the bits of a projection's weight in its checkpoint, before its storage changes.

    Weights of a GGUF file are expanded on loading, and bitsandbytes rounds scales when it first runs on a CPU.
    """
    _NOTED.setdefault(linear, width)


def noted(linear: nn.Module) -> float | None:
    """Return the noted bits of a projection, or None."""
    return _NOTED.get(linear)


_FORMS: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def note_form(linear: nn.Module, form: str) -> None:
    """Note the form of the checkpoint's weights for a projection without weights: `are quantised (bitsandbytes)`."""
    _FORMS[linear] = form


def form(linear: nn.Module) -> str | None:
    """Return the form noted by `note_form`, or None."""
    return _FORMS.get(linear)


def bits(tensors: Iterable[object], weights: int) -> float:
    """Return the bits per weight, scales and zero points included, of a matrix stored in these tensors.

    Args:
        weights: number of weights in the matrix.
    """
    return sum(n for tensor in tensors for n in _bits(tensor, weights)) / weights


def nbytes(model: nn.Module) -> int:
    """Return the bytes of all parameters in memory, tied ones once, with the libraries' tensors beside them."""
    named = [("", p) for p in model.parameters()] + [part for m in model.modules() for part in _packed(m)]
    for module in model.modules():  # of GPTQ and AWQ: codes and scales are buffers
        if hasattr(module, "in_features") and "weight" not in dict(module.named_parameters(recurse=False)):
            named += module.named_buffers(recurse=False)
    return round(sum(n for tensor in _apart(named) for n in _bits(tensor, 0, in_memory=True)) / 8)


def held(linear: nn.Module) -> list[Tensor]:
    """Return the tensors in which a projection stores its weights."""
    return _apart([*linear.named_parameters(), *linear.named_buffers(), *_beside(linear), *_packed(linear)])


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the parameters of a module elsewhere between its forwards."""
    return "_hf_hook" in vars(module) and any(p.is_meta for p in module.parameters(recurse=False))


def refuse_offloaded(linear: nn.Module) -> None:
    """Refuse to read weights that are in memory only while their module runs.

    Raises:
        UserError: the module is offloaded.
    """
    if offloaded(linear):
        raise UserError(
            f"the weights of {type(linear).__name__} are offloaded: they are in memory only while it runs",
            "load the model without offload, or take a method that reads no weights, such as griffin",
        )


def input_device(model: Any) -> torch.device:
    """Return the device of a model's input tokens."""
    embeddings = model.get_input_embeddings()
    return embeddings._hf_hook.execution_device if offloaded(embeddings) else embeddings.weight.device


def is_packed(linear: object) -> bool:
    """Whether a projection's weight is a method: torch's own, from `quantize_dynamic`."""
    return callable(getattr(linear, "weight", None)) and callable(getattr(linear, "bias", None))


def bias_of(linear: Any) -> Tensor | None:
    """Return the bias of a projection, however its weights are stored."""
    return linear.bias() if is_packed(linear) else getattr(linear, "bias", None)


def _packed(linear: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the codes of such a projection, and scales and zero points as kernels store them, 32 bits each."""
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
    """Return these tensors and the ones beside them, each memory once."""
    plain = [value for _, value in named if not hasattr(value, "__tensor_flatten__")]  # others list their own parts
    by_place: dict[tuple[int, int], Tensor] = {}
    for name, tensor in [*named, *(one for value in plain for one in _beside(value))]:
        if name.rpartition(".")[2] not in NO_PART:
            place = 0 if hasattr(tensor, "__tensor_flatten__") else tensor.data_ptr()  # 0 also for meta tensors
            by_place.setdefault((place or id(tensor), tensor.numel()), tensor)
    return list(by_place.values())


def _beside(holder: object) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that are plain attributes of a parameter or of a library's object."""
    if not isinstance(holder, nn.Module):
        yield from ((n, v) for n, v in getattr(holder, "__dict__", {}).items() if isinstance(v, Tensor) and n != "grad")
    for name in OBJECTS:
        if (inner := getattr(holder, name, None)) is not None and not isinstance(inner, (Tensor, nn.Module)):
            yield from _beside(inner)


def _bits(value: object, weights: int, in_memory: bool = False) -> Iterator[float]:
    """Yield the bits of every tensor inside one of a library's own. in_memory: count padded codes in full."""
    if not isinstance(value, Tensor):
        return
    if not hasattr(value, "__tensor_flatten__"):
        plain = value.is_floating_point() and value.numel() == weights  # under another name: see `OWN_BITS`
        yield float(value.numel() * min(8 * value.element_size(), OWN_BITS if plain else 64))
        return
    names, _ = value.__tensor_flatten__()
    narrow = 0 if in_memory else width_of(getattr(value, "target_dtype", None))
    for name in names:
        part = getattr(value, name)
        if narrow and name == "qdata":  # torchao stores low-bit codes in a byte each if no kernel takes them
            yield float(narrow * part.numel())
        else:
            yield from _bits(part, weights, in_memory)


def width_of(dtype: object) -> int:
    """Return the bits of a dtype of less than a byte (`torch.int4`); 0 for other dtypes."""
    match = re.fullmatch(r"torch\.u?int([1-7])", str(dtype))
    return int(match.group(1)) if match else 0


@torch.no_grad()
def values(linear: Any, width: int) -> Tensor:
    """Return [out, in], the values of a projection's weights: its forward of unit vectors, without its bias.

    Exact for rounded weights, in the dtype that the projection computes in. Rounding of inputs does not matter: a unit
    vector's largest entry is its only one.

    Args:
        linear: the projection.
        width: of its inputs.
    """
    device, dtype = next(t.device for t in held(linear)), _computes_in(linear)
    columns = []
    with _without_bias(linear) as bias:
        for start in range(0, width, CHUNK):
            count = min(CHUNK, width - start)
            units = torch.zeros(count, width, device=device, dtype=dtype)
            units[torch.arange(count), torch.arange(start, start + count)] = 1
            out = linear.forward(units)  # without the hooks that prune it
            columns.append(out if bias is None else out - bias)
    return torch.cat(columns).T.contiguous()


@contextlib.contextmanager
def _without_bias(linear: Any) -> Iterator[Tensor | None]:
    """Let a projection add no bias inside the block, since the sum is rounded; yield one that it must add (packed)."""
    own = getattr(linear, "base_layer", linear)
    kept = next((part for part in (own._parameters, own._buffers) if part.get("bias") is not None), None)
    if kept is None:
        yield bias_of(linear)
        return
    bias, kept["bias"] = kept["bias"], None
    try:
        yield None
    finally:
        kept["bias"] = bias


def _computes_in(linear: Any) -> torch.dtype:
    """Return the dtype of a projection's input."""
    own: object = getattr(linear, "compute_dtype", None)  # bitsandbytes
    weight = getattr(linear, "weight", None)
    for dtype in (own, getattr(weight, "dtype", None), *(t.dtype for t in held(linear))):
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.float32
