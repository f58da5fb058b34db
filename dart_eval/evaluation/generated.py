"""What generated tokens cost, from a session's log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from dart_eval.evaluation.costs import Cost
from dart_eval.ffn import decoder
from dart_eval.pruning.dense import DenseSession
from dart_eval.pruning.session import Session, Step


class GenerationLog:
    """What a session logs while a batch generates.

    A prefill makes a token densely, each forward after it one under the masks. There may be several: where the rotary
    angles switch, Phi-3 computes the KV cache of the prompt and all tokens so far anew. To the session these are new
    contexts, with new masks and a new log.
    """

    def __init__(self, session: Session | DenseSession) -> None:
        self.session = session
        self._parts: list[tuple[list[Step], list[dict[str, Any]]]] = []  # steps and events since each prefill

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """The forwards inside generate the batch."""
        handle = decoder(model).register_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def _note(self, *_: Any) -> None:
        if not self._parts or self._parts[-1][0] is not self.session.steps:
            self._parts.append((self.session.steps, self.session.events))

    def cost(self, row: int, tokens: int) -> Cost:
        """Of the first `tokens` that a row generated."""
        steps: list[Step | None] = []  # None: a prefill
        remasks = 0
        for part, events in self._parts:
            remasks += sum(e["sequence"] == row and len(steps) + e["step"] < tokens for e in events)
            steps += [None, *part]
        counted = [step for step in steps[:tokens] if step is not None]
        not_read = [float(1 - step.read[row]) for step in counted]
        return Cost(
            tokens=tokens,
            pruned_tokens=sum(share > 0 for share in not_read),
            not_read_sum=sum(not_read),
            outside_sum=sum(float(1 - step.mask[row]) for step in counted),
            remasks=remasks,
            trace=self.session.trace(row, tokens - 1) if len(self._parts) == 1 else None,
        )
