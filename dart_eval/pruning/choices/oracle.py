"""A choice that knows h before it has been read: an upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import Choice, Token

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ByHidden(Choice):
    """A token takes the k largest |h|, as if h were known before anything is read. No choice is better informed."""

    name = "hidden"
    summary = "chooses the largest |h|, as if it were known in advance (upper bound)"
    upper_bound = True

    def importance(self, token: Token) -> Tensor:
        return token.h.abs()
