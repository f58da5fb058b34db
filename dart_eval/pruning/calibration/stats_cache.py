"""A cache on disk of slow computations on a model: calibration statistics, weights as integer codes.

Each has a file, named by a hash of all that it depends on: model, served weights, text, passages, code. A file holds a
digest of its tensors and is replaced if the digest does not match. All files may be deleted at will.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dart_eval.util.files import cache_dir, write_atomically

log = logging.getLogger(__name__)


def folder() -> Path:
    """Return the folder of statistics, beside the demo model."""
    return cache_dir() / "calibration"


@dataclass(frozen=True)
class StatsCache:
    """The cache of one model.

    Attributes:
        about: plain data that identifies the model.
        kind: name of the folder; None for statistics.
    """

    about: Mapping[str, object]
    kind: str | None = None

    def _path(self, of: Mapping[str, object]) -> Path:
        key = json.dumps([dict(self.about), dict(of)], sort_keys=True)
        place = folder() if self.kind is None else folder().with_name(self.kind)
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
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
