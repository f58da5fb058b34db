"""The notes of a session on its sequences since their context: steps, re-masks, what the detector saw."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dart_eval.pruning.masks.drift import DriftDetector
from dart_eval.pruning.session.steps import Change, Step


@dataclass
class Log:
    """Notes since the last new context.

    Attributes:
        steps: what each decoding forward used.
        events: re-masks: step, token, sequence, cause, overlap.
        alarms: of the detector: token, sequence.
        signals: [B] per detector window; NaN where a sequence had ended.
        decoded: tokens per sequence.
    """

    steps: list[Step] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    signals: list[Tensor] = field(default_factory=list)
    decoded: int = 0

    def changed(self, change: Change) -> None:
        """A sequence has new masks."""
        self.events.append({
            "step": len(self.steps), "token": self.decoded, "sequence": change.sequence,
            "cause": change.cause, "overlap": change.overlap,
        })  # fmt: skip

    def watched(self, detector: DriftDetector, alarms: Tensor) -> None:
        """A decoding forward has been shown to the detector. alarms: [B] bool, raised by it."""
        if detector.position == 0:
            self.signals.append(detector.signal.cpu())
        for row in alarms.nonzero().flatten().tolist():
            self.alarms.append({"token": self.decoded, "sequence": row})

    def trace(self, detector: DriftDetector | None, row: int, tokens: int | None) -> dict[str, Any] | None:
        """What the detector saw of one sequence since its context, or None where no window was full.

        Args:
            detector: of the sequences under way, if they have one. row: which of them.
            tokens: leave out what came after this many tokens that ran pruned; None: nothing.

        Returns:
            `window` (tokens); `threshold` (None where the prompt had no full window); `signal` (cosines, one per full
            window); `mean` and `deviation` of the prompt's windows, where there were any; `alarms` (decoded tokens
            before each) and `remasks` (before each new mask that followed one).
        """
        if detector is None:
            return None
        window = detector.config.window
        last = len(self.signals) if tokens is None else min(len(self.signals), tokens // window)
        signal = [value for s in self.signals[:last] if not math.isnan(value := float(s[row]))]
        if not signal:
            return None

        def those(events: list[dict[str, Any]]) -> list[int]:
            mine = [e["token"] for e in events if e["sequence"] == row and e.get("cause") != "steady"]
            return [token for token in mine if tokens is None or token <= tokens]

        threshold = float(detector.threshold[row])
        found = {
            "window": window, "threshold": threshold if math.isfinite(threshold) else None, "signal": signal,
            "alarms": those(self.alarms), "remasks": those(self.events),
        }  # fmt: skip
        for name in ("mean", "deviation"):
            value = float(getattr(detector, name)[row])
            if not math.isnan(value):
                found[name] = value
        return found
