"""How decoding forwards are computed under masks.

`masked`: factors of 0 and 1 on the input of the down projection, so any batch runs, every sequence with its own mask;
no time is saved. `copied`: copies of the kept neurons' weights are multiplied, and nothing else (`kernels.kept`), for
one mask at a time. Outside of decoding forwards the projections have their own weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from dart_eval.kernels.chosen import ChosenRows
from dart_eval.kernels.kept import KeptRows, unlike_plain
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.inputs.attached import SwappedWeights
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.session import kernels
from dart_eval.pruning.session.log import Step
from dart_eval.pruning.session.state import SequenceState
from dart_eval.util.errors import UserError, nearest

Wanted = Literal["auto", "masked", "copied"]
EXECUTIONS = ("auto", "masked", "copied")


class Execution:
    """The execution of one session.

    Args:
        wanted: `masked`, `copied`, or `auto`: copied where one mask is in force.
        shared_mask: all sequences of a batch have one mask.

    Attributes:
        wanted: as above; `masked` where rows of the weights cannot be copied.
        copies: per layer, the weights of the kept neurons; None where masks are multiplied.
        sliced: per layer, the neurons whose copies the forward under way multiplies, [K]; None: all.

    Raises:
        UserError: no such execution.
    """

    def __init__(self, ffns: Sequence[FFN], method: Pruner, wanted: Wanted, shared_mask: bool) -> None:
        if wanted not in EXECUTIONS:
            raise UserError(f"unknown execution {wanted!r}", nearest(wanted, EXECUTIONS))
        self.ffns, self.method, self.shared_mask = ffns, method, shared_mask
        self.copies: list[KeptRows] | None = None
        self.fine: SwappedWeights | None = None  # set once they have been made
        self.sliced: list[Tensor | None] | None = None
        self._runs = False  # projections take as many neurons as are kept
        self.wanted = self._possible(wanted)

    @property
    def name(self) -> str:
        """How the sequences under way are decoded: `masked` or `copied`."""
        return "masked" if self.copies is None else "copied"

    @property
    def gathers(self) -> bool:
        """Whether the one token reads only the rows that it chooses."""
        return self.copies is not None and isinstance(self.copies[0], ChosenRows)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(kept.nbytes for kept in self.copies or ())

    def _possible(self, wanted: Wanted) -> Wanted:
        """The execution that this model allows. Quantised weights fall back to masks, with a warning."""
        if wanted == "masked" or not self.method.prunes:
            return wanted
        if part := kernels.unmade(self.method, self.ffns):
            if wanted == "copied":
                raise UserError(f"{part.title} has no kernels yet", "use execution='masked'")
            return "masked"
        if reason := unlike_plain(self.ffns):
            warnings.warn(f"{reason}: pruning by masks, which saves no time", stacklevel=5)
            return "masked"
        return wanted

    def choose(self, batch: int, by_hand: bool) -> None:
        """For new sequences: copy what they keep, or not.

        Args:
            by_hand: forwards are called by a user, and each continues the one before; else any sequence may be taken up
                again, with another mask.
        """
        choice = self.method.choice
        one = batch == 1 or (not choice.previews and (self.shared_mask or self.method.mask.fixed))
        if self.wanted == "copied" and not one and choice.previews:
            raise UserError(
                f"copied execution runs {choice.title} for one sequence, and this batch has {batch}",
                "use execution='masked', or one sequence",
            )
        if self.wanted == "copied" and not one:
            raise UserError(
                f"copied execution runs one mask at a time, and this batch has {batch} sequences",
                "use shared_mask=True (one mask for all of them), execution='masked', or one sequence",
            )
        if self.wanted == "masked" or not one or not by_hand or (self.gathers and batch > 1):
            self.restore()
        if self.copies is None and self.wanted != "masked" and one and by_hand:
            gather = kernels.gatherer(self.method, self.ffns) if batch == 1 else None
            self.copies = [(gather or KeptRows)(f) for f in self.ffns]

    def move(self, state: SequenceState) -> None:
        """Copy the weights of the kept neurons that are not there. state: of sequences that have one mask."""
        if self.copies is None or not state.prunes:
            return
        for layer, kept in zip(state.layers, self.copies, strict=True):
            kept.select(layer.mask[0])
            if isinstance(kept, ChosenRows):
                context_rms = layer.context_rms(kept.neurons)
                norm = torch.ones(kept.count, device=layer.mask.device) if context_rms is None else context_rms[0, 0]
                kept.prepare(norm, int(layer.taken[0]), int(layer.written[0]))
        self._runs = all(kept.runs for kept in self.copies)

    def slice(self, step: Step) -> None:
        """The next forward decodes: it multiplies the kept neurons alone, where every sequence has a mask."""
        if self.fine is not None:
            self.fine.begin()
        share = step.read if self.gathers else step.mask
        if self.copies is not None and self._runs and bool((share < 1).all()):
            self.sliced = [kept.neurons for kept in self.copies]
            for kept in self.copies:
                kept.begin()

    def widen(self) -> None:
        """Forwards multiply all neurons, with all their bits; also after an exception in one that did not."""
        if self.fine is not None and self.fine.in_place:
            self.fine.end()
        if self.sliced is not None:
            for kept in self.copies or ():
                kept.end()
        self.sliced = None

    def restore(self) -> None:
        """The projections have their own weights, with all their bits, and the copies are gone."""
        self.widen()
        self.copies = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Forwards inside multiply the copies, whatever they are of."""
        for kept in self.copies or ():
            kept.begin()
        try:
            yield
        finally:
            for kept in self.copies or ():
                kept.end()
