"""How much a neuron matters: what its activations say, and what its weights say of their effect.

The activation part is a weighted sum over tokens of |u_tj|^p, u the input of the down projection, after an optional
normalisation of every token (arXiv 2601.22632 and its public code; GRIFFIN, arXiv 2404.01365, is p = 2 with L2). The
weight part is a factor per neuron that no token changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dart_eval.errors import UserError
from dart_eval.ffn import FFN, final_norm, gain, weight_matrix

NORMALISATIONS = ("none", "l1", "l2")
SCORES = ("magnitude", "max", "mean", "combined", "product")
CHUNK_BYTES = 256 << 20  # of the projection onto the vocabulary held at a time


def energy(h: Tensor, weight: Tensor, normalise: str = "none", power: int = 2) -> Tensor:
    """sum_t weight_t (|h_tj| / ||h_t||)^power.

    Args:
        h: [B, T, F] fp32. weight: [B, T] fp32, 0 for padding.
        normalise: the norm that a token is divided by: none, l1 or l2.
        power: 2 (the score is its root, whose order is the same) or 1.

    Returns:
        [B, F] fp32.
    """
    values = h.square() if power == 2 else h.abs()
    if normalise == "l2":
        norm = values.sum(-1) if power == 2 else h.square().sum(-1).sqrt()
    elif normalise == "l1":
        norm = h.abs().sum(-1).pow(power)
    else:
        return (weight[:, None] @ values).squeeze(1)
    return ((weight / norm.clamp_min(1e-30))[:, None] @ values).squeeze(1)


def decayed(valid: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Weights of an exponential average: decay^(n - 1 - t) for the t-th of n tokens.

    Args:
        valid: [B, T] fp32, 0 for padding, which does not count as a step.

    Returns:
        [B, T] weights, and [B] decay^n, by which earlier sums shrink.
    """
    after = valid.flip(1).cumsum(1).flip(1) - valid  # tokens that follow
    return valid * decay**after, decay ** valid.sum(1)


@dataclass(frozen=True)
class Projection:
    """What each neuron of a layer writes to the vocabulary. largest, mean: [F] fp32, over |Phi_jv|."""

    largest: Tensor
    mean: Tensor

    def factor(self, score: str) -> Tensor:
        """The factor on a neuron's activation norm, [F], under a name of `SCORES`; `product` is that of two scores."""
        return {
            "max": self.largest,
            "mean": self.mean,
            "combined": self.largest + self.mean,
            "product": (self.largest * self.mean).sqrt(),
        }[score]


@torch.no_grad()
def project(model: nn.Module, ffns: Sequence[FFN]) -> list[Projection]:
    """Phi = (E diag(g) W_down)^T per layer, reduced over the vocabulary in chunks, fp32.

    E is the output head (not the input embedding, which untied models do not share), g the gains of the norms that a
    neuron's output passes on its way there: the layer's output norm, if it has one, and the final norm.

    Raises:
        UserError: the model projects its last hidden states before the output head.
    """
    head = weight_matrix(model.get_output_embeddings())  # type: ignore[operator]
    width = ffns[0].width
    if head.shape[1] != width:
        raise UserError(
            f"the output head of {type(model).__name__} reads {head.shape[1]} features, its layers have {width}",
            "use score=magnitude",
        )
    last = gain(final_norm(model), width)
    found = []
    for ffn in ffns:
        down = ffn.output_weight().float()  # [D, F]
        own = gain(ffn.output, width) if ffn.output is not ffn.down else torch.ones(width)
        down = down * (own * last * ffn.scale).to(down.device)[:, None]
        largest = torch.zeros(ffn.size, device=down.device)
        total = torch.zeros(ffn.size, device=down.device)
        rows = max(1, CHUNK_BYTES // (4 * ffn.size))
        for part in head.split(rows):
            phi = (part.to(down.device).float() @ down).abs_()  # [v, F]
            largest = torch.maximum(largest, phi.amax(0))
            total += phi.sum(0)
        found.append(Projection(largest, total / head.shape[0]))
    return found


def down_norms(ffns: Sequence[FFN]) -> list[Tensor]:
    """Per layer [F] fp32: the squared norm of each neuron's down column, a factor on its energy."""
    return [ffn.output_weight().float().square().sum(0) for ffn in ffns]
