"""FFN weights that a checkpoint stores in few bits: what its configuration says of them, and their values.

Quantisation libraries store weights in forms of their own. How many bits these take follows from the checkpoint's
configuration, to within some per cent; a projection's forward of unit vectors gives the values, whatever the form.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dart_eval.util.bits import OWN_BITS, SCALE_BITS, Stored
from dart_eval.util.text import Json

CHUNK = 1024  # unit vectors that go through a projection at a time
WIDTHS = ("bits", "num_bits", "nbits", "w_bit")  # settings that say the bits of a code
GROUPS = ("group_size", "q_group_size")  # and the weights that share a scale
UNSAID = {"mxfp4": 64, "bitsandbytes": 32}  # the same of 4-bit formats that have one size: 8 bits for 32, 32 for 64
NAMED = re.compile(r"(?:int|float|fp)(\d)(?:weight|_|\b)", re.IGNORECASE)  # mxfp4, Int8WeightOnlyConfig, float8_e4m3fn


class Record(NamedTuple):
    """What is known of a projection's weight beside what lies in memory.

    Attributes:
        bits: of a weight as served.
        form: why the checkpoint's weight is no matrix of plain numbers (`are quantised (gptq)`), or None.
    """

    bits: Stored
    form: str | None = None


RECORDS: weakref.WeakKeyDictionary[nn.Module, Record] = weakref.WeakKeyDictionary()


def quantisation_of(config: Any) -> Json:
    """Return the quantisation settings of a model's configuration; empty if its checkpoint is not quantised."""
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None and hasattr(config, "get_text_config"):
        settings = getattr(config.get_text_config(), "quantization_config", None)
    return settings.to_dict() if hasattr(settings, "to_dict") else dict(settings or {})


def method_of(config: Any) -> str | None:
    """Return the quantisation method of a checkpoint by its configuration, or None."""
    name = quantisation_of(config).get("quant_method")
    return None if name is None else str(getattr(name, "value", name))


def stated_bits(config: Any) -> Stored:
    """Return about how many bits a weight has by a model's configuration; those of a plain weight if it does not say.

    Scales count 16 bits for a group of weights; zero points, and the scales of whole rows or blocks, are neglected.
    """
    entries = [*_entries(quantisation_of(config))]
    named = dict(reversed(entries))  # of equal names the first
    match = NAMED.search(" ".join(str(value) for _, value in entries))
    by_name = int(match[1]) if match else OWN_BITS
    loaded = 4 if named.get("load_in_4bit") else 8 if named.get("load_in_8bit") else by_name  # of bitsandbytes
    code = next((named[name] for name in WIDTHS if isinstance(named.get(name), int)), loaded)
    group = next((named[name] for name in GROUPS if isinstance(named.get(name), int)), 0)
    group = group or (UNSAID.get(str(method_of(config)), 0) if code == 4 else 0)
    return Stored(code, SCALE_BITS / group if group > 0 else 0.0, about=True)


def _entries(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all settings, nested ones too, but those of activations."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from () if "activation" in key else _entries(value)
        else:
            yield key, value


def nbytes(model: nn.Module) -> int:
    """Return the bytes of all parameters in memory, tied ones once, and of GPTQ's and AWQ's buffers of codes."""
    tensors: list[Tensor] = [*model.parameters()]
    for module in model.modules():
        if hasattr(module, "in_features") and "weight" not in module._parameters:
            tensors += module.buffers(recurse=False)
    return sum(_nbytes(tensor) for tensor in tensors)


def _nbytes(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])  # of torchao


@torch.no_grad()
def values(linear: Any, width: int) -> Tensor:
    """Return [out, in], the values of a projection's weights: its forward of unit vectors, without its bias.

    Exact for rounded weights, in the dtype that the projection computes in. Rounding of inputs does not matter: a unit
    vector's largest entry is its only one.

    Args:
        linear: the projection.
        width: of its inputs.
    """
    tensors = [*linear.parameters(), *linear.buffers()]
    dtypes = [getattr(linear, "compute_dtype", None), *(tensor.dtype for tensor in tensors)]  # the first: bitsandbytes
    wide = (d for d in dtypes if isinstance(d, torch.dtype) and d.is_floating_point and d.itemsize > 1)
    dtype, device = next(wide, torch.float32), tensors[0].device
    columns = []
    with _without_bias(linear):
        for start in range(0, width, CHUNK):
            count = min(CHUNK, width - start)
            units = torch.zeros(count, width, device=device, dtype=dtype)
            units[torch.arange(count), torch.arange(start, start + count)] = 1
            columns.append(linear.forward(units))  # without the hooks that prune it
    return torch.cat(columns).T.contiguous()


@contextlib.contextmanager
def _without_bias(linear: Any) -> Iterator[None]:
    """Let a projection add no bias inside the block, since the sum is rounded."""
    base = getattr(linear, "base_layer", linear)
    parts: Any = next((part for part in (base._parameters, base._buffers) if part.get("bias") is not None), {})
    bias, parts["bias"] = parts.get("bias"), None
    try:
        yield
    finally:
        parts["bias"] = bias
