"""What a method makes of a model before any prompt: fixed masks, factors on scores, counts of neurons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning import fits
from dart_eval.pruning.calibration.calibration import Calibration, means
from dart_eval.pruning.choices.choice import ChoiceLayer
from dart_eval.pruning.experts.rerouted import Rerouted
from dart_eval.pruning.inputs.finer import Finer
from dart_eval.pruning.masks.change import ChangeState
from dart_eval.pruning.masks.counts import Counts, mean_prices
from dart_eval.pruning.masks.standins import constant, floating
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.session.sequence import Sums, nbytes
from dart_eval.util.bits import OWN_BITS
from dart_eval.util.errors import UserError
from dart_eval.weights import rounding


@dataclass
class Prepared:
    """A method on the layers of one model, at one sparsity.

    Attributes:
        masks: per layer [1, F] bool, where masks are the same for all sequences.
        factors: per layer [F] fp32, what no token changes in a score; None for nothing.
        means: per layer [F] fp32, of each neuron on the calibration text, where these stand in for it; else None.
        constants: per layer [1, D] fp32, what stands in for the neurons outside fixed masks; None where nothing does,
            or another constant for each sequence.
        choosers: per layer, the choice at work.
        beside: what leaves out something else than neurons; None.
        prices: what is read of a neuron where there are previews, on average; None. stored: bytes that they take beside
            the model. paid: [L, 4] fp64, what is read of a neuron, see `Pruner.paid`.
        unit: bits of an FFN weight, on average, of which sparsity leaves out a share.
        share: the same / those of the model's own dtype.
    """

    method: Pruner
    ffns: Sequence[FFN]
    sparsity: float
    unit: float
    masks: list[Tensor] | None = None
    factors: list[Tensor] | None = None
    means: list[Tensor] | None = None
    constants: list[Tensor] | None = None
    choosers: list[ChoiceLayer] = dataclasses.field(default_factory=list)
    beside: Finer | Rerouted | None = None

    def __post_init__(self) -> None:
        self.method.allocation.check(self.sparsity, len(self.ffns))
        choice, sizes = self.method.choice, [f.size for f in self.ffns]
        self._dense = Counts(sizes, sizes, sizes, 0)
        self.share = self.unit / OWN_BITS
        whole_mask = self.method.mask.whole
        each = choice.prices(self.ffns, whole_mask, self.unit)
        self.prices = None if each is None else mean_prices(each, [f.size * f.width for f in self.ffns])
        self.stored = choice.stored(self.ffns)
        # Refused now where the sparsity cannot be met at all.
        allocation = self.method.allocation
        varies = allocation.needs_change or allocation.needs_scores
        self._usual = None if varies else self._counts(None, slice(None))
        usual = self._counts_at([1 - self.sparsity] * len(sizes))
        if each is not None and self.sparsity:
            paid = [choice.paid(prices) for prices in each]
        else:
            paid = self.method.paid(self.ffns, self.sparsity, self.unit, usual.whole)
        self.paid = torch.tensor(paid, dtype=torch.float64)
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

    def scores(self, sums: Sums | None, rows: slice, per_token: Callable[[Tensor], Tensor]) -> list[Tensor] | None:
        """Per layer [F], the scores of the sequences `rows` together; None where the allocation does not go by them.

        Args:
            sums: what the score keeps of them. per_token: of sums, where sequences are compared.
        """
        score = self.method.mask.score
        if not self.method.allocation.needs_scores or score is None or sums is None or sums.layers[0] is None:
            return None
        means = [per_token(sums[i])[rows].mean(0, keepdim=True) for i in range(len(self.ffns))]
        return [score.combine(mean, self.factor(i))[0] for i, mean in enumerate(means)]

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

    def mask(self, layer: int) -> Tensor:
        """[1, F] bool, where masks are the same for all sequences."""
        ffn = self.ffns[layer]
        if self.masks is None:  # of everything, which nothing has to be kept for
            return torch.ones(1, ffn.pool, dtype=torch.bool, device=device_of(ffn))
        return self.masks[layer]

    def factor(self, layer: int) -> Tensor | None:
        """The factor of a layer's scores, or None."""
        return None if self.factors is None else self.factors[layer]

    def spent(self, taken: Tensor, layer: int) -> Tensor:
        """What tokens read of a layer that take so many neurons of it and write them, counted in neurons."""
        every, whole, rest, write = self.paid[layer].tolist()
        return ((every + whole) * self.ffns[layer].size + (rest + write) * taken) / self.ffns[layer].matrices

    def nbytes(self) -> int:
        """Bytes of what is kept for all sequences; images count as they would be stored."""
        beside = self.stored + (0 if self.beside is None else self.beside.nbytes())
        return beside + nbytes([self.masks, self.factors, self.means, self.constants])

    def fix(self, calibration: Calibration) -> None:
        """Make the masks that all sequences have."""
        score = self.method.mask.score
        assert score is not None
        sums = None
        if score.observes:
            sums = means(calibration, score.observe) if score.per_token else calibration.sums(score.observe)
        scores = [score.combine(None if sums is None else sums[i][None], self.factor(i)) for i in range(len(self.ffns))]
        self._usual = self._counts(None, slice(None), [s[0] for s in scores])
        self.masks = [
            ffn.take(top_k_mask, s, torch.tensor([count])).to(device_of(ffn))
            for ffn, s, count in zip(self.ffns, scores, self._usual.mask, strict=True)
        ]
        self.factors = None  # they are in the masks

    @torch.no_grad()
    def stand_in(self, calibration: Calibration) -> None:
        """Keep the means that stand in for neurons, or the constants that follow from them where masks are fixed."""
        means = [m.mean for m in calibration.moments()]
        if not (self.method.mask.fixed and self.method.compensation.adds):
            self.means = means
            return
        self.constants = [
            constant(ffn, mean[None], self.mask(i), floating(ffn))
            for i, (ffn, mean) in enumerate(zip(self.ffns, means, strict=True))
        ]


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
    fits.check(method, ffns, sparsity)
    method.check_weights(ffns, sparsity)
    made, mask = Prepared(method, ffns, sparsity, unit or rounding.served_bits(ffns)), method.mask
    fixed = mask.fixed and mask.score is not None
    if calibration is None and (fixed or method.calibrates):
        raise UserError(f"method {method.name} needs a calibration", "pass tokenizer= to prune()")
    made.beside = method.beside(ffns, sparsity, calibration)
    counted = method.choice.exact or not method.choice.calibrates
    taken = [] if counted else made.counts(None, slice(None), True).taken
    if method.choice.chooses:
        made.choosers = method.choice.attach(ffns, orders or [None] * len(ffns), taken, calibration)
    if calibration is None:
        return made
    if mask.score is not None:
        made.factors = mask.score.factors(calibration)
    if fixed:
        made.fix(calibration)
    if method.compensation.calibrates:
        made.stand_in(calibration)
    return made
