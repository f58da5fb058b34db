"""Rounded weights for decoded tokens alone: a control. It spares prompts, as a pruner does.

With `--ffn-bits` prompts run on rounded weights, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import bias_of, is_conv1d, plain_matrix
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.method import Method, option
from dart_eval.pruning.rows import nbytes
from dart_eval.util.bits import LAST_BITS, OWN_BITS, Stored, parse
from dart_eval.weights.rounding import rounded

if TYPE_CHECKING:
    from dart_eval.pruning.session import Session


class RoundedWeights(Method):
    """Decoded tokens read rounded weights, and prompts the weights as they are."""

    name = "rounding"
    summary = "rounds the weights of decoded tokens; prompts read the original ones (control)"
    recorded: ClassVar = {"allocation": "uniform", "entries": "rounded"}
    granularity = LAST_BITS
    sized = False
    fits_experts = False
    fits_norms = False
    fits_repeats = False
    entries_bits: Literal["3", "4", "5", "6", "8", "q3_k", "q4_k", "q5_k"] = option(
        "q4_k", "bits or format of the rounded weights, as in `--ffn-bits`"
    )

    def check(self, ffns: Sequence[FFN], sparsity: float, bits: Stored | None = None) -> None:
        super().check(ffns, sparsity, bits)
        self.refuse_codes(ffns, bits, "what is rounded are 16-bit weights")

    @torch.no_grad()
    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        wanted = parse(self.entries_bits)
        assert wanted is not None
        bits = sum(f.size * ((f.matrices - 1) * wanted.weight_bits(f.width) + wanted.weight_bits(f.size)) for f in ffns)
        self.fixed_read = bits / OWN_BITS / (ffns[0].matrices * sum(f.size for f in ffns))
        self.values: dict[nn.Module, Tensor] = {}  # [out, n] of each projection, as decoded tokens read it
        for module in (m for f in ffns for m in f.projections):
            matrix = plain_matrix(module)
            self.values[module] = rounded(matrix, wanted).decoded(matrix.dtype)

    def forwards(self, session: Session) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        return {module: self._rounded(session, module, values) for module, values in self.values.items()}

    def _rounded(self, session: Session, module: nn.Module, values: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what a projection computes in place of its product."""
        own, bias = module.forward, bias_of(module)
        stored = values.T.contiguous() if is_conv1d(module) else values

        def forward(x: Tensor) -> Tensor:
            if session.phase != "decode":
                return own(x)
            if bias is None or not is_conv1d(module):
                return nn.functional.linear(x, values, bias)
            return torch.addmm(bias, x.view(-1, x.shape[-1]), stored).view(*x.shape[:-1], -1)  # as the module itself

        return forward

    def weight_bytes(self, fast: bool) -> int:
        return nbytes(self.values)

    def computed(self, read: float) -> float:
        return 1.0
