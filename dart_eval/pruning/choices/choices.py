"""Choices: which neurons of the mask a token computes, matrix by matrix.

A choice says which matrices it reads for the whole mask before it can choose, and how much each neuron matters to the
token; how many neurons it then takes follows from the sparsity, so that the bytes read are met exactly. A new choice is
those two things in one class (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dart_eval.pruning.choices.images import Columns, Image
from dart_eval.pruning.masks.counts import Counts, Prices, chosen_counts, keep_counts
from dart_eval.pruning.part import Part, option
from dart_eval.util.bits import SCALE_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True)
class Token:
    """What a layer has computed for the tokens of a decoding forward.

    Attributes:
        h: [B, T, F] (or the mask's neurons alone), the input of the down projection.
        gate: the same of act(gate x); of a plain FFN h itself.
        up: the same of up x; of a plain FFN h itself.
        usual: [B, 1, F] fp32, the root of what `observe` kept of the context's tokens, up to a factor per sequence;
            None where it keeps nothing.
        preview: [B, T, F], h as an image of gate and up has it; None where there is no image.
        expected: [B, T, F] fp32, the square of h that is to be expected from it.
        columns: [B or 1, T or 1, F] fp32, squares of the norms of the neurons' columns of down; None where nothing goes
            by it.
        core: [B, 1, F] bool, the neurons that every token takes; None where the choice does not rank by the score.
        score: [B, T, F] fp32, the mask's score as it would be of this token alone.
        threshold: of the layer, where the choice has one.
    """

    h: Tensor
    gate: Tensor
    up: Tensor
    usual: Tensor | None
    preview: Tensor | None = None
    expected: Tensor | None = None
    columns: Tensor | None = None
    core: Tensor | None = None
    score: Tensor | None = None
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class Choice(Part):
    """Base of all choices.

    Attributes:
        chooses: whether tokens choose; if not, they compute the whole mask.
        sized: whether the sparsity decides how many neurons tokens take, each of them or on average.
        threshold: `calibrated` where each layer has one from a calibration text in place of a count.
        pools: whether that is a quantile over all neurons of all tokens; else the mean of each token's least one taken.
        needs_up: whether `observe` needs up x.
        reads_whole: the matrices of a gated FFN of which it reads the rows of the whole mask before it chooses: `gate`,
            `up`, both or none. A plain FFN has `up` alone, which tells its h: it is read whole unless there are none.
        upper_bound: whether it knows h before it has read what h is made of.
        write_share: of the neurons that it takes, the share whose columns of down are read.
        mask_ratio: neurons in the mask, as a multiple of the weights read, where the mask is not of everything.
        image: what every token reads of gate and up for the whole mask before it chooses; None: matrices whole.
        doubts: whether it goes by what the image leaves out of each row, too.
        grades: whether neurons that are not taken may write as the image shows them. Then it goes by `Token.columns`.
        fewer: bits that a second, rougher image of gate and up lacks, where there is one.
        ranks: whether it goes by the mask's score of the token alone, beside a core of the mask that is always taken.
        gathers: whether `copied` execution can read the chosen rows alone (`kernels.chosen`, `previewed`).
    """

    slot = "choice"
    chooses: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    threshold: ClassVar[str] = "none"
    pools: ClassVar[bool] = True
    needs_up: ClassVar[bool] = False
    reads_whole: ClassVar[tuple[str, ...]] = ()
    upper_bound: ClassVar[bool] = False
    write_share: ClassVar[float] = 1.0
    mask_ratio: ClassVar[float] = 1.0
    image: ClassVar[Image | None] = None
    doubts: ClassVar[bool] = True
    grades: ClassVar[bool] = False
    fewer: ClassVar[int] = 0
    ranks: ClassVar[bool] = False
    gathers: ClassVar[bool] = False

    @property
    def exact(self) -> bool:
        """Whether every token takes as many neurons; if not, the number differs and is measured."""
        return self.threshold == "none"

    def at(self, read: float) -> Choice:
        """The choice where so large a share of 16-bit weights' bytes is read: what goes by that is settled."""
        return self

    def columns(self, width: int) -> Columns:
        """Which share of the columns of gate and up a preview reads. width: how many there are."""
        return Columns()

    def shown(self, x: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The parts of x by which a preview goes in all of its bits, and in one bit fewer; None: no such part.

        Args:
            x: [..., D]. order: [D], where columns of gate and up lie elsewhere than their entries: these, in order.
        """
        return x, None

    def importance(self, token: Token) -> Tensor:
        """How much each neuron matters to each token: [B, T, F], not negative, in any dtype."""
        raise NotImplementedError

    def doubt_bits(self, width: int) -> float:
        """Bits of a neuron's doubts for each weight of its row; none where the image leaves nothing out."""
        if self.image is None or self.image.exact or not self.doubts:
            return 0.0
        return SCALE_BITS * (1 + self.fewer) / width

    def norm_bits(self, width: int) -> float:
        """Bits of the norm of a neuron's column of down, for each of its weights; none where nothing goes by it."""
        return SCALE_BITS / width if self.grades else 0.0

    def core(self, taken: Tensor) -> Tensor:
        """How many neurons of the mask every token takes, where it `ranks`. taken: how many it takes, any shape."""
        raise NotImplementedError

    def mask_share(self, read: float, matrices: int) -> float:
        """The share of the neurons in the mask. read: share of the weights that a token reads."""
        return min(1.0, self.mask_ratio * read)

    def counts(
        self, densities: Sequence[float], sizes: Sequence[int], sparsity: float, matrices: int, whole_mask: bool,
        image: Prices | None = None,
    ) -> Counts:  # fmt: skip
        """How many neurons of each layer are in the mask, are taken by a token, and are written by it.

        Args:
            densities: [L] share of the weights of each layer that is read, mean 1 - sparsity.
            sizes: [L] neurons of every layer. matrices: 3 for gated FFNs and 2 for plain ones.
            whole_mask: the mask is of everything.
            image: what is read of a neuron, where there is one.

        Raises:
            UserError: what it reads whole is more than the sparsity leaves.
        """
        whole = min(len(self.reads_whole), matrices - 1)
        ratio = None if whole_mask else self.mask_ratio
        share = self.write_share if self.exact else 1.0  # what is above a threshold is written
        return chosen_counts(densities, sizes, sparsity, matrices, whole, ratio, share, self.title, image)

    def take(self, token: Token, allowed: Tensor, counts: tuple[Tensor, Tensor]) -> Tensor:
        """The neurons that each token computes to the end: [B, T, F] bool.

        Args:
            allowed: [B or 1, 1, F] bool, the neurons of each sequence's mask.
            counts: how many of them each sequence's tokens take and write, [B] each.
        """
        from dart_eval.kernels.top import largest

        taken, written = counts
        if token.threshold is not None:
            return (self.importance(token) > token.threshold) & allowed
        kept = largest(self.importance(token), allowed, taken)
        if bool((written < taken).any()):
            kept = largest(token.h.abs(), kept, written)
        return kept

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return 3 * mask if self.chooses else 0.0  # a score, its factor, and |h| of what is taken


@dataclass(frozen=True, kw_only=True)
class All(Choice):
    """Every token computes every neuron of the mask."""

    name = "none"
    summary = "has every token compute all of the mask"
    chooses = False

    def counts(
        self, densities: Sequence[float], sizes: Sequence[int], sparsity: float, matrices: int, whole_mask: bool,
        image: Prices | None = None,
    ) -> Counts:  # fmt: skip
        counts = keep_counts(densities, sizes, sparsity)
        return Counts(counts, counts, counts, 0)


@dataclass(frozen=True, kw_only=True)
class GateUp(Choice):
    """A token takes the largest |act(gate x)_j| * rms of (up x)_j over the context, and writes the largest |h| of them.

    It reads gate for the whole mask, up for the neurons taken, and down for those written. This choice is this
    project's own.
    """

    name = "gate-up"
    summary = "takes the largest |act(gate x)| times the context's rms of up x; of these it writes the largest |h|"
    observes = True
    needs_up = True
    reads_whole = ("gate",)
    gathers = True
    mask_ratio: float = option(1.6, "neurons in the mask, as a multiple of the weights read", least=1, most=3)  # type: ignore[misc]
    write_share: float = option(1.0, "of the neurons taken, the share whose columns of down are read", above=0, most=1)  # type: ignore[misc]

    def observe(self, h: Tensor, up: Tensor | None, weight: Tensor) -> Tensor | None:
        return None if up is None else (weight[:, None] @ up.square()).squeeze(1)

    def importance(self, token: Token) -> Tensor:
        score = token.gate.float().abs()
        return score if token.usual is None else score * token.usual

    def flops_per_neuron(self) -> int:
        return 3  # a square, a factor and a sum


@dataclass(frozen=True, kw_only=True)
class Inside(Choice):
    """Base of choices by one number of each neuron, inside any mask."""

    mask_ratio: float = option(  # type: ignore[misc]
        1.6,
        "neurons in the mask, as a multiple of the weights read (mask=everything ignores it)",
        least=1,
    )


@dataclass(frozen=True, kw_only=True)
class Thresholded(Inside):
    """Base of choices that take exactly k neurons, or those above a number that each layer has from a text.

    The number is calibrated for the share of the neurons that the sparsity asks for. How many a token then takes
    varies, so what is read is measured; with such a threshold all neurons that are taken are written.
    """

    threshold: Literal["none", "calibrated"] = option(  # type: ignore[misc]
        "none",
        "take all above a number a layer, from the calibration text, in place of exactly k (what it reads varies)",
    )

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.threshold == "calibrated"


@dataclass(frozen=True, kw_only=True)
class ByGate(Thresholded):
    """A token takes the k neurons with the largest |act(gate x)|, after CATS (arXiv 2404.08763).

    CATS takes those above a threshold (`threshold=calibrated`): the quantile of |act(gate x)| over all neurons and
    tokens of a text, layer by layer. Its code (CATS at 679959c) finds it in 1000 bins between -1 and 1 on RefinedWeb;
    here bins are .1 % wide and have no end. There prompts run pruned too, and the model is then fine-tuned.
    """

    name = "gate"
    summary = "takes the largest |act(gate x)|; gate is read for the whole mask"
    reads_whole = ("gate",)

    def importance(self, token: Token) -> Tensor:
        return token.gate.abs()


@dataclass(frozen=True, kw_only=True)
class ByUp(Thresholded):
    """A token takes the k neurons with the largest |up x|, after M-COUNTDOWN (arXiv 2505.17701), its ideal form.

    Its practical form takes those above a threshold (`threshold=calibrated`): the mean over tokens of each token's
    k-th largest |up x|, layer by layer. Its code (COUNTDOWN at e1393ae) takes the train splits of the tasks that are
    evaluated for this, and counts k of up's rows alone; here it is the calibration text, and k follows from all bytes.
    """

    name = "up"
    summary = "takes the largest |up x|; up is read for the whole mask"
    reads_whole = ("up",)
    pools = False

    def importance(self, token: Token) -> Tensor:
        return token.up.abs()


@dataclass(frozen=True, kw_only=True)
class ByHidden(Inside):
    """A token takes exactly k neurons, by |h|, as if h were known before anything is read.

    No choice can be better informed.
    """

    name = "hidden"
    summary = "takes the largest |h|, as if it were known beforehand (an upper bound)"
    upper_bound = True

    def importance(self, token: Token) -> Tensor:
        return token.h.abs()


@dataclass(frozen=True, kw_only=True)
class TopP(Choice):
    """A token takes the fewest neurons with the share p of its sum of |h|, as if h were known beforehand.

    Their number differs from token to token and from layer to layer, so what is read is measured and not set.
    """

    name = "top-p"
    summary = "takes the fewest neurons with the share p of the sum of |h| (an upper bound; what it reads varies)"
    sized = False
    upper_bound = True
    p: float = option(0.9, "share of a token's sum of |h| that is kept", above=0, most=1)

    @property
    def exact(self) -> bool:
        return False

    def counts(
        self, densities: Sequence[float], sizes: Sequence[int], sparsity: float, matrices: int, whole_mask: bool,
        image: Prices | None = None,
    ) -> Counts:  # fmt: skip
        counts = list(sizes) if whole_mask else keep_counts(densities, sizes, sparsity)
        return Counts(counts, counts, counts, 0)

    def take(self, token: Token, allowed: Tensor, counts: tuple[Tensor, Tensor]) -> Tensor:
        import torch

        mass, order = token.h.float().abs().masked_fill(~allowed, 0).sort(dim=-1, descending=True, stable=True)
        total = mass.cumsum(-1, dtype=torch.float64)
        needed = total - mass < self.p * total[..., -1:]  # what is larger has less than the share
        return torch.zeros_like(needed).scatter_(-1, order, needed)


CHOICES = (All, GateUp, ByGate, ByUp, ByHidden, TopP)
