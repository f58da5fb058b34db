"""How much the FFN of every layer changes the stream, on the tokens of a context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dart_eval.pruning.session.sequence import PerSequence

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN


class ChangeState(PerSequence):
    """How much each layer's FFN changes the residual stream, summed over the context's tokens of B sequences.

    Attributes:
        numbers: the decoder layer of each FFN.
    """

    def __init__(self, batch: int, ffns: Sequence[FFN], residual: bool) -> None:
        import torch

        layers, self.residual = len(ffns), residual
        self.numbers = tuple(f.number for f in ffns)
        self.tokens = torch.zeros(batch)
        self.cosine = torch.zeros(batch, layers)  # sum over tokens of cos(y, z), on the CPU
        self.change = torch.zeros(batch, layers)  # sum over tokens of ||z - y|| / ||y||

    def observe(self, layer: int, y: Tensor, added: Tensor, valid: Tensor) -> None:
        """Add a layer's tokens. y: the stream that enters the FFN; added: the FFN's output, both [B, T, D]."""
        import torch
        from torch.nn.functional import cosine_similarity

        y, z, valid = y.float(), added.float(), valid.to(y.device)
        if self.residual:
            z = y + z
        cosine = cosine_similarity(y, z, dim=-1)
        change = (z - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-12)
        self.cosine[:, layer] += torch.where(valid, cosine, 0).sum(1).cpu()
        self.change[:, layer] += torch.where(valid, change, 0).sum(1).cpu()

    def finish(self, valid: Tensor) -> None:
        """Close a context forward whose real tokens were `valid` ([B, T] bool)."""
        self.tokens += valid.sum(1).cpu()

    def sensitivity(self, rows: slice, magnitude: bool = True) -> list[float]:
        """S_l = (1 - mean cos(y, z)) * mean(||z - y|| / ||y||) of every layer, over the tokens of these sequences.

        Without `magnitude` the first factor alone.
        """
        n = max(float(self.tokens[rows].sum()), 1.0)
        turn = 1 - self.cosine[rows].sum(0) / n
        return (turn * (self.change[rows].sum(0) / n) if magnitude else turn).tolist()
