"""Factors, bounds and constants on gate x and up x, beside the activation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dart_eval.layers.families import Layout, get

Factors = Sequence[float | Tensor]  # numbers, or one per neuron, [F]


@dataclass(frozen=True, eq=False)
class Act:
    """An activation whose input has factors (Falcon-H1, Dory) or an upper bound (DeepSeek V4).

    Attributes:
        act: [..., F] -> [..., F].
        factors: of its input.
        most: upper bound of its input, or None.
    """

    act: Callable[[Tensor], Tensor]
    factors: Factors = ()
    most: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = _times(x, self.factors)
        return self.act(x if self.most is None else x.clamp(max=self.most))


@dataclass(frozen=True, eq=False)
class Lift:
    """A function of up x: times factors (Dory), bounded on both sides (DeepSeek V4), plus 1 (MiniMax M3).

    Attributes:
        factors: of up x.
        most: bound of its absolute value, or None.
        plus: constant that is added.
    """

    factors: Factors = ()
    most: float | None = None
    plus: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        x = _times(x, self.factors)
        x = x if self.most is None else x.clamp(-self.most, self.most)
        return x + self.plus if self.plus else x


def _times(x: Tensor, factors: Factors) -> Tensor:
    for factor in factors:
        x = x * factor
    return x


@functools.cache
def swish(alpha: float) -> Callable[[Tensor], Tensor]:
    """Return x sigmoid(alpha x): one function per alpha, since layers are compared by identity."""
    return lambda x: x * torch.sigmoid(x * alpha)


def activation(layer: nn.Module, layout: Layout) -> Callable[[Tensor], Tensor] | None:
    """Return the activation with its input's factors and bound; None if the layer has none."""
    acts = [get(layer, act) if isinstance(act, str) else act for act in layout.act]
    alpha = get(layer, layout.alpha) if layout.alpha else None
    act = next((a for a in acts if a is not None), None if alpha is None else swish(float(alpha)))
    factors, limit = _factors(layer, layout.factors), get(layer, layout.limit) if layout.limit else None
    return act if act is None or (not factors and limit is None) else Act(act, factors, limit)


def lift(layer: nn.Module, layout: Layout) -> Lift | None:
    """Return the function of up x before the product, or None."""
    factors, limit = _factors(layer, layout.lifts), get(layer, layout.limit) if layout.limit else None
    plus = 1.0 if layout.alpha else 0.0
    return Lift(factors, limit, plus) if factors or plus or limit is not None else None


def _factors(layer: nn.Module, paths: Sequence[str]) -> list[float | Tensor]:
    factors = [get(layer, path) for path in paths]
    return [f for f in factors if f is not None and not (isinstance(f, (int, float)) and f == 1)]
