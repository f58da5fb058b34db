"""Scores: how much a neuron matters, from the tokens of a context, a calibration text, or its weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dart_eval.pruning.part import Part, option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.pruning.calibration.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class AnyScore(Part):
    """Base of all scores: sums over tokens (`observe`), factors that no token changes, or both."""

    slot = "score"
    observes = True

    def factors(self, calibration: Calibration) -> list[Tensor] | None:
        """Return the factors that no token changes: per layer [F] fp32; None without factors."""
        return None

    def combine(self, sums: Tensor | None, factor: Tensor | None) -> Tensor:
        """Return the score: [B, F]. The highest are kept, so only the order within a layer counts.

        Args:
            sums: [B, F] sums over tokens; None for a score of weights alone.
            factor: [F] of this layer from `factors`, or None.
        """
        assert sums is not None
        return sums if factor is None else sums * factor.to(sums.device)

    def proportional(self, score: Tensor) -> Tensor:
        """Return the score itself, if `combine` returns another number of the same order, such as its square."""
        return score


@dataclass(frozen=True, kw_only=True)
class Score(AnyScore):
    """Base of scores from tokens, of a context or of a calibration text."""


@dataclass(frozen=True, kw_only=True)
class Activation(Score):
    """score_j = sum over tokens of (|h_tj| / ||h_t||)^2, with the norm of choice.

    From arXiv 2404.01365 (GRIFFIN: norm l2) and arXiv 2601.22632 (DART: norm none). Sums of squares have the order of
    their roots, which are never taken.
    """

    name = "activation"
    summary = "ranks neurons by the size of their activations on the context's tokens"
    needs_context = True
    flops_per_neuron = 5  # a square and a sum for the norm; a square, a division and a sum for the score
    norm: Literal["none", "l1", "l2"] = option("none", "divide each token's activations by this norm")

    def observe(self, h: Tensor, weight: Tensor) -> Tensor:
        return activations(h, weight, self.norm)

    def proportional(self, score: Tensor) -> Tensor:
        return score.sqrt()


@dataclass(frozen=True, kw_only=True)
class Wanda(Score):
    """score_j = mean_i |W_down[i, j]| * ||h_j||, the norm taken over the tokens.

    Wanda's weight times activation (arXiv 2306.11695), structured to whole neurons as FLAP (arXiv 2312.11983) and
    Probe Pruning (arXiv 2502.15618) use it. FLAP's code (CASIA-IVA-Lab/FLAP, 3bb57db, `lib/prune.py`) divides the sum
    of squares by the number of sequences, which leaves the order; it keeps all neurons that tie, and its layers see
    what the pruned layers before them give. Here exactly k are kept, and every layer sees dense inputs.
    """

    name = "wanda"
    summary = "ranks neurons by the mean |weight| of their down column times the norm of their activations"
    needs_context = True
    flops_per_neuron = 2

    def observe(self, h: Tensor, weight: Tensor) -> Tensor:
        return activations(h, weight)

    def factors(self, calibration: Calibration) -> list[Tensor] | None:
        return [ffn.output_weight().float().abs().mean(0) for ffn in calibration.ffns]

    def combine(self, sums: Tensor | None, factor: Tensor | None) -> Tensor:
        assert sums is not None and factor is not None
        return factor * sums.sqrt().to(factor.device)


@dataclass(frozen=True, kw_only=True)
class WeightScore(AnyScore):
    """Base of scores that no prompt changes: from the weights, a calibration text, or nothing at all."""

    observes = False

    @abstractmethod
    def factors(self, calibration: Calibration) -> list[Tensor]:
        """The score of each layer: [F]."""

    def combine(self, sums: Tensor | None, factor: Tensor | None) -> Tensor:
        assert factor is not None
        return factor[None]


@dataclass(frozen=True, kw_only=True)
class Weights(WeightScore):
    """score_j = the product of the L2 norms of neuron j's rows in gate and up (up alone in a plain FFN).

    The static baseline of GRIFFIN's paper (arXiv 2404.01365).
    """

    name = "weights"
    summary = "ranks neurons by the norms of their gate and up rows"

    def factors(self, calibration: Calibration) -> list[Tensor]:
        return [
            math.prod((w.float().norm(dim=1) for w in ffn.input_weights()), start=1.0)  # type: ignore[misc]
            for ffn in calibration.ffns
        ]


@dataclass(frozen=True, kw_only=True)
class Fluctuation(WeightScore):
    """score_j = the variance of h_j over the calibration text's tokens, times ||W_down[:, j]||^2: FLAP's WIFV.

    From arXiv 2312.11983. A neuron that hardly varies can be replaced by its mean, however large that is, as
    `compensation=mean:compensation.over=calibration` does. A constant added to h does not change the score.

    The authors' code (CASIA-IVA-Lab/FLAP, 3bb57db, `lib/prune.py`, `lib/layerwrapper.py`) has another quantity in place
    of the variance: `variance=code` gives it (`moments.Running`), with our segments as its sequences. It calibrates on
    2048 sequences of 128 tokens of WikiText-2's train split, and prunes attention heads in the same ranking, which is
    left out here.
    """

    name = "fluctuation"
    summary = "ranks neurons by activation variance on a calibration text times the squared norm of their down column"
    calibrates = True
    variance: Literal["true", "code"] = option(
        "true", "use the variance over tokens, or the value that FLAP's code computes instead"
    )

    def factors(self, calibration: Calibration) -> list[Tensor]:
        spread = [m.variance if self.variance == "true" else m.code_variance for m in calibration.moments()]
        return [v.to(norm.device) * norm for v, norm in zip(spread, down_norms(calibration.ffns), strict=True)]


@dataclass(frozen=True, kw_only=True)
class Random(WeightScore):
    """The neurons of every layer stand in a random order."""

    name = "random"
    summary = "ranks neurons at random, in the same order for every text"
    seed: int = option(0, "seed of the draw; --seed by default", least=0, most=2**32 - 1)

    def factors(self, calibration: Calibration) -> list[Tensor]:
        import torch

        scores = []
        for ffn in calibration.ffns:
            # Drawn on the CPU, so that a seed means the same neurons on every device.
            generator = torch.Generator().manual_seed(self.seed * 100_003 + ffn.layer)
            scores.append(torch.rand(ffn.pool, generator=generator))
        return scores


SCORES = (Activation, Wanda, Fluctuation, Weights, Random)


def activations(h: Tensor, weight: Tensor, norm: str = "none") -> Tensor:
    """Return sum_t weight_t (|h_tj| / ||h_t||)^2, whose order is that of its root.

    Args:
        h: [B, T, F] fp32.
        weight: [B, T] fp32, 0 for padding.
        norm: the divisor of a token: none, l1 or l2.

    Returns:
        [B, F] fp32.
    """
    values = h.square()
    if norm == "l2":
        size = values.sum(-1)
    elif norm == "l1":
        size = h.abs().sum(-1).square()
    else:
        return (weight[:, None] @ values).squeeze(1)
    return ((weight / size.clamp_min(1e-30))[:, None] @ values).squeeze(1)


def down_norms(ffns: Sequence[FFN]) -> list[Tensor]:
    """Return per layer [F] fp32 the squared norm of each neuron's column of down."""
    return [ffn.output_weight().float().square().sum(0) for ffn in ffns]
