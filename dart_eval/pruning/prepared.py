"""What a method makes of a model before any prompt: fixed masks, factors on scores, counts of neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval import rounding
from dart_eval.allocation import Counts
from dart_eval.errors import UserError
from dart_eval.ffn import FFN, device_of
from dart_eval.pruning.calibration import Calibration, means
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.parts.allocations import ChangeState
from dart_eval.pruning.previews import Fine, previews, prices, stored
from dart_eval.pruning.top import top_k_mask


@dataclass
class Prepared:
    """A method on the layers of one model, at one sparsity.

    Attributes:
        masks: per layer [1, F] bool, where masks are the same for all sequences.
        factors: per layer [F] fp32, what no token changes in a score; None for nothing.
        previews: per layer, the images of gate and up; None where nothing is previewed.
        prices: what these make tokens read; None. stored: bytes that they take beside the model.
        fine: the weights as decoding forwards have them, where these read the first bits alone; else None.
        whole: matrices of which a token reads the rows of the whole mask before it chooses; of images their share.
        paid: what is read of a neuron, see `_paid`.
        share: FFN weight bytes as they are served / those of the model's own dtype.
    """

    method: Pruner
    ffns: Sequence[FFN]
    sparsity: float
    masks: list[Tensor] | None = None
    factors: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self.method.allocation.check(self.sparsity, len(self.ffns))
        choice, sizes = self.method.choice, [f.size for f in self.ffns]
        image = choice.image
        self._dense = Counts(sizes, sizes, sizes, 0)
        self.share = rounding.share(self.ffns)
        self.prices = None if image is None else prices(image, choice.precision if self.sparsity else 0, self.ffns)
        self.previews = None if image is None else previews(image, self.ffns, choice.grades)
        self.stored = 0 if image is None else stored(image, self.ffns, choice.grades)
        self.fine = None
        if image is not None and self.sparsity:
            self.fine = Fine.of(self.ffns, image.mantissa(choice.precision))
        # Refused now where the sparsity cannot be met at all.
        self._usual = None if self.method.allocation.needs_change else self._counts(None, slice(None))
        usual = self._counts_at([1 - self.sparsity] * len(sizes))
        self.whole = usual.whole
        self.paid = self._paid()
        self._computed = self._products(usual)

    def counts(self, change: ChangeState | None, rows: slice, has_context: bool) -> Counts:
        """Neurons of the mask, those that a token takes and those that it writes, of the sequences `rows` together."""
        if self.method.needs_context and not has_context:
            return self._dense  # nothing can be chosen: they run dense
        return self._counts(change, rows) if self._usual is None else self._usual

    def _counts(self, change: ChangeState | None, rows: slice) -> Counts:
        return self._counts_at(self.method.allocation.densities(self.sparsity, len(self.ffns), change, rows))

    def _counts_at(self, densities: Sequence[float]) -> Counts:
        sizes, whole_mask = [f.size for f in self.ffns], self.method.mask.whole
        matrices = self.ffns[0].matrices
        return self.method.choice.counts(densities, sizes, self.sparsity, matrices, whole_mask, self.prices)

    def _paid(self) -> tuple[float, float, float]:
        """What is read of each neuron of the mask, of each one taken and of each one written, in rows of one matrix."""
        prices = self.prices
        if prices is not None and not self.sparsity:  # no image is looked at
            return 0.0, self.ffns[0].matrices - 1.0, 1.0
        if prices is None:
            return self.whole, self.ffns[0].matrices - 1 - self.whole, 1.0
        if not self.method.choice.grades or prices.coarse is None:
            return prices.whole, prices.taken, prices.written
        return prices.whole, prices.taken + prices.written - prices.coarse, prices.coarse  # those taken are written too

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
            return torch.ones(1, ffn.size, dtype=torch.bool, device=device_of(ffn))
        return self.masks[layer]

    def factor(self, layer: int) -> Tensor | None:
        """The factor of a layer's scores, or None."""
        return None if self.factors is None else self.factors[layer]

    def nbytes(self) -> int:
        """Bytes of what is kept for all sequences; images count as they would be stored."""
        return self.stored + sum(t.numel() * t.element_size() for t in [*(self.masks or []), *(self.factors or [])])


def prepare(method: Pruner, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> Prepared:
    """Make what can be made before any prompt.

    Raises:
        UserError: the method needs a calibration and there is none, or the sparsity does not fit it.
    """
    made, mask = Prepared(method, ffns, sparsity), method.mask
    if mask.score is None:
        return made
    if calibration is None:
        if mask.fixed:
            raise UserError(f"method {method.name} needs a calibration", "pass tokenizer= to prune()")
        return made
    made.factors = mask.score.factors(calibration)
    if mask.fixed:
        sums = None
        if mask.score.observes:
            observe = mask.score.observe
            sums = means(calibration, observe) if mask.score.per_token else calibration.sums(observe)
        counts = made.counts(None, slice(None), True).mask
        made.masks = []
        for i, ffn in enumerate(ffns):
            scores = mask.score.combine(None if sums is None else sums[i][None], made.factor(i))
            made.masks.append(top_k_mask(scores, torch.tensor([counts[i]])).to(device_of(ffn)))
        made.factors = None  # they are in the masks
    return made
