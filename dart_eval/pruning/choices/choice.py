"""Choices: which neurons of the mask a token computes, matrix by matrix.

A choice says which matrices it reads for the whole mask before it can choose, and how much each neuron matters to the
token; how many neurons it then takes follows from the sparsity, so that the bytes read are met exactly. A new choice is
those two things in one class, in a file of its own (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dart_eval.pruning.masks.counts import Budget, Counts, ReadCost, chosen_counts, keep_counts
from dart_eval.pruning.part import Part, option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.calibration.calibration import Calibration
    from dart_eval.pruning.choices.serving import Serving
    from dart_eval.util.bits import Stored


@dataclass
class Token:
    """The tokens of a decoding forward in one layer: what it has computed for them, and what their sequences allow.

    Attributes:
        h: [B, T, F] (or the mask's neurons alone), the input of the down projection.
        gate: the same of act(gate x); of a plain FFN h itself.
        up: the same of up x; of a plain FFN h itself.
        context_rms: [B, 1, F] fp32, the root of what `observe` summed over the context's tokens, up to a factor per
            sequence; None where it sums nothing.
        x: [B, T, D], the input of the FFN. rows: [K], the neurons that the others have, where they are not all.
        allowed: [B or 1, 1, F] bool, the neurons of each sequence's mask.
        taken, written: [B] long, how many of them each sequence's tokens take and write.
        core: [B, 1, F] bool, the neurons that every token takes; None where the choice has no core.
        alone: gives [B, T, F] fp32, the mask's score as it would be of each token alone.
        preview: [B, T, F], h as a preview of gate and up has it; None where there is none.
        expected: [B, T, F] fp32, the square of h that is to be expected from it.
        columns: [B or 1, T or 1, F] fp32, squares of the norms of the neurons' columns of down, where these count.
        threshold: of the layer, where the choice has one.
    """

    h: Tensor
    gate: Tensor
    up: Tensor
    context_rms: Tensor | None = None
    x: Tensor | None = None
    rows: Tensor | None = None
    allowed: Tensor | None = None
    taken: Tensor | None = None
    written: Tensor | None = None
    core: Tensor | None = None
    alone: Callable[[], Tensor] | None = None
    preview: Tensor | None = None
    expected: Tensor | None = None
    columns: Tensor | None = None
    threshold: float | None = None


def of_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """[..., F] -> [..., K], of these neurons; as it is where all are asked for."""
    return x if rows is None else x.index_select(-1, rows)


class ChoiceLayer:
    """A choice at work on one FFN.

    Attributes:
        threshold: the number that a neuron's importance must be above; None where the choice counts.
    """

    def __init__(self, choice: AnyChoice, ffn: FFN) -> None:
        self.choice, self.ffn = choice, ffn
        self.threshold: float | None = None

    def look(self, token: Token) -> Token:
        """The token with what the choice reads before it chooses, beside what the layer has computed."""
        token.threshold = self.threshold
        return token

    def choose(self, token: Token) -> Tensor:
        """The neurons that each token computes to the end: [B, T, F] bool."""
        return self.choice.choose(self.look(token))

    def extra(self) -> Tensor | None:
        """[B, T, D], to be added to the FFN's output for the tokens that chose last; None: nothing."""
        return None


@dataclass(frozen=True, kw_only=True)
class AnyChoice(Part):
    """Base of all choices.

    Attributes:
        chooses: whether tokens choose; if not, they compute the whole mask.
        sized: whether the sparsity decides how many neurons tokens take, each of them or on average.
        exact: whether every token takes as many neurons; if not, the number differs and is measured.
        needs_up: whether `observe` needs up x.
        reads_whole: the matrices of a gated FFN of which it reads the rows of the whole mask before it chooses: `gate`,
            `up`, both or none. A plain FFN has `up` alone, which tells its h: it is read whole unless there are none.
        previews: whether it reads a preview of gate and up for the whole mask in their place (`previews.Previewing`).
        ranks: whether it goes by the mask's score of the token alone, beside a core of the mask that is always taken.
        adds: whether something is added to the FFN's output for what is not taken (`ChoiceLayer.extra`).
        upper_bound: whether it knows h before it has read what h is made of.
        write_share: of the neurons that it takes, the share whose columns of down are read.
        mask_ratio: neurons in the mask, as a multiple of the weights read, where the mask is not of everything.
        gathers: whether `copied` execution can read the chosen rows alone (`kernels.chosen`, `previewed`).
    """

    slot = "choice"
    chooses: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    needs_up: ClassVar[bool] = False
    reads_whole: ClassVar[tuple[str, ...]] = ()
    previews: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    upper_bound: ClassVar[bool] = False
    write_share: ClassVar[float] = 1.0
    mask_ratio: ClassVar[float] = 1.0
    gathers: ClassVar[bool] = False

    @property
    def fits_repeats(self) -> bool:  # type: ignore[override]
        return self.exact

    def at(self, read: float) -> AnyChoice:
        """The choice where so large a share of 16-bit weights' bytes is read: what goes by that is settled."""
        return self

    def serving(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> Serving | None:
        """What stands in for weights of 16 bits inside a session; None: they stay as they are."""
        return None

    def check_weights(self, ffns: Sequence[FFN], sparsity: float) -> None:
        """Refuse weights that it is not made for.

        Raises:
            UserError: with the reason.
        """

    def attach(
        self, ffns: Sequence[FFN], orders: Sequence[Tensor | None], taken: Sequence[int],
        calibration: Calibration | None,
    ) -> list[ChoiceLayer]:  # fmt: skip
        """The choice at work on the FFNs of a model.

        Args:
            orders: per layer, of the columns of gate and up, see `Preview`. taken: [L] neurons that a token takes.
        """
        return [ChoiceLayer(self, ffn) for ffn in ffns]

    # -- what it reads ---------------------------------------------------------------------------------------

    def prices(self, ffns: Sequence[FFN], everything: bool, unit: float) -> list[ReadCost] | None:
        """Per layer, what is read of a neuron, where that is not rows and columns of whole matrices; else None.

        Args:
            everything: all neurons are in the mask. unit: bits of a weight, of a model whose sparsity is 0.
        """
        return None

    def prices_of(self, sizes: Sequence[int], width: int, matrices: int, bits: Stored) -> ReadCost | None:
        """The same from sizes alone, in the worst layer. bits: of a weight, as it is served."""
        return None

    def paid(self, prices: ReadCost) -> tuple[float, float, float, float]:
        """What is read of each neuron, and besides of each in the mask, taken and written."""
        return prices.always, prices.in_mask, prices.taken, prices.written

    def stored(self, ffns: Sequence[FFN]) -> int:
        """Bytes that it keeps beside the model."""
        return 0

    def mask_share(self, read: float, matrices: int) -> float:
        """The share of the neurons in the mask. read: share of the weights that a token reads."""
        return min(1.0, self.mask_ratio * read)

    def counts(self, budget: Budget) -> Counts:
        """How many neurons of each layer are in the mask, are taken by a token, and are written by it.

        Raises:
            UserError: what it reads whole is more than the sparsity leaves.
        """
        whole = min(len(self.reads_whole), budget.matrices - 1)
        ratio = None if budget.whole_mask else self.mask_ratio
        share = self.write_share if self.exact else 1.0  # what is above a threshold is written
        return chosen_counts(budget, whole, ratio, share, self.title)

    # -- what it takes ---------------------------------------------------------------------------------------

    def parts_of(self, x: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The parts of x by which a preview goes in all of its bits, and in one bit fewer; None: no such part.

        Args:
            x: [..., D]. order: [D], where columns of gate and up lie elsewhere than their entries: these, in order.
        """
        return x, None

    def roughly(self, token: Token, kept: Tensor) -> Tensor:
        """[B, T, F] bool, the neurons that write as the preview has them, where it `adds`. kept: those taken."""
        raise NotImplementedError

    def importance(self, token: Token) -> Tensor:
        """How much each neuron matters to each token: [B, T, F], not negative, in any dtype."""
        raise NotImplementedError

    def core(self, taken: Tensor) -> Tensor:
        """How many neurons of the mask every token takes, where it `ranks`. taken: how many it takes, any shape."""
        raise NotImplementedError

    def choose(self, token: Token) -> Tensor:
        """The neurons that each token computes to the end: [B, T, F] bool."""
        from dart_eval.kernels.top import largest

        assert token.allowed is not None and token.taken is not None and token.written is not None
        if token.threshold is not None:
            return (self.importance(token) > token.threshold) & token.allowed
        kept = largest(self.importance(token), token.allowed, token.taken)
        if bool((token.written < token.taken).any()):
            kept = largest(token.h.abs(), kept, token.written)
        return kept

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return 3 * mask if self.chooses else 0.0  # a score, its factor, and |h| of what is taken


@dataclass(frozen=True, kw_only=True)
class Choice(AnyChoice):
    """Base of choices that go with every mask: they need no ranking of a sequence's neurons."""


@dataclass(frozen=True, kw_only=True)
class All(Choice):
    """Every token computes every neuron of the mask."""

    name = "none"
    summary = "has every token compute all of the mask"
    chooses = False

    def counts(self, budget: Budget) -> Counts:
        counts = keep_counts(budget.densities, budget.sizes, budget.sparsity)
        return Counts(counts, counts, counts, 0)


@dataclass(frozen=True, kw_only=True)
class Inside(Choice):
    """Base of choices by one number of each neuron, inside any mask."""

    mask_ratio: float = option(  # type: ignore[misc]
        1.6,
        "neurons in the mask, as a multiple of the weights read (mask=everything ignores it)",
        least=1,
    )
