"""Mean and variance of each neuron's activation over the tokens of a text, passage by passage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of one layer over all tokens: [F] fp32 each.

    Attributes:
        mean: of h.
        variance: of h, divided by n and not n - 1.
        code_variance: the quantity that FLAP's code uses instead, see `Running`.
    """

    mean: Tensor
    variance: Tensor
    code_variance: Tensor


class Running:
    """Moments of one layer, passage by passage, in fp32.

    Squares are of distances from means, so that a constant added to h costs no precision. FLAP's code
    (CASIA-IVA-Lab/FLAP, 3bb57db, `lib/layerwrapper.py`) updates its mean in place before it reads the old one. Its m-th
    passage adds S_m = sum_t (h_t - mean of the first m passages' means)^2, and the first one nothing, as

        variance_m = (m - 2) / (m - 1) * variance_(m - 1) + S_m / m
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.tokens = self.passages = 0
        self.mean, self.squares, self.middle, self.code = (torch.zeros(size, device=device) for _ in range(4))

    def add(self, h: Tensor) -> None:
        """Add a passage. h: [T, F] fp32, T at least 1."""
        n, mean = len(h), h.mean(0)
        within = (h - mean).square().sum(0)
        before, after = self.tokens, self.tokens + n
        apart = mean - self.mean
        self.squares = self.squares + within + apart.square() * (before * n / after)
        self.mean = self.mean + apart * (n / after)
        m = self.passages + 1
        self.middle = self.middle + (mean - self.middle) / m
        if m > 1:
            around = within + n * (mean - self.middle).square()
            self.code = self.code * ((m - 2) / (m - 1)) + around / m
        self.tokens, self.passages = after, m

    @property
    def moments(self) -> Moments:
        """Moments of the passages so far."""
        return Moments(self.mean, self.squares / max(1, self.tokens), self.code)
