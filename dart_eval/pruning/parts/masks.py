"""Masks: which neurons a sequence may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dart_eval.errors import UserError
from dart_eval.pruning.parts.base import Part, option
from dart_eval.pruning.parts.remasks import Never, Remask
from dart_eval.pruning.parts.scores import Activation, Score, Wanda


@dataclass(frozen=True, kw_only=True)
class Mask(Part):
    """Base of all masks.

    Attributes:
        fixed: it is made before any prompt is seen, and the same for every sequence.
        whole: it holds every neuron.
        looks_ahead: it is made from the very tokens that it is used on (an upper bound, and no method to use).
        score: what it is made by; None for a mask of everything.
        remask: when it is made anew.
    """

    slot = "mask"
    fixed: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    score: ClassVar[Score | None] = None
    remask: ClassVar[Remask] = Never()


@dataclass(frozen=True, kw_only=True)
class Everything(Mask):
    """Every neuron of every layer."""

    name = "everything"
    summary = "every neuron: what is pruned is each token's choice"
    fixed = True
    whole = True


@dataclass(frozen=True, kw_only=True)
class Static(Mask):
    """One mask for all sequences, made before any prompt is seen: of the weights, or of a calibration text."""

    name = "static"
    summary = "one mask for all texts, from the weights or a calibration text"
    fixed = True
    score: Score = option(Wanda(), "what it is made by")  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score.weighs_tokens:
            raise UserError(
                "score.average=ema and score.skip_first weigh the tokens of a context, and mask=static has none",
                "leave them out, or use mask=prompt",
            )


@dataclass(frozen=True, kw_only=True)
class OfTokens(Mask):
    """Base of masks per sequence, made from tokens of it."""

    needs_context = True
    score: Score = option(Activation(), "what it is made by")  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.score.observes:
            raise UserError(
                f"{self.title} is made from tokens, and {self.score.title} reads none",
                "use mask=static, or another score",
            )


@dataclass(frozen=True, kw_only=True)
class FromPrompt(OfTokens):
    """A mask per sequence, from the tokens of its context."""

    name = "prompt"
    summary = "a mask for each sequence, from the tokens of its context"
    remask: Remask = option(Never(), "when it is made anew")  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class Ahead(OfTokens):
    """A mask per sequence, from the very tokens that are then scored under it: how far foresight alone goes."""

    name = "ahead"
    summary = "a mask from the very tokens that it is used on (an upper bound)"
    looks_ahead = True


MASKS = (Everything, Static, FromPrompt, Ahead)
