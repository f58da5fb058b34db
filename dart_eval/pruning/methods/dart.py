"""DART (arXiv 2601.22632): prompt mask, depth-aware allocation, drift detector, re-mask; and its presets.

`dart` is the paper as recovered, without the defects of its public code: masks change between forwards only, the
first masked token is the first decoded one, re-masking looks at the FFN inputs of recent tokens (which exist also for
pruned neurons) instead of running dense, ratios stay as the prompt set them.

A preset is the same class with other defaults: data, no branch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dart_eval.errors import UserError, nearest
from dart_eval.pruning import scores
from dart_eval.pruning.drift import DriftConfig
from dart_eval.pruning.method import Calibration, DepthRule, PromptMethod, Renewal

AGGREGATIONS = ("l2", "ema")
MOST_STAGES = 3.0  # a gated FFN whose weights are all read in its gate: nothing is left to pick
CHOICES = {
    "score": scores.SCORES, "normalise": scores.NORMALISATIONS, "aggregate": AGGREGATIONS,
    "sensitivity": ("ffn", "residual"), "memory": ("prompt", "running"), "reference": ("moved", "kept"),
}  # fmt: skip


@dataclass(frozen=True)
class Dart(PromptMethod):
    """score_j = sum_t h_tj^2 over the prompt's tokens, no token normalisation.

    Attributes:
        score: magnitude (activations alone), or weighed by what a neuron writes to the vocabulary: max, mean, combined
            (both) or product
        normalise: divide each token's activations by their norm: none, l1 or l2
        aggregate: l2 (sum of squares) or ema (exponential average of magnitudes over the prompt)
        decay: of the exponential average, per token
        skip_first: leave the first token out of the scores
        down_norm: weigh a neuron by the norm of its down column
        allocation: sparsity over layers: depth (the paper's rule), uniform, or table:FILE
        sensitivity: depth judges a layer by what its FFN adds (ffn) or by the stream after it (residual)
        protect: depth spares early and late layers (off: the paper's ablation)
        magnitude: depth weighs a layer's turn of the stream by the size of the change (off: the paper's ablation)
        detect: watch for drift
        window: tokens per detector window
        sigma: margin, in standard deviations of the prompt's windows
        floor: least margin, in cosine
        patience: flagged windows (net) before an alarm
        cooldown: windows ignored after an alarm
        min_windows: with fewer prompt windows than this the margin is floor
        detect_skip_first: leave the first token out of the detector's reference
        renew: an alarm renews the mask (off: the detector only watches)
        ring: recent FFN inputs kept per layer, from which new masks are made
        dense_tokens: instead of the ring, run so many tokens dense after an alarm and make the mask from them (0: ring)
        blend: weight of the old scores in a new mask after an alarm (0: recent tokens only)
        memory: the old scores are the prompt's (prompt) or those of the mask in force (running)
        every: renew the mask also each time so many tokens have been decoded, alarm or not (0: never)
        every_blend: weight of the old scores in those steady renewals
        reference: after an alarm the detector's reference is moved to the recent windows or kept
        stages: neurons of the mask as a multiple of the weights read; above 1 each token picks some of them by
            |act(gate)| x rms of up, at equal weights read
        down: of the neurons that a token picks, the share whose down columns it reads: those with the largest |h|
            (gated FFNs; only where stages is above 1)
        compensate: add what the neurons outside the mask added to the prompt's tokens on average, a constant
    """

    name = "dart"
    summary = "per prompt, depth-aware over layers, renewed when the context drifts"
    score: str = "magnitude"
    normalise: str = "none"
    aggregate: str = "l2"
    decay: float = 0.98
    skip_first: bool = False
    down_norm: bool = False
    allocation: str = "depth"
    sensitivity: str = "ffn"
    protect: bool = True
    magnitude: bool = True
    detect: bool = True
    window: int = 10
    sigma: float = 0.5
    floor: float = 0.1
    patience: int = 2
    cooldown: int = 2
    min_windows: int = 4
    detect_skip_first: bool = True
    renew: bool = True
    ring: int = 24
    dense_tokens: int = 0
    blend: float = 0.25
    memory: str = "prompt"
    every: int = 0
    every_blend: float = 0.8
    reference: str = "moved"
    stages: float = 1.0
    down: float = 1.0
    compensate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in CHOICES.items():
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"{self.name}: {key} {value!r} is unknown", nearest(value, known))
        if min(self.window, self.patience, self.ring) < 1:
            raise UserError(f"{self.name}: window, patience and ring must be at least 1")
        if min(self.cooldown, self.dense_tokens, self.every) < 0:
            raise UserError(f"{self.name}: cooldown, dense_tokens and every must not be negative")
        if not (0 <= self.blend <= 1 and 0 <= self.every_blend <= 1 and 0 < self.decay <= 1):
            raise UserError(f"{self.name}: blend and every_blend must lie in [0, 1], decay in (0, 1]")
        if self.every and self.dense_tokens:
            raise UserError(f"{self.name}: every renews from the ring, dense_tokens without it", "set one of them to 0")
        if not 1 <= self.stages <= MOST_STAGES:
            raise UserError(
                f"{self.name}: stages {self.stages:g} is outside [1, {MOST_STAGES:g}]",
                "1 is a mask alone, 1.5 a wider one",
            )
        if not 0 < self.down <= 1:
            raise UserError(
                f"{self.name}: down {self.down:g} is outside (0, 1]", "1 writes every neuron that is picked"
            )

    def energy(self, h: Tensor, weight: Tensor) -> Tensor:
        return scores.energy(h, weight, self.normalise, 1 if self.aggregate == "ema" else 2)

    def neuron_weights(self, calibration: Calibration) -> list[Tensor] | None:
        factors: list[Tensor] | None = None  # on a norm, squared
        if self.score != "magnitude":
            factors = [p.factor(self.score).square() for p in calibration.projection()]
        if self.down_norm:
            norms = scores.down_norms(calibration.ffns)
            factors = norms if factors is None else [f * n.to(f.device) for f, n in zip(factors, norms, strict=True)]
        if factors is not None and self.aggregate == "ema":  # its sums are of magnitudes, not of squares
            factors = [f.sqrt() for f in factors]
        return factors

    @property
    def token_decay(self) -> float | None:
        return self.decay if self.aggregate == "ema" else None

    @property
    def skips_first(self) -> bool:
        return self.skip_first

    @property
    def depth_rule(self) -> DepthRule:
        return DepthRule(self.protect, self.magnitude, self.sensitivity == "residual")

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
            recent=max(1, (self.dense_tokens or self.ring) // self.window),
            skip_first=self.detect_skip_first,
        )

    @property
    def renewal(self) -> Renewal:
        return Renewal(
            ring=self.ring,
            blend=self.blend,
            every=self.every,
            every_blend=self.every_blend,
            running=self.memory == "running",
            dense_tokens=self.dense_tokens,
            on_alarm=self.renew,
            move_reference=self.reference == "moved",
        )


@dataclass(frozen=True)
class DartCode(Dart):
    """The public code's settings: its detector, and new masks from the dense tokens that follow an alarm, alone.

    Its defects stay out: there a mask of MASKING_STEP 0 was never renewed, and half of the layers of the forward with
    the alarm ran under the old one. Ratios stay the prompt's here; the code computed them anew.
    """

    name = "dart-code"
    summary = "dart with the public code's settings: eager detector, masks renewed from 30 dense tokens"
    window: int = 5
    sigma: float = 0.1
    patience: int = 1
    cooldown: int = 0
    min_windows: int = 2
    detect_skip_first: bool = False
    dense_tokens: int = 30
    blend: float = 0.0


@dataclass(frozen=True)
class DartPlus(Dart):
    """Ours: a wide mask inside which every token picks its neurons; the mean stands in for those outside.

    The settings are those of docs/findings.md, chosen on the smoke documents.
    """

    name = "dart-plus"
    summary = "each token picks inside a wide mask, renewed on drift; their mean stands in for those outside"
    normalise: str = "l2"
    allocation: str = "uniform"
    floor: float = 0.05
    ring: int = 8
    blend: float = 0.8
    memory: str = "running"
    stages: float = 1.6
    down: float = 0.6
    compensate: bool = True
