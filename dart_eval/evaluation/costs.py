"""The cost of scored or generated tokens, in bytes and in distance from dense, of one answer or of many together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from dart_eval.evaluation.distance import Distance
from dart_eval.results.layout import CLOSED, Count, Drift, Finite, Holds


class _Trace(Drift):
    """As a session makes it, which knows no other keys."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]


@dataclass(frozen=True)
class Cost:
    """How many tokens there were, and what they did not read. Costs are added up by `+`.

    Attributes:
        tokens: scored or generated.
        pruned_tokens: those of them that did not read all FFN weights.
        not_read_sum: share of the FFN weights that was not read, summed over the tokens.
        outside_sum: share of the neurons outside the mask, summed over the tokens; less, where tokens choose inside it.
        remasks: re-masks while they ran.
        contexts: of requests or chunks, one for each.
        context_tokens: of all contexts.
        distance: from dense, of the scored tokens, where it was measured.
        trace: what the drift detector saw (`Session.trace`), if there is one context and a window was full.
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
    trace: Annotated[dict[str, Any] | None, Holds(_Trace | None)] = None

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
