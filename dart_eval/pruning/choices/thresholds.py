"""Choices by a threshold: each layer has one from a calibration text, in place of a count."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dart_eval.pruning.choices.choice import ChoiceLayer, Inside, Token
from dart_eval.pruning.part import option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.pruning.calibration.calibration import Calibration
    from dart_eval.pruning.calibration.inputs import MeanLeast, Quantile


@dataclass(frozen=True, kw_only=True)
class Thresholded(Inside):
    """Base of choices that take exactly k neurons, or those above a calibrated threshold per layer.

    The threshold is calibrated for the share of neurons that the sparsity asks for. Tokens then take different numbers
    of neurons, so the bytes read are measured, and all taken neurons are written.
    """

    threshold: Literal["none", "calibrated"] = option(
        "none",
        "choose all above a threshold per layer, from a calibration text, in place of exactly k (the read varies)",
    )

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.threshold == "none"

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.threshold == "calibrated"

    def attach(self, ffns: Sequence[FFN], taken: Sequence[int], calibration: Calibration | None) -> list[ChoiceLayer]:
        layers = super().attach(ffns, taken, calibration)
        if calibration is not None and self.threshold == "calibrated":
            for layer, threshold in zip(layers, self._thresholds(layers, taken, calibration), strict=True):
                layer.threshold = threshold
        return layers

    def _thresholds(self, layers: Sequence[ChoiceLayer], taken: Sequence[int], calibration: Calibration) -> list[float]:
        """Return per layer the number that a neuron's importance must exceed."""
        import torch

        from dart_eval.pruning.calibration.calibration import statistic_name
        from dart_eval.pruning.calibration.inputs import BELOW_ALL

        if list(taken) == [layer.ffn.size for layer in layers]:
            return [BELOW_ALL] * len(layers)
        part = statistic_name(self.importance)
        name = None if part is None else f"thresholds of {part}, {[*taken]} taken"
        measure = functools.partial(self._measured, layers, taken, calibration)
        return [float(one) for one in calibration.once(name, lambda: [torch.tensor(measure(), dtype=torch.float64)])[0]]

    def _measured(self, layers: Sequence[ChoiceLayer], taken: Sequence[int], calibration: Calibration) -> list[float]:
        """Measure the thresholds in a pass over the text."""
        import torch

        estimates = [self.least() for _ in layers]

        @torch.no_grad()
        def see(layer: int, x: Tensor, _h: Tensor) -> None:
            gate, up = layers[layer].ffn.parts(x[None])
            h = gate if up is None else gate * up
            token = Token(h, gate, h if up is None else up)
            estimates[layer].add(self.importance(token)[0], taken[layer])

        calibration.visit(see)
        return [one.threshold for one in estimates]

    def least(self) -> Quantile | MeanLeast:
        """Return the estimator of a layer's threshold: the quantile over all neurons of all tokens."""
        from dart_eval.pruning.calibration.inputs import Quantile

        return Quantile()
