"""Projections of neurons onto the vocabulary: factors on scores that no token changes (arXiv 2601.22632's code)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dart_eval.layers.families import final_norm
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import weight_matrix
from dart_eval.util.errors import UserError

CHUNK_BYTES = 256 << 20  # of the projection onto the vocabulary held at a time


@dataclass(frozen=True)
class Projection:
    """Logits that each neuron of a layer writes: largest and mean |Phi_jv|, [F] fp32 each."""

    largest: Tensor
    mean: Tensor

    def factor(self, kind: str) -> Tensor:
        """Return the factor on an activation norm, [F]: `max`, `mean`, `combined` or `product` (of two scores)."""
        return {
            "max": self.largest,
            "mean": self.mean,
            "combined": self.largest + self.mean,
            "product": (self.largest * self.mean).sqrt(),
        }[kind]


@torch.no_grad()
def project(model: nn.Module, ffns: Sequence[FFN]) -> list[Projection]:
    """Compute Phi = (E diag(g) W_down)^T per layer, reduced over the vocabulary in chunks, fp32.

    E is the output head (not the input embedding, which untied models do not share). g are the gains of the norms
    between a neuron's output and the head: the layer's output norm, if it has one, and the final norm.

    Raises:
        UserError: the model projects its last hidden states before the output head.
    """
    head = weight_matrix(model.get_output_embeddings())  # type: ignore[operator]
    width = ffns[0].width
    if head.shape[1] != width:
        raise UserError(
            f"the output head of {type(model).__name__} reads {head.shape[1]} features, its layers have {width}",
            "use score.vocabulary=none",
        )
    last = gain(final_norm(model), width)
    projections = []
    for ffn in ffns:
        down = ffn.output_weight().float()  # [D, F]
        own = gain(ffn.output, width) if ffn.output is not ffn.down else torch.ones(width)
        down = down * (own * last * ffn.scale).to(down.device)[:, None]
        largest = torch.zeros(ffn.pool, device=down.device)
        total = torch.zeros(ffn.pool, device=down.device)
        rows = max(1, CHUNK_BYTES // (4 * ffn.pool))
        for part in head.split(rows):
            phi = (part.to(down.device).float() @ down).abs_()  # [v, F]
            largest = torch.maximum(largest, phi.amax(0))
            total += phi.sum(0)
        projections.append(Projection(largest, total / head.shape[0]))
    return projections


def gain(norm: nn.Module | None, width: int) -> Tensor:
    """Return [D] fp32 the elementwise factor of a norm, from its response to +1, -1, +1 ... (ones without a norm).

    That vector has mean 0 and mean square 1, so that RMS and layer norms alike respond with their factor alone.
    """
    if norm is None:
        return torch.ones(width)
    weight = next(norm.parameters(), None)
    probe = 1.0 - 2.0 * (torch.arange(width) % 2).float()
    x = probe if weight is None else probe.to(weight.device, weight.dtype)
    with torch.no_grad():
        return ((norm(x) - norm(-x)) / 2).float().cpu() * probe
