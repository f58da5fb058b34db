"""Factors, bounds and constants on gate x and up x, beside the activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dart_eval.layers.families import Layout, get

Factors = Sequence[float | Tensor]  # numbers, or one per neuron, [F]


@dataclass(frozen=True, eq=False)
class Scaled:
    """An activation, or the identity, whose input has factors (Falcon-H1, Dory) or bounds (DeepSeek V4).

    Attributes:
        act: [..., F] -> [..., F]; None: the identity.
        factors: of its input.
        least, most: bounds of its input after the factors, or None.
        plus: constant that is added to the result (MiniMax M3).
    """

    act: Callable[[Tensor], Tensor] | None
    factors: Factors = ()
    least: float | None = None
    most: float | None = None
    plus: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = x * factor
        x = x if self.most is None else x.clamp(self.least, self.most)
        x = x if self.act is None else self.act(x)
        return x + self.plus if self.plus else x


def swish(alpha: float) -> Callable[[Tensor], Tensor]:
    """Return x sigmoid(alpha x)."""
    return lambda x: x * torch.sigmoid(x * alpha)


def activation(layer: nn.Module, layout: Layout) -> Callable[[Tensor], Tensor] | None:
    """Return the activation with its input's factors and bound; None if the layer has none."""
    acts = [get(layer, act) if isinstance(act, str) else act for act in layout.act]
    alpha = get(layer, layout.alpha) if layout.alpha else None
    act = next((a for a in acts if a is not None), None if alpha is None else swish(float(alpha)))
    factors, limit = _factors(layer, layout.factors), get(layer, layout.limit) if layout.limit else None
    return act if act is None or (not factors and limit is None) else Scaled(act, factors, most=limit)


def lift(layer: nn.Module, layout: Layout) -> Scaled | None:
    """Return the function of up x before the product, or None."""
    factors, limit = _factors(layer, layout.lifts), get(layer, layout.limit) if layout.limit else None
    plus, least = 1.0 if layout.alpha else 0.0, None if limit is None else -limit
    return Scaled(None, factors, least, limit, plus) if factors or plus or limit is not None else None


def _factors(layer: nn.Module, paths: Sequence[str]) -> list[float | Tensor]:
    factors = [get(layer, path) for path in paths]
    return [f for f in factors if f is not None and not (isinstance(f, (int, float)) and f == 1)]
