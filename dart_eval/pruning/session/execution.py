"""How decoding forwards are computed under masks.

`masked`: factors of 0 and 1 on the input of the down projection, so any batch runs, every sequence with its own mask;
no time is saved. `permuted`: the kept neurons are moved to the front of the weights and nothing else is multiplied
(`permuted.py`), for one mask at a time. Outside of decoding forwards the weights are whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

from dart_eval.layers.ffn import FFN
from dart_eval.pruning.inputs.finer import Fine
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.session import kernels
from dart_eval.pruning.session.permuted import REORDERED, PermutedFFNs, quantised, shared
from dart_eval.pruning.session.state import SequenceState
from dart_eval.pruning.session.steps import Step
from dart_eval.util.errors import UserError, nearest

Wanted = Literal["auto", "masked", "permuted"]
EXECUTIONS = ("auto", "masked", "permuted")


class Execution:
    """The execution of one session.

    Args:
        wanted: `masked`, `permuted`, or `auto`: permuted where one mask is in force.
        shared_mask: all sequences of a batch have one mask.

    Attributes:
        wanted: as above; `masked` where the weights cannot be reordered.
        permuted: the FFNs while their neurons are in an order of ours, else None.
        sliced: the forward under way multiplies the kept neurons alone.

    Raises:
        UserError: no such execution, or weights that cannot be reordered because other modules use them too.
    """

    def __init__(
        self, model: nn.Module, ffns: Sequence[FFN], method: Pruner, wanted: Wanted, shared_mask: bool
    ) -> None:
        if wanted not in EXECUTIONS:
            raise UserError(f"unknown execution {wanted!r}", nearest(wanted, EXECUTIONS))
        self.model, self.ffns, self.method, self.shared_mask = model, ffns, method, shared_mask
        self.permuted: PermutedFFNs | None = None
        self.fine: Fine | None = None  # set once they have been made
        self.sliced = False
        self.wanted = self._possible(wanted)

    @property
    def name(self) -> str:
        """How the sequences under way are decoded: `masked` or `permuted`."""
        return "masked" if self.permuted is None else "permuted"

    @property
    def gathers(self) -> bool:
        """Whether the one token reads only the rows that it chooses."""
        return self.permuted is not None and bool(self.permuted.gathered)

    def _possible(self, wanted: Wanted) -> Wanted:
        """The execution that this model allows. Quantised weights fall back to masks, with a warning."""
        if wanted == "masked" or not self.method.prunes:
            return wanted
        if part := kernels.unmade(self.method, self.ffns):
            if wanted == "permuted":
                raise UserError(f"{part.title} has no kernels yet", "use execution='masked'")
            return "masked"
        reason = quantised(self.ffns)
        if reason is None and (reason := shared(self.ffns, self.model)) and wanted == "permuted":
            raise UserError(reason, "use execution='masked'")
        if reason is not None:
            warnings.warn(f"{reason}: pruning by masks, which saves no time", stacklevel=5)
            return "masked"
        return wanted

    def choose(self, batch: int, by_hand: bool) -> None:
        """For new sequences: reorder the neurons, or put them back.

        Args:
            by_hand: forwards are called by a user, and each continues the one before; else any sequence may be taken up
                again, with another mask.
        """
        if self.permuted is None and any(f.order is not None for f in self.ffns):
            raise UserError(REORDERED, "leave that one first")
        image = self.method.choice.image
        one = batch == 1 or (image is None and (self.shared_mask or self.method.mask.fixed))
        if self.wanted == "permuted" and not one and image is not None:
            raise UserError(
                f"permuted execution looks at {image.title} for one sequence, and this batch has {batch}",
                "use execution='masked', or one sequence",
            )
        if self.wanted == "permuted" and not one:
            raise UserError(
                f"permuted execution runs one mask at a time, and this batch has {batch} sequences",
                "use shared_mask=True (one mask for all of them), execution='masked', or one sequence",
            )
        if self.wanted == "masked" or not one or not by_hand:
            self.restore()
            return
        if self.gathers and batch > 1:
            self.restore()  # which is for one sequence
        if self.permuted is None:
            gather = kernels.gatherer(self.method, self.ffns) if batch == 1 else None
            self.permuted = PermutedFFNs(self.ffns, self.model, gather)
            self.permuted.begin()  # from here on `restore` undoes it

    def move(self, state: SequenceState) -> None:
        """Kept neurons to the front, if they are not there. state: of sequences that have one mask."""
        permuted = self.permuted
        if permuted is None or not state.prunes:
            return
        for layer in range(len(self.ffns)):
            permuted.select(layer, state.mask(layer)[0])
        for layer, gathered in enumerate(permuted.gathered):
            gathered.prepare(*state.taken_by_one(layer, permuted.kept[layer]))

    def slice(self, step: Step) -> None:
        """The next forward decodes: it multiplies the kept neurons alone, where every sequence has a mask."""
        if self.fine is not None:
            self.fine.begin()
        share = step.read if self.gathers else step.mask
        if self.permuted is not None and bool((share < 1).all()):
            self.permuted.slice()
            self.sliced = True

    def whole(self) -> None:
        """Forwards multiply all neurons, with all their bits; also after an exception in one that did not."""
        if self.fine is not None and self.fine.in_place:
            self.fine.end()
        if self.permuted is not None:
            self.permuted.whole()
        self.sliced = False

    def restore(self) -> None:
        """Every neuron back to its place, and all bits of its weights."""
        if self.fine is not None and self.fine.in_place:
            self.fine.end()
        permuted = self.permuted
        if permuted is not None:
            permuted.restore()
            self.permuted = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Forwards inside multiply the kept neurons of the permuted weights, whatever they are."""
        assert self.permuted is not None
        self.permuted.slice()
        try:
            yield
        finally:
            self.permuted.whole()
