"""FLAP (arXiv 2312.11983): neurons that hardly vary are replaced by their mean.

    score_j = variance of h_j over a calibration text's tokens * ||W_down[:, j]||^2           (WIFV)
    z_j     = (score_j - mean) / standard deviation, both of the neuron's own layer           (AL-MM)
    y       = W_down (mask * h) + W_down[:, pruned] mean(h)[pruned], a constant               (the bias)

All neurons stand in one ranking by z. The authors' code (CASIA-IVA-Lab/FLAP, 3bb57db, `lib/prune.py`,
`lib/layerwrapper.py`) cuts at a threshold, where exactly k are kept here, and may leave a layer no neuron, where every
layer keeps its best one here. It has another quantity in place of the variance: `score.variance=code` gives it
(`Running`), with our segments as its sequences. It calibrates on 2048 sequences of 128 tokens of WikiText-2's train
split, and prunes attention heads in the same ranking, which is left out here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.method import option
from dart_eval.pruning.methods.griffin import StaticMask
from dart_eval.pruning.rows import nbytes

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.method import Hook
    from dart_eval.pruning.session import Session


class Flap(StaticMask):
    """Neurons that vary most on a calibration text, and the mean output of the rest."""

    name = "flap"
    summary = "keeps the neurons that vary most on a calibration text, and adds the mean output of the rest"
    paper = "2312.11983"
    recorded: ClassVar = {"mask": "static", "score": "fluctuation", "allocation": "global", "compensation": "mean"}
    calibrates = True
    fits_experts = False
    fits_norms = False
    fits_repeats = False
    score_variance: Literal["true", "code"] = option(
        "true", "use the variance over tokens, or the value that FLAP's code computes instead"
    )

    @torch.no_grad()
    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        assert calibration is not None
        self.constants = []  # per layer [D] fp32
        for ffn, mask, moments in zip(ffns, self.fixed, calibration.moments(), strict=True):
            left_out = torch.where(mask, 0.0, moments.mean.to(mask.device))
            self.constants.append(ffn.write(left_out.to(floating(ffn))))

    def scores(self, calibration: Calibration | None) -> list[Tensor]:
        assert calibration is not None
        true = self.score_variance == "true"
        variances = [m.variance if true else m.code_variance for m in calibration.moments()]
        norms = [f.output_weight().float().square().sum(0) for f in self.ffns]
        return [variance.to(norm.device) * norm for variance, norm in zip(variances, norms, strict=True)]

    def densities(self, scores: Sequence[Tensor]) -> list[float]:
        sizes, standard = [len(s) for s in scores], [standardised(s) for s in scores]
        budget = round((1 - self.sparsity) * sum(sizes))
        if budget >= len(sizes):
            for z in standard:
                z[z.argmax()] = torch.inf
        kept = top_k_mask(torch.cat(standard)[None], torch.tensor([budget]))[0]
        return [int(of_layer.sum()) / len(of_layer) for of_layer in kept.split(sizes)]

    def hooks(self, session: Session) -> list[Hook]:
        return [(f.down, "register_forward_hook", self._on_down(session, f.layer)) for f in session.ffns]

    def _on_down(self, session: Session, layer: int) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, _args: tuple[object, ...], output: Tensor) -> Tensor | None:
            if session.phase != "decode":
                return None
            return (session.in_batch(output) + self.constants[layer].to(output.device, output.dtype)).view(output.shape)

        return hook

    def nbytes(self) -> int:
        return nbytes([*self.fixed, *self.constants])

    def step_flops(self, shape: ModelShape) -> float:
        return shape.layers * shape.width


def standardised(score: Tensor) -> Tensor:
    """Return [F] fp64 on the CPU: distances from the mean in standard deviations; 0 where all are the same."""
    x = score.cpu().double()
    deviation = x.std() if len(x) > 1 else x.new_zeros(())  # unbiased, as in the code
    return (x - x.mean()) / deviation if bool(deviation > 0) else x * 0


def floating(ffn: FFN) -> torch.dtype:
    """Return the dtype of a layer's activations: that of down, or of a module that is not quantised."""
    modules = (ffn.down, ffn.residual, ffn.attention)
    dtypes = (p.dtype for module in modules for p in module.parameters() if p.is_floating_point())
    return next(dtypes, torch.float32)
