"""The statistics of a session for users and the evaluation: bytes read, bytes stored, re-masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dart_eval.pruning.session.state import SequenceState
from dart_eval.util.bits import unread

if TYPE_CHECKING:
    from dart_eval.kernels.mask_rows import MaskRows
    from dart_eval.pruning.method import Pruner
    from dart_eval.pruning.session.execution import Execution
    from dart_eval.pruning.session.hooks import Forward
    from dart_eval.pruning.session.log import Log, Step, Tally
    from dart_eval.pruning.session.prepared import Prepared


class SessionStats:
    """The read-only side of a `Session`. For its attributes see there."""

    method: Pruner
    prepared: Prepared
    executing: Execution
    forward: Forward
    shared_mask: bool
    log: Log
    _tally: Tally

    @property
    def state(self) -> SequenceState | None:
        """The state of the current sequences."""
        return self.forward.state

    @state.setter
    def state(self, state: SequenceState | None) -> None:
        self.forward.state = state

    def shares(self, batch: int, pruned: bool = False) -> Step:
        """Return the weights that a decoding forward would use now. pruned: see `SequenceState.step`."""
        if self.state is not None:
            return self.state.step(pruned)
        return self._without_context(batch, torch.device("cpu")).step()

    def _without_context(self, batch: int, device: torch.device) -> SequenceState:
        state = SequenceState(self.prepared, batch, device, self.shared_mask)
        state.skip_context()
        return state

    @property
    def prunes(self) -> bool:
        """Whether anything is ever left out."""
        return self.method.prunes

    @property
    def looks_ahead(self) -> bool:
        """Whether masks are made from the very tokens that run under them (an oracle)."""
        return self.method.looks_ahead

    @property
    def share(self) -> float:
        """Served FFN weight bytes, of which the sparsity is a share / bytes in the model's own dtype."""
        return self.prepared.share

    @property
    def execution(self) -> str:
        """The execution of the current sequences: `masked` or `copied`."""
        return self.executing.name

    @property
    def copies(self) -> list[MaskRows] | None:
        """Per layer, the copies of the mask's weights that decoded tokens multiply; None under `masked`."""
        return self.executing.copies

    @property
    def effective_sparsity(self) -> float:
        """Share of the FFN weight bytes (in the model's own dtype) that generated tokens did not read so far.

        The first token after a context is dense, and counts. Tokens after a sequence's end do not.
        """
        return unread(self._tally.share, self.prepared.share)

    @property
    def mask_sparsity(self) -> float:
        """Neurons outside the masks in force, mean over sequences."""
        return float(1 - self.shares(1).mask.mean())

    @property
    def weights_read(self) -> float:
        """FFN weight bytes that a pruned token reads / bytes in the model's own dtype, mean over sequences."""
        measured = self.steps if not self.method.exact else []
        reads = torch.cat([step.read for step in measured] or [self.shares(1, pruned=True).read])
        pruned = reads[reads != 1]  # others ran dense: after an alarm, or since masks were released
        return self.prepared.share * float((pruned if len(pruned) else reads).mean())

    def computed(self, read: float) -> float:
        """Return the share of the FFN weights that a pruned token multiplies if it reads the share `read`."""
        return self.prepared.computed(read)

    @property
    def state_bytes(self) -> int:
        """Bytes that the method stores beside the model: masks, scores and their factors, ring buffer, detector."""
        return self.state_bytes_each(1)

    def state_bytes_each(self, sequences: int) -> int:
        """Return the state bytes of one of several sequences. State that all of them share counts in full."""
        return self.prepared.nbytes() + (self.state.nbytes() // sequences if self.state else 0)

    @property
    def remasks(self) -> list[int]:
        """Re-masks so far, per sequence of the current batch."""
        return self.state.remasks.tolist() if self.state else []

    @property
    def steps(self) -> list[Step]:
        """The weights of each decoding forward since the last new context."""
        return self.log.steps

    @property
    def events(self) -> list[dict[str, object]]:
        """Re-masks since the last new context: step, token, sequence, overlap."""
        return self.log.events

    def trace(self, row: int, tokens: int | None = None) -> dict[str, object] | None:
        """Return the detector's trace of one sequence since its context: see `Log.trace`."""
        remasking = self.state.remasking if self.state else None
        return self.log.trace(remasking.detector if remasking else None, row, tokens)
