"""What FFNs do to gate x and up x before they multiply them, beside the activation: factors, bounds, a constant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.layers.families import Layout, get

Factors = Sequence[float | Tensor]  # numbers, or one of each neuron, [F]


@dataclass(frozen=True, eq=False)
class Act:
    """An activation of what is multiplied by factors (Falcon-H1, Dory) and bounded from above (DeepSeek V4) first.

    Attributes:
        act: [..., F] -> [..., F]. factors: of its input. most: bound of its input, or None.
    """

    act: Callable[[Tensor], Tensor]
    factors: Factors = ()
    most: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = _times(x, self.factors)
        return self.act(x if self.most is None else x.clamp(max=self.most))


@dataclass(frozen=True, eq=False)
class Lift:
    """up x as it is multiplied: times factors (Dory), bounded on both sides (DeepSeek V4), plus 1 (MiniMax M3).

    Attributes:
        factors: of up x. most: bound of its absolute value, or None. plus: what is added.
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
    """x sigmoid(alpha x): of one alpha one function, since layers are told apart by what they are made of."""
    return lambda x: x * torch.sigmoid(x * alpha)


def activation(layer: nn.Module, layout: Layout) -> Any:
    """The activation, with what is done to what enters it; None where there is none."""
    found = [get(layer, act) if isinstance(act, str) else act for act in layout.act]
    alpha = get(layer, layout.alpha) if layout.alpha else None
    act = next((a for a in found if a is not None), None if alpha is None else swish(float(alpha)))
    factors, limit = _factors(layer, layout.factors), get(layer, layout.limit) if layout.limit else None
    return act if act is None or (not factors and limit is None) else Act(act, factors, limit)


def lift(layer: nn.Module, layout: Layout) -> Lift | None:
    """What is done to up x before it is multiplied."""
    factors, limit = _factors(layer, layout.lifts), get(layer, layout.limit) if layout.limit else None
    plus = 1.0 if layout.alpha else 0.0
    return Lift(factors, limit, plus) if factors or plus or limit is not None else None


def _factors(layer: nn.Module, paths: Sequence[str]) -> list[Any]:
    found = [get(layer, path) for path in paths]
    return [f for f in found if f is not None and not (isinstance(f, (int, float)) and f == 1)]
