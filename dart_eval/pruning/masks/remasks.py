"""Re-masks: when a new mask is made while a sequence is decoded, and from which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dart_eval.pruning.part import Part, option

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape

RING = "number of recent FFN inputs per layer, from which a new mask is made"


@dataclass(frozen=True, kw_only=True)
class Remask(Part):
    """Base of all re-masks. The number of neurons in a layer stays as the prompt set it.

    Recent scores come from the last `ring` FFN inputs, which exist for pruned neurons too, or from `dense_tokens`
    tokens that run dense after an alarm. Scores are blended per token: blend * old + (1 - blend) * recent,
    the old ones being those of the prompt.
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
    blend: ClassVar[float] = 0.0
    skip_first: ClassVar[bool] = False
    release: int = option(0, "run dense after this many decoded tokens (0: never)", least=0)

    @property
    def fits_repeats(self) -> bool:  # type: ignore[override]
        return not self.watches


@dataclass(frozen=True, kw_only=True)
class Never(Remask):
    """The mask of the prompt stays."""

    name = "never"
    summary = "keeps the prompt's mask"


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
    blend: float = option(  # type: ignore[misc]
        0.25, "weight of the old scores in a new mask after an alarm", least=0, most=1
    )

    @property
    def needs_ring(self) -> bool:  # type: ignore[override]
        return self.act and not self.dense_tokens

    @property
    def alarms_remask(self) -> bool:  # type: ignore[override]
        return self.act

    @property
    def recent(self) -> int:
        """Windows that make the new reference after a re-mask."""
        return max(1, (self.dense_tokens or self.ring) // self.window)

    def flops_per_token(self, shape: ModelShape) -> float:
        return 2 * shape.width

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return shape.width + (2 + 6 * shape.width) / self.window  # a sum per token, a cosine per window


REMASKS = (Never, OnDrift)
