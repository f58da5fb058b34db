"""Methods that some FFNs do not allow: experts, those with a norm of their neurons, those that run several times."""

from __future__ import annotations

from collections.abc import Sequence

from dart_eval.layers.ffn import FFN
from dart_eval.pruning.masks.allocations import Allocation
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.part import Part
from dart_eval.util.bits import Stored
from dart_eval.util.errors import UserError


def anywhere(method: Pruner) -> bool:
    """Whether a method fits all FFNs that run once for a token, whatever they are, at any sparsity."""
    fits_all_layers = type(method.allocation).check_sparsity is Allocation.check_sparsity
    if method.reads_most or not fits_all_layers:
        return False
    return not method.prunes or (_not_for_experts(method) is None and _needs_own_part(method) is None)


def check_fit(method: Pruner, ffns: Sequence[FFN], sparsity: float, bits: Stored | None = None) -> None:
    """Refuse a method that does not fit a model's FFNs, or a sparsity that they cannot meet.

    Args:
        bits: bits of a served weight. If given, also check that the method takes such weights, and that
            the bytes read before the choice leave room at this sparsity.

    Raises:
        UserError: names the part and what it does not fit.
    """
    if not method.prunes:
        return
    method.allocation.check_sparsity(sparsity, [*method.allocation.sizes(ffns).values()])
    if any(f.routed for f in ffns) and (part := _not_for_experts(method)) is not None:
        raise UserError(f"{part.title} is not made for experts yet", "take another method, or a dense model")
    if any(f.norm is not None for f in ffns):
        _refuse(_needs_own_part(method), "an FFN that has a norm of its neurons before down")
    if method.allocation.needs_change and (unknown := [f.number for f in ffns if not f.adds]):
        raise UserError(
            f"{method.allocation.title} does not fit this model: layer {unknown[0]} does more than add its FFN's "
            "output to the stream that enters it",
            "use allocation=uniform",
        )
    if any(f.runs > 1 for f in ffns):
        _refuse(_counts_runs(method, ffns, sparsity), "layers that run several times for a token")
    if bits is not None:
        method.check_bits(bits)
        method.check_reach(sparsity, [f.size for f in ffns], ffns[0].width, ffns[0].matrices)


def _refuse(part: str | None, what: str) -> None:
    if part is not None:
        raise UserError(f"{part} does not fit {what}", "take another method, such as griffin")


def _not_for_experts(method: Pruner) -> Part | None:
    """Return the part that does not support routed experts, which differ from token to token."""
    return next((part for part in method.parts() if not part.fits_experts), None)


def _inner_first(method: Pruner) -> list[Part]:
    """Return the parts in the order in which messages name them."""
    return [method.compensation, method.mask.remask, *method.parts()]


def _needs_own_part(method: Pruner) -> str | None:
    """Return the part that needs each neuron's own contribution, which a norm over all neurons destroys."""
    return next((part.title for part in _inner_first(method) if not part.fits_norms), None)


def _counts_runs(method: Pruner, ffns: Sequence[FFN], sparsity: float) -> str | None:
    """Return the part that would count a token once per run of a layer, or that weighs all layers alike."""
    allocation = method.allocation
    varies = allocation.needs_change or allocation.needs_scores
    if part := next((part for part in _inner_first(method) if not part.fits_repeats), None):
        return part.title
    uneven = varies or len(set(allocation.of_ffns(sparsity, ffns))) > 1
    return allocation.title if uneven else None
