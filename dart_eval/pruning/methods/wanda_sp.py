"""Wanda-sp: Wanda's weight-times-activation score (arXiv 2306.11695), structured to whole neurons as FLAP
(arXiv 2312.11983) and Probe Pruning (arXiv 2502.15618) use it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dart_eval.pruning.method import Calibration, StaticMethod


@dataclass(frozen=True)
class WandaSp(StaticMethod):
    """score_j = mean_i |W_down[i, j]| * ||h_j||, the norm taken over the tokens of the calibration text."""

    name = "wanda-sp"
    summary = "static, down column times activation norm on a calibration text"

    def static_scores(self, calibration: Calibration) -> list[Tensor]:
        return [
            ffn.output_weight().float().abs().mean(0) * energy.sqrt()
            for ffn, energy in zip(calibration.ffns, calibration.energy(), strict=True)
        ]
