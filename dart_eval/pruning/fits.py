"""Methods that some FFNs do not allow: those with a norm of their neurons, and those that run several times a token."""

from __future__ import annotations

from collections.abc import Sequence

from dart_eval.errors import UserError
from dart_eval.ffn import FFN
from dart_eval.pruning.method import Pruner


def check(method: Pruner, ffns: Sequence[FFN], sparsity: float) -> None:
    """Refuse a method that does not fit a model's FFNs.

    Raises:
        UserError: with the part, and what it does not fit.
    """
    if not method.prunes:
        return
    if any(f.norm is not None for f in ffns):
        _refuse(_needs_own_part(method), "an FFN that has a norm of its neurons before down")
    if any(f.runs > 1 for f in ffns):
        _refuse(_counts_runs(method, len(ffns), sparsity), "layers that run several times for a token")


def _refuse(part: str | None, what: str) -> None:
    if part is not None:
        raise UserError(f"{part} does not fit {what}", "take another method, such as griffin")


def _needs_own_part(method: Pruner) -> str | None:
    """The part that needs a neuron's own part of what an FFN adds, which is not there behind a norm of all neurons."""
    wanted = [
        (method.compensation, method.compensation.adds), (method.choice, method.choice.grades),
        (method.entries, method.entries.finer),
    ]  # fmt: skip
    return next((part.title for part, needed in wanted if needed), None)


def _counts_runs(method: Pruner, layers: int, sparsity: float) -> str | None:
    """The part that would count a token once for each run of a layer, or gives layers that run more often the weight
    of others."""
    remask, allocation = method.mask.remask, method.allocation
    varies = allocation.needs_change or allocation.needs_scores
    wanted = [
        (method.compensation, method.compensation.adds or method.compensation.fills),
        (remask, remask.watches or remask.needs_ring), (method.entries, method.entries.finer),
        (method.choice, not method.exact),
        (allocation, varies or len(set(allocation.densities(sparsity, layers, None, slice(None)))) > 1),
    ]  # fmt: skip
    return next((part.title for part, needed in wanted if needed), None)
