"""The publisher of results."""

from __future__ import annotations

from dataclasses import dataclass

RELATIONSHIPS = ("first_party", "third_party", "collaborative", "other")


@dataclass(frozen=True)
class Teller:
    """The publisher of results.

    Attributes:
        organisation: its name.
        relationship: its relation to the model's developer: one of `RELATIONSHIPS`.
        page: the address of a page about the results, or None.
    """

    organisation: str = "unknown"
    relationship: str = "other"
    page: str | None = None
