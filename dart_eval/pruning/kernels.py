"""Which methods have kernels that make bytes into time, on which models, and why others have none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dart_eval.ffn import FFN, device_of, is_conv1d
from dart_eval.pruning import gather
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.parts.base import Part
from dart_eval.pruning.permuted import quantised, shared


def unmade(method: Pruner) -> Part | None:
    """The part of a method whose work no kernel does, so that it runs by masks alone; None where there is none."""
    if method.compensation.fills:  # what a token leaves out is still multiplied
        return method.compensation
    if method.entries.finer:
        return method.entries
    return method.choice if method.choice.image is not None else None


def gathers(method: Pruner, ffns: Sequence[FFN]) -> bool:
    """Whether a token's choice can save time: of gated FFNs, on a CPU or by Triton's kernels."""
    return (
        method.choice.gathers
        and not method.mask.remask.dense_tokens
        and all(f.gate is not None and not is_conv1d(f.down) for f in ffns)
        and all(device_of(f).type == "cpu" or gather.missing(device_of(f)) is None for f in ffns)
    )


def lacking(method: Pruner, ffns: Sequence[FFN], model: nn.Module) -> str | None:
    """Why one sequence decodes no faster under a method, though it reads less; None where it can be faster.

    Args:
        method: one that prunes. ffns: of the model.
    """
    if part := unmade(method):
        return f"{part.title} has no kernels here"
    if reason := quantised(ffns) or shared(ffns, model):
        return reason
    if method.mask.whole and not gathers(method, ffns):
        return f"no kernel here reads only the rows that {method.choice.title} takes"
    return None
