"""Re-masks: when a new mask is made while a sequence is decoded, and from which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dart_eval.pruning.part import Part, option
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape

RING = "number of recent FFN inputs per layer, from which a new mask is made"
OLD = "the old scores in a new mask: those of the prompt, or of the mask in force"


@dataclass(frozen=True, kw_only=True)
class Remask(Part):
    """Base of all re-masks. The number of neurons in a layer stays as the prompt set it.

    Recent scores come from the last `ring` FFN inputs, which exist for pruned neurons too, or from `dense_tokens`
    tokens that run dense after an alarm. Scores are blended per token: weight * old + (1 - weight) * recent.
    After `release` decoded tokens no token is pruned, and no mask is made, until the next prompt.

    Attributes:
        watches: whether a drift detector watches.
        needs_ring: whether it needs the recent FFN inputs.
        alarms_remask: whether an alarm leads to a new mask.
    """

    slot = "remask"
    watches: ClassVar[bool] = False
    needs_ring: ClassVar[bool] = False
    alarms_remask: ClassVar[bool] = False
    ring: ClassVar[int] = 0
    dense_tokens: ClassVar[int] = 0
    every: ClassVar[int] = 0
    old: ClassVar[str] = "prompt"
    skip_first: ClassVar[bool] = False
    moves_reference: ClassVar[bool] = False
    release: int = option(0, "run dense after this many decoded tokens (0: never)", least=0)

    @property
    def fits_repeats(self) -> bool:  # type: ignore[override]
        return not (self.watches or self.needs_ring)

    def blend_of(self, cause: str) -> float:
        """Return the weight of the old scores in a re-mask. cause: `alarm`, or `steady` for a periodic re-mask."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Never(Remask):
    """The mask of the prompt stays."""

    name = "never"
    summary = "keeps the prompt's mask"


@dataclass(frozen=True, kw_only=True)
class EveryN(Remask):
    """A new mask is made after every N decoded tokens."""

    name = "every"
    summary = "makes a new mask after a fixed number of decoded tokens"
    needs_ring = True
    tokens: int = option(16, "decoded tokens between two masks", least=1)
    ring: int = option(24, RING, least=1)  # type: ignore[misc]
    blend: float = option(0.8, "weight of the old scores in a new mask", least=0, most=1)
    old: Literal["prompt", "running"] = option("prompt", OLD)  # type: ignore[misc]

    @property
    def every(self) -> int:  # type: ignore[override]
        return self.tokens

    def blend_of(self, cause: str) -> float:
        return self.blend


@dataclass(frozen=True, kw_only=True)
class OnDrift(Remask):
    """A new mask is made when the text has drifted away from the mask's context (arXiv 2601.22632).

    The detector compares the last layer's attention output, averaged over windows of decoded tokens, with its mean over
    the prompt (`drift`). The floor, the cool-down and the ring are this project's own.
    """

    name = "drift"
    summary = "makes a new mask when a detector raises an alarm for drift"
    watches = True
    window: int = option(10, "tokens per window of the detector", least=1)
    sigma: float = option(0.5, "margin of the detector, in standard deviations of the prompt's windows")
    floor: float = option(0.1, "the least margin of the detector, in cosine")
    patience: int = option(2, "raise an alarm when flagged windows outnumber the others by this number", least=1)
    cooldown: int = option(2, "windows after an alarm in which nothing is flagged", least=0)
    min_windows: int = option(4, "use `floor` as the margin if the prompt has fewer windows", least=0)
    skip_first: bool = option(  # type: ignore[misc]
        True, "leave the prompt's first token out of the detector's reference"
    )
    act: bool = option(True, "make a new mask after an alarm (off: the detector only watches)")
    ring: int = option(24, RING, least=1)  # type: ignore[misc]
    dense_tokens: int = option(  # type: ignore[misc]
        0, "run this many tokens dense after an alarm, and score them instead of the ring (0: the ring)", least=0
    )
    blend: float = option(0.25, "weight of the old scores in a new mask after an alarm", least=0, most=1)
    old: Literal["prompt", "running"] = option("prompt", OLD)  # type: ignore[misc]
    reference: Literal["moved", "kept"] = option(
        "moved", "move the detector's reference to the new text after an alarm, or keep it"
    )
    every: int = option(0, "decoded tokens between extra masks (0: only after alarms)", least=0)  # type: ignore[misc]
    every_blend: float = option(0.8, "weight of the old scores in these periodic masks", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every and self.dense_tokens:
            raise UserError(
                f"{self.title}: `every` makes masks from the ring, and dense_tokens does without it",
                "set one of them to 0",
            )

    @property
    def needs_ring(self) -> bool:  # type: ignore[override]
        return (self.act and not self.dense_tokens) or self.every > 0

    @property
    def alarms_remask(self) -> bool:  # type: ignore[override]
        return self.act

    @property
    def moves_reference(self) -> bool:  # type: ignore[override]
        return self.reference == "moved"

    @property
    def recent(self) -> int:
        """Windows that make the new reference after a re-mask."""
        return max(1, (self.dense_tokens or self.ring) // self.window)

    def blend_of(self, cause: str) -> float:
        return self.blend if cause == "alarm" else self.every_blend

    def flops_per_token(self, shape: ModelShape) -> float:
        return 2 * shape.width

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return shape.width + (2 + 6 * shape.width) / self.window  # a sum per token, a cosine per window


REMASKS = (Never, EveryN, OnDrift)
