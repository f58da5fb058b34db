"""What was last made of a module's weights, kept for whoever asks for the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn

from dart_eval.util.machine import release

T = TypeVar("T")


class LastMade(Generic[T]):
    """What was last made of each module's weights: cell after cell and session after session asks for the same."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[object, T]] = weakref.WeakKeyDictionary()

    def get(self, module: nn.Module, weights: Sequence[Tensor], how: object, make: Callable[[], T]) -> T:
        """What is known of a module, made anew where the weights, what is in them or `how` are others."""
        key = how, *((w.data_ptr(), w._version, str(w.dtype)) for w in weights)
        known = self._known.get(module)
        if known is None or known[0] != key:
            self._known[module] = known = key, make()
            release()
        return known[1]
