"""A model that runs dense, with the interface of a session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dart_eval.pruning.session.log import Step
from dart_eval.pruning.session.session import Session
from dart_eval.pruning.session.state import SequenceState


class DenseSession:
    """Replaces a `Session` if nothing is pruned: the model keeps its forwards, and every token reads all weights.

    Attributes:
        prunes, looks_ahead, share, state, state_bytes, remasks, events: see `Session`.
        steps: one per decoding forward since the last context.
    """

    prunes = False
    looks_ahead = False
    share: float | None = None
    state = None
    state_bytes = 0

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.events: list[dict[str, object]] = []
        self.remasks: list[int] = []

    @contextmanager
    def context(self, valid: Tensor) -> Iterator[None]:
        """Run a context inside: of new sequences, or the next part of one. valid: [B, T] bool."""
        self.steps = []
        yield

    extend = foresee = context

    @contextmanager
    def decode(self, valid: Tensor, frozen: bool = False) -> Iterator[None]:
        """Run a decoding forward inside. valid: [B, T] bool."""
        everything = torch.ones(len(valid), dtype=torch.float64)
        self.steps.append(Step(everything, everything))
        yield

    def state_bytes_each(self, sequences: int) -> int:
        """Bytes that a method stores beside the model: none."""
        return 0

    def computed(self, read: float) -> float:
        """Share of the FFN weights that a token multiplies if it reads the share `read`."""
        return read

    def no_context(self, batch: int, device: torch.device) -> None:
        """Begin new sequences that have no context."""
        self.steps = []

    def fork(self, state: SequenceState | None, rows: Tensor) -> None:
        """Continue with the sequences `rows` of an earlier context."""
        self.steps = []

    def room(self) -> None:
        """Tokens that may run in one decoding forward: any number."""

    def trace(self, row: int, tokens: int | None = None) -> None:
        """The detector's trace: None, since there is no detector."""


AnySession = Session | DenseSession  # what the evaluation runs a model under
