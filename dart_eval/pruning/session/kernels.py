"""The kernels that save time: which methods have them, on which models, and why others have none."""

from __future__ import annotations

from collections.abc import Sequence

from dart_eval.kernels.mask_rows import unlike_plain
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.part import Part


def without_kernel(method: Pruner, ffns: Sequence[FFN]) -> Part | None:
    """Return the part of a method that has no kernel, so that the method runs by masks; None if all parts have one."""
    if method.other is not None and (unlike_plain(ffns) or _lacking(method.other, ffns)):
        return method.other
    return None


def _lacking(part: Part, ffns: Sequence[FFN]) -> str | None:
    """Return why no kernel runs a part on all FFNs, or None."""
    return next(filter(None, map(part.lacking, ffns)), None)


def lacking(method: Pruner, ffns: Sequence[FFN]) -> str | None:
    """Return why one sequence decodes no faster under a pruning method; None if it can be faster."""
    if reason := unlike_plain(ffns):
        return reason
    if part := without_kernel(method, ffns):
        return _lacking(part, ffns)
    if method.mask.holds_all and method.other is None:
        return f"no kernel reads only the rows that {method.choice.title} chooses"
    return None
