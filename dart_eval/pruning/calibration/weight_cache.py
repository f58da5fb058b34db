"""A cache of values computed from a module's weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from dart_eval.util.machine import release

T = TypeVar("T")
ROWS = 32  # and columns of a weight, of which a cache compares the contents


class WeightCache(Generic[T]):
    """The last value computed from each module's weights, since cells and sessions ask for the same one."""

    def __init__(self) -> None:
        self._entries: weakref.WeakKeyDictionary[nn.Module, tuple[object, T]] = weakref.WeakKeyDictionary()

    def get(self, module: nn.Module, weights: Sequence[Tensor], how: object, make: Callable[[], T]) -> T:
        """Return the module's value, computed anew if its weights, their contents or `how` have changed."""
        key = how, *((w.data_ptr(), w._version, str(w.dtype)) for w in weights), sample(weights)
        entry = self._entries.get(module)
        if entry is None or entry[0] != key:
            kind = next((w.device.type for w in weights), "cpu")
            # The value outlives the user's autocast, which some devices do not know.
            with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
                self._entries[module] = entry = key, make()
            release()
        return entry[1]


def sample(weights: Iterable[Tensor]) -> bytes:
    """Return some of the bytes of weights: an edit through `.data` makes no new version.

    They are evenly spread, and one at least of each row and column, since single neurons are edited so. A device is
    waited for once.
    """
    parts: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        if weight.is_meta or type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
            continue
        some = weight.detach()[:: max(1, len(weight) // ROWS)] if weight.dim() else weight.detach()
        found = [some[..., :: max(1, some.shape[-1] // ROWS)].flatten() if weight.dim() > 1 else some]
        if weight.dim() > 1 and weight.numel():
            diagonal = torch.arange(max(weight.shape[-2:]), device=weight.device)
            crossed = weight.detach()[..., diagonal % weight.shape[-2], diagonal % weight.shape[-1]]
            found.append(crossed.flatten())
        raw = (p.reshape(-1).contiguous().view(torch.uint8) for p in found if p.numel())
        parts.setdefault(weight.device, []).extend(raw)
    return b"".join(torch.cat(p).cpu().numpy().tobytes() for p in parts.values() if p)
