"""Caches of slow computations on a model: on disk statistics and codes, in memory what follows from a module's weights.

On disk, each has a file, named by a hash of all that it depends on: model, served weights, text, passages, code. A file
holds a digest of its tensors and is replaced if the digest does not match. All files may be deleted at will.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dart_eval.util.bits import Rounding
from dart_eval.util.files import cache_dir, write_atomically
from dart_eval.util.machine import release
from dart_eval.weights import k_quants, rounding
from dart_eval.weights.codes import Packed
from dart_eval.weights.rounding import rounded

log = logging.getLogger(__name__)
LARGE = 1 << 20  # weights of a matrix whose codes are cached
T = TypeVar("T")
ROWS = 32  # and columns of a weight, of which a cache compares the contents


def folder() -> Path:
    """Return the folder of statistics, beside the demo model."""
    return cache_dir() / "calibration"


@dataclass(frozen=True)
class StatsCache:
    """The cache of one model.

    Attributes:
        about: plain data that identifies the model.
        kind: name of the folder; None for statistics.
        within: the folder that it lies in; None: that of the user's caches.
    """

    about: Mapping[str, object]
    kind: str | None = None
    within: Path | None = None

    def _path(self, of: Mapping[str, object]) -> Path:
        key = json.dumps([dict(self.about), dict(of)], sort_keys=True)
        place = folder() if self.kind is None else (self.within or folder().parent) / self.kind
        return place / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, of: Mapping[str, object]) -> list[Tensor] | None:
        """Return cached tensors; None if there are none or they are damaged. of: identifies the statistic."""
        path = self._path(of)
        try:
            with safe_open(path, "pt") as file:
                digest = (file.metadata() or {}).get("digest")
                tensors = [file.get_tensor(f"{i}") for i in range(len(file.keys()))]
        except (OSError, SafetensorError) as error:
            if path.exists():
                log.warning("%s is damaged (%s): made anew", path, error)
            return None
        if digest != _digest(tensors):
            log.warning("%s is damaged: made anew", path)
            return None
        return tensors

    def put(self, of: Mapping[str, object], tensors: list[Tensor]) -> None:
        """Store tensors, if the cache can be written. tensors: on the CPU."""
        path = self._path(of)
        named = {f"{i}": tensor.contiguous() for i, tensor in enumerate(tensors)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(named, {"digest": _digest(tensors)}))
        except OSError as error:
            log.debug("%s cannot be written: %s", path, error)


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()


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
