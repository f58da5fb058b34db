"""Experts in graded bits at work on a model (`by_weight.ByWeight`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dart_eval.layers.experts import Routed
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.calibration.weight_cache import WeightCache
from dart_eval.pruning.choices.serving import Decoded
from dart_eval.pruning.experts.by_weight import ByWeight
from dart_eval.pruning.experts.rerouted import Ordered, rerouted
from dart_eval.pruning.experts.routings import Routing, chosen
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded

Values = dict[tuple[str, int, int], Decoded]  # of a matrix, an expert and a number of bits
_CACHE: WeightCache[tuple[Values, Tensor]] = WeightCache()


def attach(part: Routing, sparsity: float, ffns: Sequence[FFN], calibration: Calibration | None) -> Ordered | None:
    """Return a part attached to a model; None if nothing is left out."""
    if not isinstance(part, ByWeight):
        return rerouted(part, sparsity, ffns, calibration)
    if not sparsity:
        return None
    bits = zip(ffns, part.token_bits(sparsity, ffns), strict=True)
    return Ordered(ffns, {f.layer: GradedLayer(part, r, b) for f, b in bits if (r := chosen(f))})


class GradedLayer:
    """The experts of a layer, which tokens read in graded bits between `begin` and `end` (see `Ordered`).

    Args:
        bits: that a token reads of its experts together.

    Attributes:
        read: [N, count], bits of the experts of the current tokens.
    """

    available = None  # nothing beside the model: codes stand in place of the weights

    @torch.no_grad()
    def __init__(self, part: ByWeight, routed: Routed, bits: int) -> None:
        self.part, self.routed, self.bits = part, routed, bits
        held = [*routed.experts.parameters()]
        self.values, self.gains = _CACHE.get(routed.up, held, part, lambda: _codes(part, routed))
        self.read = torch.empty(0, routed.count, dtype=torch.long)

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
        self.read = torch.tensor(self.part.bits, device=index.device)[self.part.chosen(ranked, self.gains, self.bits)]
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
                off = own.float() - (codes.decoded(torch.float32, bits) if bits else 0)
                lost[level] += float(off.square().sum())
    errors = 1 - (1 - lost / everything) ** (3 if routed.experts.has_gate else 2)
    return values, part.gains(errors)
