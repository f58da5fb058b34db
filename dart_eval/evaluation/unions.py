"""Read at batch B: what a step of B sequences reads, the union of what they choose; and of k tokens of one sequence.

A server reads weights once for all sequences of a step. A neuron or column is read if one of them reads it, in the most
bits that one of them wants: the highest of their levels (`Fitted.note`). Sequences run again for this, one by one: the
first ones of a cell, in its order. So no number depends on batches, shards or restarts.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from dart_eval.pruning.session.dense import AnySession
from dart_eval.pruning.session.fitted import Noted
from dart_eval.pruning.session.session import Session
from dart_eval.util.text import Json

SEQUENCES, STEPS = 32, 16  # of a cell; tokens of a sequence
Levels = list[tuple[Tensor, Tensor]]  # by layer and matrix: the cost of each level, and of T tokens the levels [T, n]


class Unions:
    """Unions of groups of 1, 2, 4 ... consecutive sequences of a cell, and of as many consecutive tokens of one.

    Token t of each sequence is in step t. A sequence with fewer than `STEPS` tokens begins again.

    Args:
        session: prunes the model, or lets it run dense.

    Attributes:
        room: sequences still to come.
    """

    def __init__(self, session: AnySession) -> None:
        self.session, self.room = session, SEQUENCES if unites(session) else 0
        self._reads: dict[str, dict[int, list[float]]] = {"sequences": defaultdict(list), "tokens": defaultdict(list)}
        self._waiting: dict[int, Levels] = {}  # by size, the group that waits for its second half
        self._flat: Levels | None = None  # of any sequence, where all tokens read the same

    def add(self, run: Callable[[], object]) -> None:
        """Add a sequence. run: decodes its tokens, and no others."""
        if self._flat is None:
            noting: contextlib.AbstractContextManager[list[Noted]] = contextlib.nullcontext([])
            if isinstance(self.session, Session):
                noting = self.session.noting()
            with noting as noted:
                run()
            if isinstance(self.session, Session) and not self.session.steps:
                return  # a text of one token, which is dense's
            own = self._levels(noted)
        else:  # as the sequence before
            own = self._flat
        self.room -= 1
        size = 1
        group = [(cost, of[torch.arange(STEPS) % len(of)]) for cost, of in own]
        while pairs := len(own[0][1]):
            self._reads["tokens"][size].append(_read(own))
            own = [(cost, of[: pairs // 2 * 2].unflatten(0, (pairs // 2, 2)).amax(1)) for cost, of in own]
            size *= 2
        self._reads["sequences"][1].append(_read(group))
        size = 1
        while (first := self._waiting.pop(size, None)) is not None:
            group = [(cost, torch.maximum(a, b)) for (cost, a), (_, b) in zip(first, group, strict=True)]
            size *= 2
            self._reads["sequences"][size].append(_read(group))
        self._waiting[size] = group

    def _levels(self, noted: list[Noted]) -> Levels:
        """Return what was noted of one sequence. The costs of all layers together are shares of all neurons."""
        if isinstance(self.session, Session) and any(noted):
            neurons = sum(ffn.size for ffn in self.session.ffns)
            return [(c / neurons, torch.cat(of, 1)[0]) for layer in noted for c, of in layer.values()]
        read = [float(step.read.mean()) for step in self.session.steps] or [1.0]
        self._flat = [(torch.tensor([statistics.mean(read)], dtype=torch.float64), torch.zeros(STEPS, 1).byte())]
        return self._flat

    def result(self, share: float) -> Json | None:
        """Return by kind and size the mean read, its standard error or None, and how many were averaged; None for none.

        Args:
            share: FFN weight bytes as they are served / those of the model's own dtype.
        """

        def of(reads: list[float]) -> tuple[float, float | None, int]:
            error = share * statistics.stdev(reads) / math.sqrt(len(reads)) if len(reads) > 1 else None
            return share * statistics.mean(reads), error, len(reads)

        made = {kind: {str(size): of(reads) for size, reads in sizes.items()} for kind, sizes in self._reads.items()}
        return made if made["sequences"] else None


def _read(levels: Levels) -> float:
    """Return the read of a token or group, mean over steps."""
    return float(sum(cost[of.long()].sum() / len(of) for cost, of in levels))


def unites(session: AnySession) -> bool:
    """Whether the unions of what tokens read are known: not of experts, of repeated layers, and as parts say."""
    if not isinstance(session, Session):
        return True
    parts, remask = session.method.parts(), session.method.mask.remask
    if session.method.choice.previews and (remask.release or remask.dense_tokens):
        return False  # tokens that run dense read no preview, and so less of a neuron than a token that takes it
    return not any(f.routed or f.runs > 1 or any(not part.unites(f) for part in parts) for f in session.ffns)
