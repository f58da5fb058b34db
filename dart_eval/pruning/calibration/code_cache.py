"""A cache on disk of weights as integer codes, by the weights and the format."""

from __future__ import annotations

import hashlib
import inspect

import torch
from torch import Tensor

from dart_eval.pruning.calibration.stats_cache import StatsCache
from dart_eval.util.bits import Rounding
from dart_eval.weights import k_quants, rounding
from dart_eval.weights.codes import Packed
from dart_eval.weights.rounding import rounded

LARGE = 1 << 20  # weights of a matrix whose codes are cached


def codes_of(weight: Tensor, wanted: Rounding) -> Packed:
    """Return the codes of a matrix; those of a large one are cached on disk by a hash of its weights."""
    if weight.is_meta or weight.numel() < LARGE:
        return rounded(weight, wanted)
    plain = weight.contiguous().cpu()
    of = {
        "weights": hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest(), "as": wanted.text,
        "dtype": str(weight.dtype), "shape": [*weight.shape], "made by": _made_by(),
    }  # fmt: skip
    cache = StatsCache({}, "codes")
    tensors = cache.get(of)
    if tensors is None:
        packed = rounded(weight, wanted)
        tensors = [part.cpu() for part in (packed.codes, packed.scales, packed.offsets) if part is not None]
        cache.put(of, tensors)
    codes, scales, *offsets = (tensor.to(weight.device) for tensor in tensors)
    return Packed(codes, scales, wanted, *offsets)


def _made_by() -> str:
    """Return a hash of the code that rounds, since other code may give other numbers."""
    sources = [inspect.getsource(part) for part in (k_quants, rounding)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()
