"""Experts in graded bits at work on a model (`by_weight.ByWeight`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.layers.experts import Routed
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.calibration.weight_cache import WeightCache
from dart_eval.pruning.choices.serving import Decoded
from dart_eval.pruning.experts.by_weight import ByWeight
from dart_eval.pruning.experts.rerouted import Rerouted, watch
from dart_eval.pruning.experts.routings import Routing, chosen
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded

Values = dict[tuple[str, int, int], Decoded]  # of a matrix, an expert and a number of bits
_CACHE: WeightCache[tuple[Values, Tensor]] = WeightCache()


def attach(
    part: Routing, sparsity: float, ffns: Sequence[FFN], calibration: Calibration | None
) -> Rerouted | GradedExperts | None:
    """Return a part attached to a model; None if nothing is left out."""
    if not isinstance(part, ByWeight):
        return Rerouted(part, ffns, part.counts(sparsity, ffns), calibration)
    return GradedExperts(part, ffns, part.token_bits(sparsity, ffns)) if sparsity else None


class GradedExperts:
    """The part attached to a model, before any prompt.

    Args:
        bits: per layer, that a token reads of its experts together.

    Attributes:
        swapped: None, as no weights change (see `attached.AttachedInputs`).
    """

    swapped = None

    @torch.no_grad()
    def __init__(self, part: ByWeight, ffns: Sequence[FFN], bits: Sequence[int]) -> None:
        self.ffns = ffns
        self.layers = {f.layer: GradedLayer(part, r, b) for f, b in zip(ffns, bits, strict=True) if (r := chosen(f))}

    def nbytes(self) -> int:
        """Return the bytes beside the model: none. Codes stand in place of the weights."""
        return 0

    def watch(self, add: Callable[[Any], None], forward: object) -> None:
        """See `rerouted.watch`."""
        watch(self.ffns, self.layers, add, forward)


class GradedLayer:
    """The experts of a layer, which tokens read in graded bits between `begin` and `end`.

    Args:
        bits: that a token reads of its experts together.
    """

    def __init__(self, part: ByWeight, routed: Routed, bits: int) -> None:
        self.part, self.routed, self.bits = part, routed, bits
        parameters = [*routed.experts.parameters()]
        self.values, self.gains = _CACHE.get(routed.up, parameters, part, lambda: _codes(part, routed))
        self.read: Tensor = torch.empty(0, routed.count, dtype=torch.long)  # [N, count] bits of each token's experts

    def begin(self) -> None:
        """Let tokens read graded bits."""
        self.routed.settle, self.routed.multiply = self.settle, self.multiply

    def end(self) -> None:
        """Let tokens read all bits."""
        self.routed.settle = self.routed.multiply = None

    def settle(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Set the bits that tokens read. index, weights: [N, count], from the router.

        Raises:
            UserError: a token has fewer experts.
        """
        if index.shape[1] != self.routed.count or bool((index < 0).any()):
            raise UserError(f"tokens of {self.routed.title} have fewer experts now and then", "take another method")
        ranked = weights if self.part.rank == "weight" else torch.ones_like(weights)
        gains = self.gains.to(weights.device)[:, None].expand(-1, index.shape[1])
        self.read = torch.tensor(self.part.bits, device=index.device)[self.part.chosen(ranked, gains, self.bits)]
        return index, weights

    def multiply(self, x: Tensor, name: str, expert: int, tokens: Tensor, places: Tensor) -> Tensor:
        """See `Routed.product`."""
        read, rows = self.read[tokens, places], getattr(self.routed.experts, name).shape
        out = x.new_zeros(len(x), rows[2 if self.routed.experts.is_transposed else 1])
        for bits in read[read > 0].unique().tolist():
            some = read == bits
            out[some] = nn.functional.linear(x[some], self.values[name, expert, bits]())
        return out


def _codes(part: ByWeight, routed: Routed) -> tuple[Values, Tensor]:
    """Return the values of experts in each number of bits, and what each step to the next level saves for a bit."""
    values, lost, everything = Values(), torch.zeros(len(part.bits)), 0.0
    for name in ("gate_up_proj" if routed.experts.has_gate else "up_proj", "down_proj"):
        weight = getattr(routed.experts, name).detach()
        weight = weight.mT if routed.experts.is_transposed else weight  # [E, out, in]
        packed = rounded(weight.reshape(-1, weight.shape[-1]), part.rounding).chunk(routed.all)
        everything += float(weight.float().square().sum())
        for expert, (own, codes) in enumerate(zip(weight, packed, strict=True)):
            for level, bits in enumerate(part.bits):
                values[name, expert, bits] = Decoded(codes, weight.dtype, bits)
                lost[level] += (own.float() - (codes.decoded(torch.float32, bits) if bits else 0)).square().sum()
    errors = 1 - (1 - lost / everything) ** (3 if routed.experts.has_gate else 2)
    return values, part.gains(errors[:, None])[:, 0]
