"""Thresholds for tokens, from a calibration text: one number a layer, with which each neuron of a token is compared."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration.calibration import Calibration, named
from dart_eval.pruning.choices.choices import Choice, Token
from dart_eval.pruning.choices.previews import Preview

BELOW_ALL = -1.0  # magnitudes are never negative: such a threshold leaves nothing out
LOW_BITS = 13  # of a float32, left out of a bin: 10 bits of the mantissa stay, and a bin is .1 % wide
BINS = 1 << (31 - LOW_BITS)


class Distribution:
    """How often magnitudes of every size came up, in bins by the leading bits of a float32.

    The bit patterns of positive numbers are in the order of the numbers, so no range has to be known beforehand.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count these numbers, any shape."""
        patterns = values.float().abs().reshape(-1).view(torch.int32) >> LOW_BITS
        self.counts += torch.bincount(patterns, minlength=BINS).cpu()

    def quantile(self, share: float) -> float:
        """The lower edge of the bin in which this share of the numbers is reached: no more of them lie below it."""
        if share <= 0:
            return BELOW_ALL
        reached = self.counts.cumsum(0) >= math.ceil(share * int(self.counts.sum()) - 1e-6)  # .6 * 5 is 3
        edge = reached.int().argmax().to(torch.int32) << LOW_BITS
        return float(edge.view(torch.float32))


class MeanLeast:
    """The mean over tokens of each token's k-th largest magnitude."""

    def __init__(self) -> None:
        self.sum, self.tokens = 0.0, 0

    def add(self, values: Tensor, k: int) -> None:
        """Count tokens, [T, F]."""
        self.sum += float(values.float().abs().topk(k).values[:, -1].sum(dtype=torch.float64)) if k else torch.inf
        self.tokens += len(values)

    @property
    def mean(self) -> float:
        """The threshold."""
        return self.sum / max(1, self.tokens)


@torch.no_grad()
def of_choice(
    choice: Choice, ffns: Sequence[FFN], taken: Sequence[int], previews: Sequence[Preview] | None,
    calibration: Calibration,
) -> list[float]:  # fmt: skip
    """Per layer, the number that a neuron's importance to a token must be above.

    Args:
        taken: [L] neurons that a token is to take on average. previews: of the layers, where there are any.
    """
    if list(taken) == [f.size for f in ffns]:
        return [BELOW_ALL] * len(ffns)
    part = named(choice.importance)
    name = None if part is None else f"thresholds of {part}, {[*taken]} taken"
    measure = functools.partial(_measured, choice, ffns, taken, previews, calibration)
    return [float(one) for one in calibration.once(name, lambda: [torch.tensor(measure(), dtype=torch.float64)])[0]]


def _measured(
    choice: Choice, ffns: Sequence[FFN], taken: Sequence[int], previews: Sequence[Preview] | None,
    calibration: Calibration,
) -> list[float]:  # fmt: skip
    """What `of_choice` gives, from a pass over the text."""
    pooled, least = [Distribution() for _ in ffns], [MeanLeast() for _ in ffns]

    def see(layer: int, x: Tensor, _h: Tensor) -> None:
        gate, up = ffns[layer].parts(x[None])
        h = gate if up is None else gate * up
        preview = None if previews is None else previews[layer].look(*choice.shown(x[None], previews[layer].order))[0]
        importance = choice.importance(Token(h, gate, h if up is None else up, None, preview=preview))[0]
        if choice.pools:
            pooled[layer].add(importance)
        else:
            least[layer].add(importance, taken[layer])

    calibration.visit(see)
    if choice.pools:
        return [p.quantile(1 - k / f.size) for p, k, f in zip(pooled, taken, ffns, strict=True)]
    return [one.mean for one in least]
