"""Executions: how decoding forwards are computed under masks.

`masked` multiplies the input of the down projection by 0 and 1. Any batch runs, every sequence with its own mask, and
no time is saved. `copied` multiplies copies of the mask's weights alone (`kernels.mask_rows`), for one mask at a time.
Outside of decoding forwards the projections have their own weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

from dart_eval.kernels.mask_rows import MaskRows, multiplied, unlike_plain
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.inputs.attached import SwappedWeights
from dart_eval.pruning.inputs.graded import GradedInputs
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.session import kernels
from dart_eval.pruning.session.log import Step
from dart_eval.pruning.session.state import SequenceState
from dart_eval.util.errors import UserError, nearest

if TYPE_CHECKING:
    from dart_eval.pruning.method import Beside

Wanted = Literal["auto", "masked", "copied"]
EXECUTIONS = ("auto", "masked", "copied")


class Execution:
    """The execution of one session.

    Args:
        wanted: `masked`, `copied`, or `auto`: copied if all sequences have one mask.
        shared_mask: all sequences of a batch have one mask.

    Attributes:
        wanted: as above; `masked` if the weights cannot be copied by rows.
        copies: per layer, the weights of the mask's neurons; None under `masked`.
        sliced: whether the current forward multiplies the copies alone.

    Raises:
        UserError: unknown execution.
    """

    def __init__(self, ffns: Sequence[FFN], method: Pruner, wanted: Wanted, shared_mask: bool) -> None:
        if wanted not in EXECUTIONS:
            raise UserError(f"unknown execution {wanted!r}", nearest(wanted, EXECUTIONS))
        self.ffns, self.method, self.shared_mask = ffns, method, shared_mask
        self.copies: list[MaskRows] | None = None
        self.swapped: SwappedWeights | None = None
        self.sliced = False
        self._runs = False  # whether projections accept the number of neurons in the mask
        self._rows_of: Callable[[FFN], MaskRows] = MaskRows
        self.wanted = self._possible(wanted)

    @property
    def name(self) -> str:
        """The execution of the current sequences: `masked` or `copied`."""
        return "masked" if self.copies is None else "copied"

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(rows.nbytes for rows in self.copies or ())

    def attach(self, beside: Beside | None) -> None:
        """Take the part that leaves out inputs, weights or experts, once it is on the model."""
        self.swapped = None if beside is None else beside.swapped
        if isinstance(beside, GradedInputs):
            self._rows_of = beside.rows_of

    def _possible(self, wanted: Wanted) -> Wanted:
        """The execution that this model allows. Quantised weights fall back to masks, with a warning."""
        if wanted == "masked" or not self.method.prunes:
            return wanted
        if part := kernels.without_kernel(self.method, self.ffns):
            if wanted == "copied":
                raise UserError(
                    kernels.lacking(self.method, self.ffns) or f"{part.title} has no kernels yet",
                    "use execution='masked'",
                )
            return "masked"
        if reason := unlike_plain(self.ffns):
            warnings.warn(f"{reason}: pruning by masks, which saves no time", stacklevel=5)
            return "masked"
        return wanted

    def choose(self, batch: int, by_hand: bool) -> None:
        """Choose for new sequences between copies and masks.

        Args:
            by_hand: whether a user calls the forwards, each continuing the one before; else any sequence may be
                resumed with another mask.
        """
        other = self.method.other
        one = batch == 1 or (other is None and (self.shared_mask or self.method.mask.fixed))
        if self.wanted == "copied" and not one and other is not None:
            raise UserError(
                f"copied execution runs {other.title} for one sequence, and this batch has {batch}",
                "use execution='masked', or one sequence",
            )
        if self.wanted == "copied" and not one:
            raise UserError(
                f"copied execution runs one mask at a time, and this batch has {batch} sequences",
                "use shared_mask=True (one mask for all of them), execution='masked', or one sequence",
            )
        if self.wanted == "masked" or not one or not by_hand:
            self.restore()
        elif self.copies is None:
            self.copies = [self._rows_of(f) for f in self.ffns]

    def move(self, state: SequenceState) -> None:
        """Copy the weights of neurons that are new in the mask. state: of sequences with one mask."""
        if self.copies is None or not state.prunes:
            return
        self._runs = False  # until every layer is copied: forwards then run by masks
        for layer, rows in zip(state.layers, self.copies, strict=True):
            rows.select(layer.mask[0])
        self._runs = all(rows.runs for rows in self.copies)

    def slice(self, step: Step) -> None:
        """Prepare a decoding forward: it multiplies the mask's neurons alone, if every sequence has a mask."""
        if self.swapped is not None:
            self.swapped.begin()
        share = step.mask if self.method.other is None else step.read
        if self.copies is not None and self._runs and bool((share < 1).all()):
            self.sliced = True
            for rows in self.copies:
                rows.begin()

    def widen(self) -> None:
        """Let forwards multiply all neurons, with all their bits; also after an exception in a sliced one."""
        if self.swapped is not None and self.swapped.in_place:
            self.swapped.end()
        if self.sliced:
            for rows in self.copies or ():
                rows.end()
        self.sliced = False

    def restore(self) -> None:
        """Give the projections their own weights with all their bits, and drop the copies."""
        self.widen()
        self.copies = None

    def held(self) -> AbstractContextManager[None]:
        """Let forwards inside multiply the copies."""
        return multiplied(self.copies or ())
