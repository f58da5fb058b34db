"""Matrices in graded bits: a token reads all of a matrix in more bits where it matters more, after DP-LLM and PMPD."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dart_eval.pruning.inputs.entries import Coded, Graded
from dart_eval.pruning.part import option
from dart_eval.util.bits import LEAST, MOST

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class GradedLayers(Graded):
    """A token reads all of a matrix in its first b_high bits or its first b_low, the two `levels`.

    The read asks for b bits of a weight, scales apart. So it is high for r = (b - b_low) / (b_high - b_low) of tokens:

        norm       ||x|| > t                    DP-LLM
        error      ||(W_high - W_low) x|| > t   an upper bound: what DP-LLM estimates, known in advance
        position   among the first r * length   PMPD

    t is the quantile 1 - r over a text, one for each matrix. The mean of the bytes is met on that text, and measured on
    others. `position` meets it on texts with `length` decoded tokens, and reads more on shorter ones.

    DP-LLM (arXiv 2508.06041, its abstract; weige15/dpqaq at 8737993, others' rerun) reads high bits where slope * ||x||
    + intercept, or the norm of a random projection of x, is above a quantile. b is fine-tuned for each matrix between 3
    and 6, and the levels are the whole numbers around it; here b is the same for all, and `near` is this rule. There
    the x of an earlier layer stands for that of gate and up, which saves time. PMPD (2410.13461; SamsungLabs/PMPD at
    909cdf9) switches after some tokens, tuned by task, or where a trained scheduler says so. Its codes and those of
    DP-LLM are not on a grid.
    """

    name = "layers"
    summary = "reads all of a matrix in more bits or fewer, by the token (its read varies)"
    granularity = "bits of matrices"
    levels: Literal[
        "near", "2-3", "2-4", "2-8", "3-4", "3-5", "3-6", "4-5", "4-6", "4-8", "5-6", "6-7", "6-8", "7-8"
    ] = option("near", "low and high bits of a weight; near: the whole numbers around what the read asks for")
    group: int = option(128, "number of weights that share a scale; 0: a whole row", least=0)
    by: Literal["norm", "error", "position"] = option(
        "norm", "read high bits where the input is large, where the error of low bits is, or first in a text"
    )
    length: int = option(256, "decoded tokens over which by=position meets the read", least=1)

    @property
    def bits(self) -> list[int]:
        return [*range(LEAST, MOST + 1)] if self.levels == "near" else super().bits

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.by != "position"

    @property
    def counts_tokens(self) -> bool:  # type: ignore[override]
        return self.by == "position"

    @property
    def upper_bound(self) -> bool:  # type: ignore[override]
        return self.by == "error"

    def at(self, room: float) -> Graded:
        low = min(int(room + 1e-9), MOST - 1)
        return dataclasses.replace(self, levels=f"{low}-{low + 1}") if self.levels == "near" else self  # type: ignore[arg-type]

    def limit(self, matrix: Coded, sizes: Tensor | None) -> float:
        low, high = self.bits
        tokens = self.length if sizes is None else len(sizes)
        first = int(min(1.0, (matrix.room - low) / (high - low)) * tokens + 1e-9)
        if sizes is None:
            return first
        return float(sizes.sort(descending=True).values[first]) if first < tokens else -1.0

    def size(self, x: Tensor, matrix: Coded) -> Tensor:
        if self.by == "norm":
            return x.float().norm(dim=-1)
        low, high = (values().float() for values in matrix.values if values is not None)
        return (x.float() @ (high - low).T).norm(dim=-1)

    def level(self, x: Tensor, matrix: Coded, limit: float, position: Tensor | None) -> Tensor:
        high = self.size(x, matrix) > limit if position is None else position.to(x.device) < limit
        return high.long()[..., None].expand(x.shape)

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return 2 * (shape.layers * shape.width + mask) * (self.by != "position")  # gate and up have one input
