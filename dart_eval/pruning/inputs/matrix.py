"""The codes of one matrix under `grinqh` and its like, and products with the bits that a token reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.pruning.calibration.code_cache import codes_of
from dart_eval.pruning.inputs.columns import GradedColumns
from dart_eval.util.bits import OWN_BITS
from dart_eval.weights.decoded import Decoded


class GradedMatrix:
    """A matrix of which tokens read first bits.

    Args:
        part: the rule. weight: [out, n]. bias: [out]; None. share: of the bytes of 16-bit weights, which a token reads.
        down: whether its inputs are neurons.

    Attributes:
        rows, width: its outputs, and n, its inputs.
        limit: bits of codes that a token may read of a row.
        values: of each level's first bits, [out, n]; None for 0 bits.
        gains: what each step to the next level saves for a bit (`Levels.gains`).
    """

    def __init__(self, part: GradedColumns, weight: Tensor, bias: Tensor | None, share: float, down: bool) -> None:
        self.part, self.bias, (self.rows, self.width) = part, bias, weight.shape
        part.check_read(share, self.rows, self.width)
        self.scale = part.scale(self.width)
        room = OWN_BITS * share - self.scale
        self.limit = part.limit(self.width, room if down else part.first_look(room))
        self.packed = codes_of(weight, part.rounding)
        self.values = [Decoded(self.packed, weight.dtype, bits) if bits else None for bits in part.bits]
        self.gains = part.fit(weight, self.packed)

    def whole(self, x: Tensor) -> Tensor:
        """Return the product with all bits of the codes, [..., out]. x: [..., n]."""
        values = self.values[-1]
        assert values is not None
        return nn.functional.linear(x, values(), self.bias)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product, [..., out], and the level of each column, [..., n] long. x: [..., n]."""
        chosen = self.part.chosen(x, self.gains, self.limit)
        return self.product(x, chosen), chosen

    def product(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the product, [..., out]. chosen: [..., n], the level of each column."""
        out: Any = 0.0
        for level, values in enumerate(self.values):
            if values is not None:
                product = nn.functional.linear(x * (chosen == level), values())
                out = out + product.to(torch.promote_types(product.dtype, torch.float32))
        made: Tensor = out if self.bias is None else out + self.bias
        return made

    def row_bits(self, chosen: Tensor) -> Tensor:
        """Return the bits that a row takes, [...] fp64. chosen: [..., n], the level of each column."""
        bits = torch.tensor(self.part.bits, device=chosen.device)[chosen].sum(-1, dtype=torch.float64)
        return bits + self.width * self.scale
