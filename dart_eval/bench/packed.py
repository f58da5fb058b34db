"""Rounded FFN weights in products of few bits, so that rounding as a control has its real speed too.

Our own kernel for CPUs runs FFNs of 4, 5, 6 and 8 bits in groups of 128 or a row (`kernels.cpu`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from dart_eval.bench.decode import Bench, Times
from dart_eval.bench.dense_copy import own_bytes, twin
from dart_eval.kernels.cpu import packing
from dart_eval.kernels.cpu.ffns import CodedFFN
from dart_eval.kernels.fast import WholeFFN, act_of, why_not_whole
from dart_eval.kernels.mask_rows import swapped
from dart_eval.layers.find import find_ffns
from dart_eval.layers.projection import plain_matrix
from dart_eval.layers.shape import shape_of
from dart_eval.results.ratio import Ratio, paired
from dart_eval.util.bits import OWN_BITS, Rounding
from dart_eval.util.errors import UserError
from dart_eval.util.machine import foreign_cpu
from dart_eval.weights.rounding import rounded, served_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


REMEDY = "use 4:128, 5:128, 6:128 or 8:128"


@dataclass(frozen=True)
class RoundedSpeed:
    """The dense model on rounded FFN weights; times as ratios to the model's own.

    Attributes:
        bits: as a user types them. read: FFN weight bytes / those of the model's own dtype.
        speedup: dense step / rounded step. control: dense step / dense step.
        over_kernel: step of the dense model in our own product / rounded step; None where there is none.
        ceiling: the most that the bytes of this model allow. achieved_over_ceiling: see `decode.DecodeSpeed`.
        dense_tokens_per_second, tokens_per_second: for orientation.
        foreign_cores: processors that other processes kept busy meanwhile, on average (None: not known here).
        twin_bytes: of the FFN weights that the dense side has once more.
    """

    bits: str
    read: float
    speedup: Ratio
    control: Ratio
    over_kernel: Ratio | None
    ceiling: float
    achieved_over_ceiling: float
    dense_tokens_per_second: float
    tokens_per_second: float
    foreign_cores: float | None
    twin_bytes: int


def share(model: nn.Module, rounding: Rounding) -> float:
    """Return bytes of a model's rounded FFN weights / those of its own dtype; scales count, row by row."""
    return served_bits(find_ffns(model), rounding) / OWN_BITS


def why_no_kernel(model: nn.Module, rounding: Rounding) -> str | None:
    """Return why our kernel does not run a model's FFNs on rounded weights, or None."""
    ffns = find_ffns(model)
    if any(f.routed for f in ffns):
        return "experts have no packed products here"
    reasons = (packing.why_no_kernel(rounding, width) for f in ffns for width in (f.width, f.size))
    return next(filter(None, reasons), None) or next(filter(None, map(why_not_whole, ffns)), None)


@contextmanager
def packed_ffns(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """Run a model's FFNs on rounded weights inside the block: single tokens, while prompts run on the model's own.

    Raises:
        UserError: no kernel runs them (`why_no_kernel`), or the weights are quantised.
    """
    if reason := why_no_kernel(model, rounding):
        raise UserError(reason, f"take a dense model, and {REMEDY}")
    kernels = []
    for ffn in find_ffns(model):
        gate, up, down = (rounded(plain_matrix(m), rounding) for m in ffn.projections)
        kernels.append(WholeFFN(ffn, CodedFFN(gate, up, down, act_of(ffn) or "")))
    with swapped(kernels):
        yield


@torch.no_grad()
def measure(
    model: PreTrainedModel, rounding: Rounding, *, prompt_tokens: int = 128, steps: int = 30, rounds: int = 3
) -> RoundedSpeed:
    """Time the dense model on rounded FFN weights, on one sequence of random tokens, beside itself unrounded.

    Args:
        prompt_tokens: the length of each round's prompt. steps: the tokens decoded in each round.
        rounds: how many rounds are timed, after one that warms up.

    Raises:
        UserError: see `packed_ffns`.
    """
    ffns = find_ffns(model)
    shape = shape_of(model, ffns)
    bench, times = Bench(model, twin(model)), Times()
    with foreign_cpu() as foreign, packed_ffns(model, rounding):
        bench.rounds(None, times, prompt_tokens, steps, rounds)
    read = share(model, rounding)
    dense, again, ours = (times.steps[name] for name in ("dense", "again", "pruned"))
    speedup, ceiling = paired(dense, ours), 1 / (1 - shape.ffn_share * (1 - read))
    over_kernel = paired(kernel, ours) if (kernel := times.steps["kernel"]) else None
    return RoundedSpeed(
        bits=rounding.text, read=read, speedup=speedup, control=paired(dense, again), ceiling=ceiling,
        over_kernel=over_kernel,
        achieved_over_ceiling=(over_kernel or speedup).median / ceiling,
        dense_tokens_per_second=1 / sorted(dense)[len(dense) // 2],
        tokens_per_second=1 / sorted(ours)[len(ours) // 2], foreign_cores=foreign(), twin_bytes=own_bytes(model),
    )  # fmt: skip
