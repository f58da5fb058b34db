"""Experts in graded bits: a token reads more bits of the experts with larger router weights, after D2MoE and HOBBIT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dart_eval.pruning.experts.routings import Routing, chosen
from dart_eval.pruning.inputs.levels import TOLERANCE, Levels
from dart_eval.pruning.part import option
from dart_eval.util.bits import OWN_BITS

if TYPE_CHECKING:
    from dart_eval.layers.ffn import FFN


@dataclass(frozen=True, kw_only=True)
class ByWeight(Levels, Routing):
    """A token reads the first b_e bits of its routed expert e: more bits where the router's weight g_e is larger.

    The bits b_e, each one of `levels`, make the expected squared error of the experts' outputs small:

        sum_e g_e^2 E(b_e),   E(b) = 1 - (1 - ||W - W(b)||^2 / ||W||^2)^m,   sum_e b_e = bits

    W are all weights of the layer's experts, and m is the number of an expert's matrices, whose errors add up: E(0) is
    1, an expert that is not read. Steps from level to level have one number of bits, and are taken in the order of the
    error that they save, ties in the router's order. So every token reads the same number of bits, in every layer. What
    the sparsity leaves is spread evenly over the layers, in whole steps, and is never exceeded. Scales are always read.

    Shared experts and dense layers are read whole, as under `fewer`: the routed experts bear all of the sparsity.
    Biases are read, and prompts read the weights as they are. Codes are of 16-bit weights.

    D2MoE (arXiv 2504.15299) nests the codes of an expert's bit widths and picks a width for each token and expert.
    HOBBIT (2411.01433) reads experts with small gate weights from a low-precision copy, and skips the smallest:
    `levels=0-4-8` is near it. Both set thresholds, so that tokens read different numbers of bytes. `rank=none` is
    the control: all experts of a token in the same bits, as far as the steps allow.
    """

    name = "by-weight"
    summary = "reads more bits of the experts with larger router weights, equally many for every token"
    sized = True
    granularity = "bits of experts"
    levels: Literal["0-1-2-3-4-5-6-7-8", "2-3-4-5-6-7-8", "0-2-4-6-8", "0-4-8", "2-4", "2-8", "4-8", "0-8"] = option(
        "0-1-2-3-4-5-6-7-8", "bits in which an expert may be read; the last number is a code's bits"
    )
    group: int = option(128, "number of weights that share a scale; 0: a whole row", least=0)
    rank: Literal["weight", "none"] = option("weight", "rank experts by the router's weight, or not at all")

    def check_experts(self, sparsity: float, ffns: Sequence[FFN]) -> None:
        super().check_experts(sparsity, ffns)
        everything = sum(f.size for f in ffns)
        least, most = (
            sum(f.size * self._share(f, bits) for f in ffns) / everything for bits in (self.bits[0], self.bits[-1])
        )
        if sparsity and not least - 1e-9 <= 1 - sparsity <= most + TOLERANCE:
            raise self.out_of_reach(least, most, 1 - sparsity)

    def token_bits(self, sparsity: float, ffns: Sequence[FFN]) -> list[int]:
        """Return [L] bits b_e that a token reads of its experts together; 0 in layers without experts."""
        self.check_experts(sparsity, ffns)
        everything, routed = sum(f.size for f in ffns), sum(f.size for f in ffns if chosen(f))
        share = 1 - sparsity * everything / routed  # of the routed experts' bytes
        step = self.bits[1] - self.bits[0]
        rest, bits = 0.0, []  # rest: bits of columns of neurons
        for ffn in ffns:
            if (experts := chosen(ffn)) is None:
                bits.append(0)
                continue
            rest += ffn.size * (OWN_BITS * share - self._scale(ffn) - self.bits[0])
            steps = min(experts.count * (len(self.bits) - 1), math.floor(rest / (step * experts.inner) + 1e-9))
            rest -= steps * step * experts.inner
            bits.append(self.bits[0] * experts.count + step * steps)
        return bits

    def shares(self, sparsity: float, ffns: Sequence[FFN]) -> list[float]:
        if not sparsity:
            return [1.0] * len(ffns)
        bits = zip(ffns, self.token_bits(sparsity, ffns), strict=True)
        return [self._share(f, b / r.count if (r := chosen(f)) else 0) for f, b in bits]

    def _share(self, ffn: FFN, bits: float) -> float:
        """Return the share of its bytes that a token reads of a layer. bits: of a code, mean over the experts."""
        return (bits + self._scale(ffn)) / OWN_BITS if chosen(ffn) else 1.0

    def _scale(self, ffn: FFN) -> float:
        """Return the bits of scales per weight of a layer's experts."""
        into, down = self.scale(ffn.width), self.scale(ffn.routed.inner if ffn.routed else ffn.size)
        return ((ffn.matrices - 1) * into + down) / ffn.matrices
