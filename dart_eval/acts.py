"""What FFNs do to gate x and up x before they multiply them, beside the activation: factors, bounds, a constant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
