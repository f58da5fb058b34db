"""A method on a model before any prompt: what it makes of each layer, and how many neurons these keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning import compatibility
from dart_eval.pruning.calibration.calibration import Calibration, means
from dart_eval.pruning.experts.rerouted import Rerouted
from dart_eval.pruning.inputs.attached import AttachedInputs
from dart_eval.pruning.masks.change import ChangeState
from dart_eval.pruning.masks.counts import Counts, mean_cost
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.session.layer import Fitted
from dart_eval.util.bits import OWN_BITS
from dart_eval.util.errors import UserError
from dart_eval.weights import rounding


@dataclass
class Prepared:
    """A method on the layers of one model, at one sparsity.

    Attributes:
        unit: bits of an FFN weight, on average, of which sparsity leaves out a share. share: the same / those of the
            model's own dtype.
        layers: of each FFN. beside: what leaves out something else than neurons; None.
        prices: what is read of a neuron where there are previews, on average; None. stored: bytes that they take beside
            the model.
    """

    method: Pruner
    ffns: Sequence[FFN]
    sparsity: float
    unit: float
    beside: AttachedInputs | Rerouted | None = None

    def __post_init__(self) -> None:
        method, sizes = self.method, [f.size for f in self.ffns]
        allocation, choice = method.allocation, method.choice
        allocation.check_sparsity(self.sparsity, len(self.ffns))
        self._dense = Counts(sizes, sizes, sizes, 0)
        self.share = self.unit / OWN_BITS
        each = choice.prices(self.ffns, method.mask.holds_all, self.unit)
        self.prices = None if each is None else mean_cost(each, [f.size * f.width for f in self.ffns])
        self.stored = choice.stored(self.ffns)
        # Refused now where the sparsity cannot be met at all.
        varies = allocation.needs_change or allocation.needs_scores
        self._usual = None if varies else self._counts(None, slice(None))
        usual = self._counts_at([1 - self.sparsity] * len(sizes))
        if each is not None and self.sparsity:
            paid = [choice.paid(prices) for prices in each]
        else:
            paid = method.paid(self.ffns, self.sparsity, self.unit, usual.full_matrices)
        self.layers = [Fitted(method, ffn, of_layer) for ffn, of_layer in zip(self.ffns, paid, strict=True)]
        self._computed = self._products(usual)

    def counts(
        self, change: ChangeState | None, rows: slice, has_context: bool, scores: Sequence[Tensor] | None = None
    ) -> Counts:
        """Neurons of the mask, those that a token takes and those that it writes, of the sequences `rows` together.

        Args:
            scores: theirs, per layer [F], where the allocation goes by them.
        """
        if self.method.needs_context and not has_context:
            return self._dense  # nothing can be chosen: they run dense
        return self._counts(change, rows, scores) if self._usual is None else self._usual

    def _counts(self, change: ChangeState | None, rows: slice, scores: Sequence[Tensor] | None = None) -> Counts:
        return self._counts_at(self.method.allocation.densities(self.sparsity, len(self.ffns), change, rows, scores))

    def _counts_at(self, densities: Sequence[float]) -> Counts:
        return self.method.counts(densities, self.ffns, self.sparsity, self.prices)

    def _products(self, counts: Counts) -> float:
        matrices = self.ffns[0].matrices
        rows = sum((matrices - 1) * t + w for t, w in zip(counts.taken, counts.written, strict=True))
        return rows / (matrices * sum(f.size for f in self.ffns))

    def computed(self, read: float) -> float:
        """Share of the FFN weights that a pruned token multiplies; what an image takes is overhead.

        Args:
            read: share of the FFN weights that it reads.
        """
        return read if self.prices is None else self._computed

    def nbytes(self) -> int:
        """Bytes of what is kept for all sequences; previews count as they would be stored."""
        beside = self.stored + (0 if self.beside is None else self.beside.nbytes())
        return beside + sum(layer.nbytes() for layer in self.layers)

    def fix(self, calibration: Calibration) -> None:
        """Make the masks that all sequences have."""
        score, sums = self.method.mask.score, None
        assert score is not None
        if score.observes:
            sums = means(calibration, score.observe) if score.per_token else calibration.sums(score.observe)
        scores = [
            score.combine(None if sums is None else sums[i][None], layer.factor) for i, layer in enumerate(self.layers)
        ]
        self._usual = self._counts(None, slice(None), [s[0] for s in scores])
        for layer, some, count in zip(self.layers, scores, self._usual.mask, strict=True):
            layer.mask = layer.ffn.mask_of(top_k_mask, some, torch.tensor([count])).to(device_of(layer.ffn))
            layer.factor = None  # it is in the mask

    @torch.no_grad()
    def stand_in(self, calibration: Calibration) -> None:
        """Keep the means that stand in for neurons, or the constants that follow from them where masks are fixed."""
        at_once = self.method.mask.fixed and self.method.compensation.adds
        for layer, moments in zip(self.layers, calibration.moments(), strict=True):
            if at_once:
                layer.constant = layer.stand_in(moments.mean[None], layer.masked, floating(layer.ffn))
            else:
                layer.mean = moments.mean


def floating(ffn: FFN) -> torch.dtype:
    """The dtype of the layer's activations before any has been seen: that of down, or of what is not quantised."""
    modules = (ffn.down, ffn.residual, ffn.attention)
    found = (p.dtype for module in modules for p in module.parameters() if p.is_floating_point())
    return next(found, torch.float32)


def prepare(
    method: Pruner, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None, unit: float | None = None,
    orders: Sequence[Tensor | None] | None = None,
) -> Prepared:  # fmt: skip
    """Make what can be made before any prompt.

    Args:
        unit: bits of an FFN weight, on average, of which sparsity leaves out a share; None: of those served now.
        orders: per layer, of the columns of gate and up as they are served, see `Preview`; None: their own.

    Raises:
        UserError: the method needs a calibration and there is none, or the sparsity does not fit it.
    """
    compatibility.check_fit(method, ffns, sparsity)
    method.check_weights(ffns, sparsity)
    made, mask = Prepared(method, ffns, sparsity, unit or rounding.served_bits(ffns)), method.mask
    fixed = mask.fixed and mask.score is not None
    if calibration is None and (fixed or method.calibrates):
        raise UserError(f"method {method.name} needs a calibration", "pass tokenizer= to prune()")
    made.beside = method.beside(ffns, sparsity, calibration)
    counted = method.choice.exact or not method.choice.calibrates
    taken = [] if counted else made.counts(None, slice(None), True).taken
    if method.choice.chooses:
        choosers = method.choice.attach(ffns, orders or [None] * len(ffns), taken, calibration)
        for layer, chooser in zip(made.layers, choosers, strict=True):
            layer.chooser = chooser
    if calibration is None:
        return made
    if mask.score is not None:
        for layer, factor in zip(made.layers, mask.score.factors(calibration) or (), strict=False):
            layer.factor = factor
    if fixed:
        made.fix(calibration)
    if method.compensation.calibrates:
        made.stand_in(calibration)
    return made
