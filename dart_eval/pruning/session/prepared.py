"""A method on a model before any prompt: its state per layer, and its counts of neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning import compatibility
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.masks.change import ChangeState
from dart_eval.pruning.masks.counts import Counts
from dart_eval.pruning.method import CostTerms, Pruner
from dart_eval.pruning.session.fitted import Fitted
from dart_eval.util.bits import OWN_BITS, Stored
from dart_eval.util.errors import UserError
from dart_eval.weights import rounding

if TYPE_CHECKING:
    from dart_eval.pruning.method import Beside


@dataclass
class Prepared:
    """A method on the layers of one model, at one sparsity.

    Attributes:
        unit: mean bits of an FFN weight, of which the sparsity leaves out a share.
        share: the same / bits of the model's own dtype.
        layers: the method on each FFN.
        beside: the attached part that leaves out inputs or weights; None.
    """

    method: Pruner
    ffns: Sequence[FFN]
    sparsity: float
    unit: float
    beside: Beside | None = None

    def __post_init__(self) -> None:
        method, sizes = self.method, [f.size for f in self.ffns]
        allocation = method.allocation
        self._dense = Counts(sizes, sizes, sizes)
        self.share = self.unit / OWN_BITS
        # Counting refuses a sparsity that cannot be met at all.
        varies = allocation.needs_change or allocation.needs_scores
        self._fixed_counts = None if varies else self._counts(None, slice(None))
        uniform = self._counts_at([1 - self.sparsity] * len(sizes))
        terms = method.cost_terms(self.ffns, self.sparsity, self.unit, uniform.full_matrices)
        self.layers = [Fitted(method, ffn, of_layer) for ffn, of_layer in zip(self.ffns, terms, strict=True)]
        self._products, self._fixed, self._moving = self._shares(uniform, terms)

    def counts(
        self, change: ChangeState | None, rows: slice, has_context: bool, scores: Sequence[Tensor] | None = None
    ) -> Counts:
        """Return the counts of neurons for the sequences `rows` together.

        Args:
            change: the context's changes, if the allocation needs them.
            rows: the sequences.
            has_context: whether they have seen any tokens.
            scores: theirs, per layer [F], if the allocation needs them.
        """
        if self.method.needs_context and not has_context:
            return self._dense
        return self._counts(change, rows, scores) if self._fixed_counts is None else self._fixed_counts

    def _counts(self, change: ChangeState | None, rows: slice, scores: Sequence[Tensor] | None = None) -> Counts:
        return self._counts_at(self.method.allocation.of_ffns(self.sparsity, self.ffns, change, rows, scores))

    def _counts_at(self, densities: Sequence[float]) -> Counts:
        return self.method.counts(densities, self.ffns, self.sparsity)

    def _shares(self, counts: Counts, terms: Sequence[CostTerms]) -> tuple[float, float, float]:
        """Return the products of a token under these counts, what it reads beside them, and what it reads for them.

        All three are shares of the FFN weights. Beside them it reads scales.
        """
        matrices, full = self.ffns[0].matrices, counts.full_matrices if self.sparsity else 0.0
        products = fixed = moving = 0.0
        for ffn, mask, taken, written, (always, seen, chosen, last) in zip(
            self.ffns, counts.mask, counts.taken, counts.written, terms, strict=True
        ):
            products += full * mask + (matrices - 1 - full) * taken + written
            fixed += always * ffn.size
            moving += seen * mask + chosen * taken + last * written
        everything = matrices * sum(f.size for f in self.ffns)
        return products / everything, fixed / everything, moving / everything

    def computed(self, read: float) -> float:
        """Return the share of the FFN weights that a pruned token multiplies. read: the share that it reads."""
        if (other := self.method.other) is not None:
            scales = self.method.scales_read(self.ffns)
            return other.multiplied((read - scales) / (1 - scales))
        if not self._moving:
            return self._products
        return self._products * (read - self._fixed) / self._moving

    def nbytes(self) -> int:
        """Return the bytes that all sequences share."""
        beside = 0 if self.beside is None else self.beside.nbytes()
        return beside + sum(layer.nbytes() for layer in self.layers)

    def fix(self, calibration: Calibration) -> None:
        """Make the masks that all sequences share."""
        score, sums = self.method.mask.score, None
        assert score is not None
        if score.observes:
            sums = calibration.sums(score.observe)
        scores = [
            score.combine(None if sums is None else sums[i][None], layer.factor) for i, layer in enumerate(self.layers)
        ]
        self._fixed_counts = self._counts(None, slice(None), [s[0] for s in scores])
        for layer, some, count in zip(self.layers, scores, self._fixed_counts.mask, strict=True):
            layer.mask = layer.ffn.mask_of(top_k_mask, some, torch.tensor([count])).to(device_of(layer.ffn))
            layer.factor = None  # it is in the mask

    @torch.no_grad()
    def stand_in(self, calibration: Calibration) -> None:
        """Set the constants that replace the neurons outside the masks, each at its mean."""
        for layer, moments in zip(self.layers, calibration.moments(), strict=True):
            left_out = torch.where(layer.masked, 0.0, moments.mean.to(layer.masked.device))
            layer.constant = layer.ffn.write(left_out.to(floating(layer.ffn)))


def floating(ffn: FFN) -> torch.dtype:
    """Return the expected dtype of the layer's activations: that of down, or of a module that is not quantised."""
    modules = (ffn.down, ffn.residual, ffn.attention)
    dtypes = (p.dtype for module in modules for p in module.parameters() if p.is_floating_point())
    return next(dtypes, torch.float32)


def check(method: Pruner, ffns: Sequence[FFN], sparsity: float) -> None:
    """Refuse what `prepare` would refuse on a model's own weights, without a calibration.

    Raises:
        UserError: the method does not fit the FFNs or their bits, or cannot meet the sparsity.
    """
    method.check_weights(ffns)
    compatibility.check_fit(method, ffns, sparsity, Stored.of(rounding.served_bits(ffns)))


def prepare(method: Pruner, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> Prepared:
    """Prepare a method on a model before any prompt.

    Raises:
        UserError: a missing calibration, or a sparsity that the method cannot meet.
    """
    compatibility.check_fit(method, ffns, sparsity)
    method.check_weights(ffns)
    prepared, mask = Prepared(method, ffns, sparsity, rounding.served_bits(ffns)), method.mask
    fixed = mask.fixed and mask.score is not None
    if calibration is None and (fixed or method.calibrates):
        raise UserError(f"method {method.name} needs a calibration", "pass tokenizer= to prune()")
    prepared.beside = method.beside(ffns, sparsity, calibration)
    if calibration is None:
        return prepared
    if method.choice.calibrates:
        taken = prepared.counts(None, slice(None), True).taken
        thresholds = method.choice.thresholds(ffns, taken, calibration)
        for layer, threshold in zip(prepared.layers, thresholds, strict=True):
            layer.threshold = threshold
    if mask.score is not None:
        for layer, factor in zip(prepared.layers, mask.score.factors(calibration) or (), strict=False):
            layer.factor = torch.zeros_like(factor, device="cpu") if factor.is_meta else factor  # of a shape
    if fixed:
        prepared.fix(calibration)
    if method.compensation.adds:
        prepared.stand_in(calibration)
    return prepared
