"""The cost of scored or generated tokens, in bytes and in distance from dense, of one answer or of many together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from dart_eval.evaluation.distance import Distance
from dart_eval.results.record import CLOSED, Count, Drift, Finite, holds
from dart_eval.util.text import Json


class _Trace(Drift):
    """A session's trace, without further keys."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]


@dataclass(frozen=True)
class Cost:
    """The tokens of answers, and the weights that they did not read. Costs are added by `+`.

    Attributes:
        tokens: scored or generated tokens.
        pruned_tokens: tokens that did not read all FFN weights.
        not_read_sum: share of the FFN weights that was not read, summed over the tokens.
        outside_sum: share of the neurons outside the mask, summed over the tokens.
        remasks: re-masks meanwhile.
        contexts: one per request or chunk.
        context_tokens: tokens of all contexts.
        distance: distance of the scored tokens from dense, if measured.
        trace: the drift detector's trace (`Session.trace`), for one context with a full window.
    """

    __pydantic_config__ = CLOSED

    tokens: Count = 0
    pruned_tokens: Count = 0
    not_read_sum: Finite = 0.0
    outside_sum: Finite = 0.0
    remasks: Count = 0
    contexts: Count = 0
    context_tokens: Count = 0
    distance: Distance = field(default_factory=Distance)
    trace: Annotated[Json | None, holds(_Trace | None)] = None

    def __add__(self, other: Cost) -> Cost:
        counts = [f.name for f in fields(Cost) if f.name != "trace"]
        total = {name: getattr(self, name) + getattr(other, name) for name in counts}
        return Cost(**total, trace=(self.trace or other.trace) if total["contexts"] == 1 else None)

    @property
    def mean_context(self) -> float:
        """Tokens per context."""
        return self.context_tokens / self.contexts if self.contexts else 0.0

    @property
    def effective_sparsity(self) -> float:
        """Share of the FFN weights that was not read, mean over all tokens, dense ones included."""
        return self.not_read_sum / self.tokens if self.tokens else 0.0

    @property
    def read(self) -> float:
        """Share of the FFN weights that was read, mean over the tokens that ran pruned."""
        return 1 - self.not_read_sum / self.pruned_tokens if self.pruned_tokens else 1.0

    @property
    def mask_sparsity(self) -> float:
        """Share of the neurons outside the mask, mean over the tokens that ran pruned."""
        return self.outside_sum / self.pruned_tokens if self.pruned_tokens else 0.0
