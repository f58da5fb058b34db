"""Weight magnitude: the static baseline of GRIFFIN's paper (arXiv 2404.01365)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dart_eval.pruning.method import Calibration, StaticMethod


@dataclass(frozen=True)
class Magnitude(StaticMethod):
    """score_j = product of the L2 norms of neuron j's rows in gate and up (up alone in a plain FFN)."""

    name = "magnitude"
    summary = "static, product of the norms of a neuron's gate and up rows"

    def static_scores(self, calibration: Calibration) -> list[Tensor]:
        return [
            math.prod((w.float().norm(dim=1) for w in ffn.input_weights()), start=1.0)  # type: ignore[misc]
            for ffn in calibration.ffns
        ]
