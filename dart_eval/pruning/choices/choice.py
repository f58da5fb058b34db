"""Choices: which neurons of the mask a token computes, matrix by matrix.

A choice defines the matrices that it reads for the whole mask before it chooses, and the importance of each neuron to
the token. The number of neurons taken follows from the sparsity, so that the bytes read are met exactly. A new choice
is one class with these two definitions, in a file of its own (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dart_eval.pruning.masks.counts import Budget, Counts, chosen_counts, keep_counts
from dart_eval.pruning.part import Part, option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.calibration.calibration import Calibration


@dataclass
class Token:
    """The tokens of a decoding forward in one layer: their activations, and the neurons that their sequences allow.

    Attributes:
        h: [B, T, F] (or the mask's neurons alone), the input of the down projection.
        gate: [B, T, F], act(gate x); h itself in a plain FFN.
        up: [B, T, F], up x; h itself in a plain FFN.
        context_rms: [B, 1, F] fp32, root of the sum that `observe` returned for the context, up to a factor per
            sequence; None if there is none.
        rows: [K], the neurons that the other tensors hold; None: all.
        allowed: [B or 1, 1, F] bool, the neurons of each sequence's mask.
        taken: [B] long, neurons that each sequence's tokens take.
        written: [B] long, neurons that each sequence's tokens write.
        core: [B, 1, F] bool, the neurons that every token takes; None without a core.
        alone: returns [B, T, F] fp32, the mask's score of each token alone.
        threshold: of the layer, if the choice has one.
    """

    h: Tensor
    gate: Tensor
    up: Tensor
    context_rms: Tensor | None = None
    rows: Tensor | None = None
    allowed: Tensor | None = None
    taken: Tensor | None = None
    written: Tensor | None = None
    core: Tensor | None = None
    alone: Callable[[], Tensor] | None = None
    threshold: float | None = None


def of_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Select neurons: [..., F] -> [..., K]. rows: None for all."""
    return x if rows is None else x.index_select(-1, rows)


class ChoiceLayer:
    """A choice at work on one FFN.

    Attributes:
        threshold: the number that a neuron's importance must exceed; None if the choice takes a count.
    """

    def __init__(self, choice: AnyChoice, ffn: FFN) -> None:
        self.choice, self.ffn = choice, ffn
        self.threshold: float | None = None

    def choose(self, token: Token) -> Tensor:
        """Return the neurons that each token computes to the end: [B, T, F] bool."""
        token.threshold = self.threshold
        return self.choice.choose(token)


@dataclass(frozen=True, kw_only=True)
class AnyChoice(Part):
    """Base of all choices.

    Attributes:
        chooses: whether tokens choose; if not, they compute the whole mask.
        sized: whether the sparsity sets the number of neurons taken, per token or on average.
        exact: whether every token takes the same number of neurons; if not, the number is measured.
        needs_up: whether `observe` needs up x.
        reads_whole: the matrices of a gated FFN that it reads for the whole mask before it chooses: `gate`, `up`, both
            or none. A plain FFN reads `up` in full, which gives h, unless the tuple is empty.
        ranks: whether it uses the mask's score of the token alone, beside a core of the mask that is always taken.
        write_share: share of the taken neurons whose columns of down are read.
        mask_ratio: neurons in the mask, as a multiple of those of a mask alone, unless it holds everything.
    """

    slot = "choice"
    chooses: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    needs_up: ClassVar[bool] = False
    reads_whole: ClassVar[tuple[str, ...]] = ()
    ranks: ClassVar[bool] = False
    write_share: ClassVar[float] = 1.0
    mask_ratio: ClassVar[float] = 1.0

    @property
    def fits_repeats(self) -> bool:  # type: ignore[override]
        return self.exact

    def attach(self, ffns: Sequence[FFN], taken: Sequence[int], calibration: Calibration | None) -> list[ChoiceLayer]:
        """Attach the choice to the FFNs of a model. taken: [L] neurons that a token takes."""
        return [ChoiceLayer(self, ffn) for ffn in ffns]

    # -- what it reads ---------------------------------------------------------------------------------------

    def mask_share(self, read: float, matrices: int) -> float:
        """Return the share of the neurons in the mask. read: share of the weights that a token reads."""
        return min(1.0, self.mask_ratio * read)

    def counts(self, budget: Budget) -> Counts:
        """Return the neurons per layer: in the mask, taken by a token, and written by it.

        Raises:
            UserError: the matrices read in full exceed what the sparsity leaves.
        """
        full_matrices = min(len(self.reads_whole), budget.matrices - 1)
        ratio = None if budget.whole_mask else self.mask_ratio
        share = self.write_share if self.exact else 1.0  # all neurons above a threshold are written
        return chosen_counts(budget, full_matrices, ratio, share, self.title)

    # -- what it takes ---------------------------------------------------------------------------------------

    def importance(self, token: Token) -> Tensor:
        """Return the importance of each neuron to each token: [B, T, F], not negative, in any dtype."""
        raise NotImplementedError

    def core(self, taken: Tensor) -> Tensor:
        """Return the number of neurons that every token takes, if it `ranks`. taken: taken in all, any shape."""
        raise NotImplementedError

    def choose(self, token: Token) -> Tensor:
        """Return the neurons that each token computes to the end: [B, T, F] bool."""
        from dart_eval.kernels.top import largest

        assert token.allowed is not None and token.taken is not None and token.written is not None
        if token.threshold is not None:
            return (self.importance(token).float() > token.threshold) & token.allowed  # it is finer than bfloat16
        chosen = largest(self.importance(token), token.allowed, token.taken)
        if bool((token.written < token.taken).any()):
            chosen = largest(token.h.abs(), chosen, token.written)
        return chosen

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return 3 * mask if self.chooses else 0.0  # a score, its factor, and |h| of the taken neurons


@dataclass(frozen=True, kw_only=True)
class Choice(AnyChoice):
    """Base of choices that work with every mask: they need no ranking of a sequence's neurons."""


@dataclass(frozen=True, kw_only=True)
class All(Choice):
    """Every token computes every neuron of the mask."""

    name = "none"
    summary = "lets every token compute the whole mask"
    chooses = False

    def counts(self, budget: Budget) -> Counts:
        counts = keep_counts(budget.densities, budget.sizes, budget.sparsity)
        return Counts(counts, counts, counts, 0)


@dataclass(frozen=True, kw_only=True)
class Inside(Choice):
    """Base of choices by one number of each neuron, inside any mask."""

    mask_ratio: float = option(  # type: ignore[misc]
        1.6, "neurons in the mask, as a multiple of those of a mask alone (mask=everything ignores it)", least=1
    )
