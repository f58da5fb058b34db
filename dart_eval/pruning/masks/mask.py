"""Masks: which neurons a sequence may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dart_eval.pruning.masks.draws import Best, Draw
from dart_eval.pruning.masks.remasks import Never, Remask
from dart_eval.pruning.masks.scores import Activation, AnyScore, Score, Wanda
from dart_eval.pruning.part import Part, option


@dataclass(frozen=True, kw_only=True)
class Mask(Part):
    """Base of all masks.

    Attributes:
        fixed: whether all sequences have one mask, made before any prompt.
        holds_all: whether it holds every neuron.
        looks_ahead: whether it is made from the very tokens that run under it: an upper bound, not a usable method.
        score: the score of the neurons; None for a mask of everything.
        draw: how the mask is taken from the scores.
        remask: when a new mask is made.
    """

    slot = "mask"
    fixed: ClassVar[bool] = False
    holds_all: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    score: ClassVar[AnyScore | None] = None
    draw: ClassVar[Draw] = Best()
    remask: ClassVar[Remask] = Never()


@dataclass(frozen=True, kw_only=True)
class Everything(Mask):
    """The mask holds every neuron of every layer."""

    name = "everything"
    summary = "keeps every neuron: each token's choice prunes"
    fixed = True
    holds_all = True


@dataclass(frozen=True, kw_only=True)
class Static(Mask):
    """All sequences have one mask, made before any prompt from the weights or a calibration text."""

    name = "static"
    summary = "makes one mask for all texts, from the weights or a calibration text"
    fixed = True
    score: AnyScore = option(Wanda(), "what it is made by")  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class OfTokens(Mask):
    """Base of masks that are made for each sequence from its own tokens."""

    needs_context = True
    score: Score = option(Activation(), "what it is made by")  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class FromPrompt(OfTokens):
    """Each sequence gets a mask of its own, from the tokens of its context."""

    name = "prompt"
    summary = "makes a mask for each sequence, from the tokens of its context"
    draw: Draw = option(Best(), "how it is taken from the scores")  # type: ignore[misc]
    remask: Remask = option(Never(), "when it is made anew")  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class Ahead(OfTokens):
    """Each sequence gets a mask from the very tokens that are then scored under it: an upper bound."""

    name = "ahead"
    summary = "makes a mask from the same tokens that then run under it (upper bound)"
    looks_ahead = True


MASKS = (Everything, Static, FromPrompt, Ahead)
