"""Choices: which neurons a token computes, matrix by matrix.

A choice defines the matrices that it reads whole before it chooses, and the importance of each neuron to the token. The
number of neurons taken follows from the sparsity, so that the bytes read are met exactly. A new choice is one class
with these two definitions, in a file of its own (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dart_eval.pruning.masks.counts import Counts, chosen_counts
from dart_eval.pruning.part import Part

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.calibration.calibration import Calibration


@dataclass
class Token:
    """The tokens of a decoding forward in one layer.

    Attributes:
        h: [B, T, F], the input of the down projection.
        gate: [B, T, F], act(gate x); h itself in a plain FFN.
        up: [B, T, F], up x; h itself in a plain FFN.
        taken: [B] long, neurons that each sequence's tokens take.
        written: [B] long, neurons that each sequence's tokens write.
        threshold: the number that a neuron's importance must exceed; None if the choice takes a count.
    """

    h: Tensor
    gate: Tensor
    up: Tensor
    taken: Tensor | None = None
    written: Tensor | None = None
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class Choice(Part):
    """Base of all choices.

    Attributes:
        chooses: whether tokens choose; if not, they compute all neurons.
        exact: whether every token takes the same number of neurons; if not, the number is measured.
        reads_whole: the matrices of a gated FFN that it reads whole before it chooses: `gate`, `up`, both or none. A
            plain FFN reads `up` whole, which gives h, unless the tuple is empty.
    """

    slot = "choice"
    chooses: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    reads_whole: ClassVar[tuple[str, ...]] = ()

    @property
    def fits_repeats(self) -> bool:  # type: ignore[override]
        return self.exact

    def thresholds(self, ffns: Sequence[FFN], taken: Sequence[int], calibration: Calibration) -> list[float]:
        """Return per layer the number that a neuron's importance must exceed, if the choice `calibrates`.

        Args:
            taken: [L] neurons that a token takes, on average.
        """
        raise NotImplementedError

    def counts(self, densities: Sequence[float], sizes: Sequence[int], sparsity: float, matrices: int) -> Counts:
        """Return the neurons per layer: taken by a token, and written by it.

        Args:
            densities: [L] share of each layer's weights that is read, with mean 1 - sparsity.
            sizes: [L] neurons per layer.
            matrices: 3 for gated FFNs, 2 for plain ones.

        Raises:
            UserError: the matrices read whole exceed what the sparsity leaves.
        """
        return chosen_counts(densities, sizes, sparsity, matrices, min(len(self.reads_whole), matrices - 1), self.title)

    def importance(self, token: Token) -> Tensor:
        """Return the importance of each neuron to each token: [B, T, F], not negative, in any dtype."""
        raise NotImplementedError

    def choose(self, token: Token) -> Tensor:
        """Return the neurons that each token computes to the end: [B, T, F] bool."""
        from dart_eval.kernels.top import largest

        assert token.taken is not None and token.written is not None
        if token.threshold is not None:
            return self.importance(token).float() > token.threshold  # it is finer than bfloat16
        chosen = largest(self.importance(token), token.taken)
        if bool((token.written < token.taken).any()):
            chosen = largest(token.h.abs(), token.written, chosen)
        return chosen

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return 3 * mask if self.chooses else 0.0  # a score, its factor, and |h| of the taken neurons


@dataclass(frozen=True, kw_only=True)
class All(Choice):
    """Every token computes every neuron."""

    name = "none"
    summary = "lets every token compute all neurons"
    chooses = False
