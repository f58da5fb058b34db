"""DART (arXiv 2601.22632): prompt mask, depth-aware allocation, drift detector, re-mask from a ring buffer.

The paper as recovered, without the defects of its public code: masks change between forwards only, the first
masked token is the first decoded one, re-masking looks at the FFN inputs of recent tokens (which exist also for
pruned neurons) instead of running dense, ratios stay as the prompt set them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dart_eval.errors import UserError
from dart_eval.pruning.drift import DriftConfig
from dart_eval.pruning.method import DepthRule, PromptMethod, Remask


@dataclass(frozen=True)
class Dart(PromptMethod):
    """score_j = sum_t h_tj^2 over the prompt's tokens, no token normalisation.

    Attributes:
        allocation: sparsity over layers, depth (the paper's rule) or uniform
        protect: depth spares early and late layers (off: the paper's ablation)
        magnitude: depth weighs a layer's turn of the stream by the size of the change (off: the paper's ablation)
        detect: watch for drift and renew the masks
        window: tokens per detector window
        sigma: margin, in standard deviations of the prompt's windows
        floor: least margin, in cosine
        patience: flagged windows (net) before an alarm
        cooldown: windows ignored after an alarm
        min_windows: with fewer prompt windows than this the margin is floor
        ring: recent FFN inputs kept per layer, from which new masks are made
        blend: weight of the prompt's scores in a new mask (0: recent tokens only)
    """

    name = "dart"
    summary = "per prompt, depth-aware over layers, renewed when the context drifts"
    allocation: str = "depth"
    protect: bool = True
    magnitude: bool = True
    detect: bool = True
    window: int = 10
    sigma: float = 0.5
    floor: float = 0.1
    patience: int = 2
    cooldown: int = 2
    min_windows: int = 4
    ring: int = 24
    blend: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.window, self.patience, self.ring) < 1:
            raise UserError("dart: window, patience and ring must be at least 1")
        if not 0 <= self.blend <= 1 or self.cooldown < 0:
            raise UserError("dart: blend must lie in [0, 1] and cooldown must not be negative")

    def energy(self, h: Tensor, valid: Tensor) -> Tensor:
        return (valid[:, None] @ h.square()).squeeze(1)

    @property
    def depth_rule(self) -> DepthRule:
        return DepthRule(protect=self.protect, magnitude=self.magnitude)

    @property
    def drift(self) -> DriftConfig | None:
        if not self.detect:
            return None
        return DriftConfig(
            window=self.window,
            sigma=self.sigma,
            floor=self.floor,
            patience=self.patience,
            cooldown=self.cooldown,
            min_windows=self.min_windows,
            recent=max(1, self.ring // self.window),
        )

    @property
    def remask(self) -> Remask:
        return Remask(ring=self.ring, blend=self.blend)
