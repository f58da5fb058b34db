"""Random neurons: the control that every score must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.pruning.method import Calibration, StaticMethod


@dataclass(frozen=True)
class Random(StaticMethod):
    """One random order of the neurons of every layer.

    Attributes:
        seed: of the draw; the run's --seed where not given
    """

    name = "random"
    summary = "one random set of neurons per layer (control)"
    seed: int = 0

    def static_scores(self, calibration: Calibration) -> list[Tensor]:
        scores = []
        for ffn in calibration.ffns:
            # Drawn on the CPU, so that a seed means the same neurons on every device.
            generator = torch.Generator().manual_seed(self.seed * 100_003 + ffn.layer)
            scores.append(torch.rand(ffn.size, generator=generator))
        return scores
