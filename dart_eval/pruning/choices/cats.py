"""Choice by the gate, after CATS."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dart_eval.pruning.choices.choice import Choice, Token
from dart_eval.pruning.part import option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.pruning.calibration.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class ByGate(Choice):
    """A token takes the k neurons with the largest |act(gate x)|, after CATS (arXiv 2404.08763).

    CATS takes and writes those above a threshold (`threshold=calibrated`): the quantile of |act(gate x)| over all
    neurons and tokens of a text, layer by layer. Tokens then take different numbers of neurons, so the bytes read are
    measured. Its code (CATS at 679959c) finds it in 1000 bins between -1 and 1 on RefinedWeb; here bins are .1 % wide
    and have no end. There prompts run pruned too, and the model is then fine-tuned.
    """

    name = "gate"
    summary = "chooses the largest |act(gate x)|, and reads gate whole"
    reads_whole = ("gate",)
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

    def thresholds(self, ffns: Sequence[FFN], taken: Sequence[int], calibration: Calibration) -> list[float]:
        import torch

        from dart_eval.pruning.calibration.calibration import statistic_name
        from dart_eval.pruning.calibration.inputs import BELOW_ALL

        if list(taken) == [ffn.size for ffn in ffns]:
            return [BELOW_ALL] * len(ffns)
        part = statistic_name(self.importance)
        name = None if part is None else f"thresholds of {part}, {[*taken]} taken"
        measure = functools.partial(self._measured, ffns, taken, calibration)
        return [float(one) for one in calibration.once(name, lambda: [torch.tensor(measure(), dtype=torch.float64)])[0]]

    def _measured(self, ffns: Sequence[FFN], taken: Sequence[int], calibration: Calibration) -> list[float]:
        """Measure the thresholds in a pass over the text."""
        import torch

        from dart_eval.pruning.calibration.inputs import Quantile

        estimates = [Quantile() for _ in ffns]

        @torch.no_grad()
        def see(layer: int, x: Tensor, _h: Tensor) -> None:
            gate, up = ffns[layer].parts(x[None])
            h = gate if up is None else gate * up
            token = Token(h, gate, h if up is None else up)
            estimates[layer].add(self.importance(token)[0], taken[layer])

        calibration.visit(see)
        return [one.threshold for one in estimates]

    def importance(self, token: Token) -> Tensor:
        return token.gate.abs()
