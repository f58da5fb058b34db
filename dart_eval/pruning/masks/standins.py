"""What stands in for neurons: their means, through down."""

from __future__ import annotations

import torch
from torch import Tensor

from dart_eval.layers.expert_pool import write_all
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.masks.scores import FIRST_TOKEN
from dart_eval.pruning.session.sequence import Sums


def constant(ffn: FFN, mean: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What the neurons outside masks add per token, where each is at its mean: [b, D] fp32.

    Args:
        mean: [b or 1, F] fp32 by neuron. mask: [b or 1, F] bool by neuron.
        dtype: of the model's activations.
    """
    left_out = torch.where(mask, 0.0, mean.to(mask.device))
    if ffn.routed:
        return write_all(ffn.routed, left_out.to(dtype)).float()
    return ffn.write(left_out.to(dtype))


def means(fixed: list[Tensor] | None, sums: Sums | None, weight: Tensor, layer: int) -> Tensor | None:
    """[B or 1, F] by neuron, the means that stand in for neurons; None where there are none.

    Args:
        fixed: per layer [F], those of a calibration text, if they count. sums: over the tokens of B sequences, which
            weigh [B] `weight` together.
    """
    if fixed is not None:
        return fixed[layer][None]
    if sums is None or sums.layers[layer] is None:
        return None
    return sums[layer] / weight.clamp_min(FIRST_TOKEN)[:, None].to(sums[layer].device)


def floating(ffn: FFN) -> torch.dtype:
    """The dtype of the layer's activations before any has been seen: that of down, or of what is not quantised."""
    modules = (ffn.down, ffn.residual, ffn.attention)
    found = (p.dtype for module in modules for p in module.parameters() if p.is_floating_point())
    return next(found, torch.float32)
