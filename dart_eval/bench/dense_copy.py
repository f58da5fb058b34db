"""The dense side of a benchmark: the model as it is outside `prune()`, in the same process as the pruned one."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from dart_eval.kernels.mask_rows import RowCopies
from dart_eval.layers.find import find_ffns
from dart_eval.util.errors import UserError, out_of_memory

M = TypeVar("M", bound=nn.Module)


def twin(model: M) -> M:
    """A second model whose FFN projections have copies of their own; every other parameter and buffer is shared.

    Under `prune()` the neurons stand in another order and down in another layout, which has products of its own: a
    forward there without hooks is dense, and yet not the model that a user runs without `prune()`. The twin is, bit for
    bit, for as long as the other one is changed.

    Raises:
        UserError: the memory does not hold the copies.
    """
    own = {id(t) for module in _projections(model) for t in [*module.parameters(), *module.buffers()]}
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()] if id(t) not in own}
    try:
        return copy.deepcopy(model, shared)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            "the memory does not hold a second copy of the FFN weights, which the dense side is timed on",
            "give a smaller model, or --shape with fewer --layers",
        ) from None


def by_kernel(model: nn.Module) -> list[RowCopies] | None:
    """The FFNs of a dense model in our own product: the yardstick for other kernels. None where there is none."""
    rows = [RowCopies(ffn) for ffn in find_ffns(model)]
    return rows if all(one.linked for one in rows) else None


def own_bytes(model: nn.Module) -> int:
    """Bytes of the FFN projections of a model: what its twin takes beside it."""
    tensors = {id(t): t for module in _projections(model) for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _projections(model: nn.Module) -> list[nn.Module]:
    return [module for f in find_ffns(model) for module in f.projections]
