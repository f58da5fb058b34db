"""What a session asks of methods that leave out something else than neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Fine(Protocol):
    """Other FFN weights for decoding forwards; prompts have the model's own."""

    in_place: bool

    def begin(self) -> None:
        """Decoding forwards from here on."""

    def end(self) -> None:
        """The weights are the model's own, to the bit."""


class Beside(Protocol):
    """At work on a model.

    Attributes:
        fine: the weights of decoding forwards, where they have others; else None.
    """

    @property
    def fine(self) -> Fine | None: ...

    def nbytes(self) -> int:
        """Bytes that it keeps beside the model."""

    def watch(self, add: Callable[[Any], None], forward: Any) -> None:
        """Install its hooks.

        Args:
            add: takes the handle of each. forward: the one under way (`hooks.Forward`).
        """
