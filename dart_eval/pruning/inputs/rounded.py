"""Rounded weights for decoded tokens alone: a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dart_eval.pruning.inputs.entries import Entries
from dart_eval.pruning.part import option
from dart_eval.util.bits import LAST_BITS, OWN_BITS, Rounding, parse
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.util.bits import Stored


@dataclass(frozen=True, kw_only=True)
class RoundedEntries(Entries):
    """Decoded tokens read rounded weights, and prompts the weights as they are.

    A control. It spares prompts, as a pruner does; with `--ffn-bits` prompts run on rounded weights, too.
    """

    name = "rounded"
    summary = "reads rounded weights for decoded tokens, and the original weights for prompts"
    granularity = LAST_BITS
    sized = False
    bits: Literal["3", "4", "5", "6", "8", "q3_k", "q4_k", "q5_k"] = option(
        "q4_k", "bits or format of the rounded weights, as in `--ffn-bits`"
    )

    @property
    def _rounding(self) -> Rounding:
        rounding = parse(self.bits)
        assert rounding is not None
        return rounding

    def check_bits(self, bits: Stored) -> None:
        if bits.code != OWN_BITS:
            raise UserError(
                f"what is rounded are 16-bit weights, and these have {bits.total:.3g} bits",
                "leave --ffn-bits out, or load the model unquantised",
            )

    def bytes_read(self, density: float, bits: Stored, rows: int, width: int) -> float:
        return self._rounding.weight_bits(width) / OWN_BITS

    def multiplied(self, read: float) -> float:
        return 1.0

    def as_read(self, weight: Tensor) -> Tensor:
        """Return [out, n], the matrix that decoded tokens read. weight: [out, n]."""
        from dart_eval.weights.rounding import rounded

        return rounded(weight, self._rounding).values.to(weight.dtype)
