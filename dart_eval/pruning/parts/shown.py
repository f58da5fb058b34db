"""Choices by what tokens see of h through an image of gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.allocation import Counts, Prices, graded_counts
from dart_eval.pruning.parts.base import option
from dart_eval.pruning.parts.choices import Choice, Inside, Thresholded, Token
from dart_eval.pruning.parts.images import Copy, Image, Plane

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.cost import ModelShape


PRECISION = "bits of a 16-bit weight that are read at most; 0: all"


@dataclass(frozen=True, kw_only=True)
class Shown(Thresholded):
    """The k neurons with the largest |h| as an image of gate and up and a thinned x show it, after Prox.

    Prox (arXiv 2607.27591, known here from digests only; no code found) takes those with |act(g)_j u_j| above a
    threshold a layer (`threshold=calibrated`: here the quantile over all neurons and tokens of the calibration text).
    g and u come from copies of gate and up in 4 bits (symmetric, a scale a row) and the largest entries of x; all three
    matrices of what is taken are then read exactly. As far as the digests say, it runs all tokens pruned where answers
    are scored, and counts a third of 16 bits for a weight of the copies, as measured; here 4 bits and the scales count.
    Our rounding fits each scale by least squares. Exact counts are ours.
    """

    name = "shown"
    summary = "takes the largest |h| that a coarse image of gate and up and the largest entries of x show"
    doubts = False
    gathers = True
    image: Image = option(Copy(bits=4, group=0), "what every token reads of gate and up before it chooses")  # type: ignore[misc]
    thin: float = option(0.5, "share of the entries of x, the largest, that the preview goes by", above=0, most=1)  # type: ignore[misc]

    def importance(self, token: Token) -> Tensor:
        assert token.preview is not None
        return token.preview.abs()

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        # the preview itself, and choosing by it
        return 2 * mask * self.thin * shape.width * (shape.ffn_matrices - 1) + 3 * mask


@dataclass(frozen=True, kw_only=True)
class ByPreview(Inside):
    """Exactly k neurons by what an image of gate and up lets one expect of h^2 (`Preview.look`).

    Their rows are read exactly; then those with the largest |h| write.

    Prox (arXiv 2607.27591, `Shown`) previews by a copy of 4 bits; the plane of the served weights, exact counts
    and the expectation are ours.
    """

    name = "preview"
    summary = "takes the largest |h| that a coarse image of gate and up shows; then writes the largest exact |h|"
    image: Image = option(Plane(), "what every token reads of gate and up before it chooses")  # type: ignore[misc]
    write_share: float = option(0.7, "of the neurons taken, the share whose columns of down are read", above=0, most=1)  # type: ignore[misc]
    precision: int = option(0, PRECISION, least=0, most=16)  # type: ignore[misc]
    gathers = True

    def importance(self, token: Token) -> Tensor:
        assert token.expected is not None
        return token.expected

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return 2 * mask * shape.width * (shape.ffn_matrices - 1) + 14 * mask  # the preview itself, and choosing by it


@dataclass(frozen=True, kw_only=True)
class Graded(Choice):
    """The neurons that a preview leaves most open are read exactly; the next ones write as it has them.

    Every token reads the image of gate and up, of the columns of the largest entries of x alone, which lets it expect
    h^2 of each neuron (`Preview.look`). Of some it reads also the rest of their rows, and their columns of down; of the
    next ones the image of their columns alone: their h is the preview's. So the bits that a token reads of a neuron
    follow from how much they mend. Those are read exactly for which

        (E[h^2] - preview^2 + known * preview^2) * norm^2

    is largest, with the norm of the neuron's column of down: the image of gate and up leaves E[h^2] - preview^2 open,
    and the image of down spoils a share of what is known (`known`). Of the others those with the largest
    E[h^2] * norm^2 write. This project's own.

    Bytes are counted here; no kernel reads them yet. One would keep the plane by columns, of which each token reads
    half (`thin`), and would then have to gather the bits of chosen rows that it skipped one by one.
    """

    name = "graded"
    summary = "reads exactly where a preview leaves most open, and lets the next neurons write as the preview has them"
    grades = True
    image: Image = option(Plane(), "what every token reads of gate and up before it chooses")  # type: ignore[misc]
    thin: float = option(0.5, "share of the entries of x, the largest, that the preview goes by", above=0, most=1)  # type: ignore[misc]
    precision: int = option(8, PRECISION, least=0, most=16)  # type: ignore[misc]
    known: float = option(
        0.2,
        "how much the previewed h^2 counts beside what is left open, where neurons are read exactly",
        least=0,
        most=1,
    )
    coarse: float = option(
        1.0, "neurons that write as the preview has them, as a multiple of those read exactly", least=0
    )

    def counts(
        self, densities: Sequence[float], sizes: Sequence[int], sparsity: float, matrices: int, whole_mask: bool,
        image: Prices | None = None,
    ) -> Counts:  # fmt: skip
        assert image is not None
        return graded_counts(densities, sizes, sparsity, matrices, image, self.coarse, self.title)

    def importance(self, token: Token) -> Tensor:
        assert token.expected is not None and token.columns is not None
        return token.expected * token.columns

    def take(self, token: Token, allowed: Tensor, counts: tuple[Tensor, Tensor]) -> Tensor:
        from dart_eval.pruning.top import largest

        assert token.expected is not None and token.columns is not None and token.preview is not None
        known = (1 - self.known) * token.preview.float().square()
        return largest((token.expected - known).clamp(min=0) * token.columns, allowed, counts[0])

    def roughly(self, token: Token, allowed: Tensor, taken: Tensor, counts: tuple[Tensor, Tensor]) -> Tensor:
        """The neurons that write as the image shows them: [B, T, F] bool, none of those taken. See `take`."""
        from dart_eval.pruning.top import largest

        return largest(self.importance(token), allowed & ~taken, counts[1] - counts[0])

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        # The previews of gate and up, choosing by them, and the image of down for what writes so, at most of all.
        return 2 * mask * shape.width * (self.thin * (shape.ffn_matrices - 1) + 1) + 19 * mask


SHOWN = (ByPreview, Graded, Shown)
