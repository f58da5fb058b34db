"""What decoding forwards used, what a session noted of them, and how much its tokens did not read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dart_eval.pruning.masks.drift import DriftDetector


@dataclass(frozen=True)
class Change:
    """New masks of one sequence: `cause` is `alarm` or `steady`; `overlap` per layer, |old and new| / |old|."""

    sequence: int
    cause: str
    overlap: list[float]


@dataclass(frozen=True)
class Step:
    """What a decoding forward uses. read: [B] FFN weights read / all of them. mask: [B] neurons in the mask / all.

    Both are fp64 on the CPU; they are equal but for methods whose tokens choose inside the mask.
    """

    read: Tensor
    mask: Tensor


class Tally:
    """Counts generated tokens. A context's last position makes the first one, densely; each decoding forward one more.

    What a batch computes for a sequence that has ended (its end and the padding after it are fed on until the others
    end) is no token of it: that is seen only where nothing else follows, so it is kept apart until something does.
    """

    def __init__(self) -> None:
        self._skipped = 0.0  # weights not read, in shares, summed over tokens
        self._tokens = 0.0
        self._first = 0  # sequences whose first token the last context forward has made
        self._after_end = torch.zeros(2, 0, dtype=torch.float64)  # [2, B] weights not read, tokens

    def context(self, batch: int, goes_on: bool) -> None:
        """A dense forward. goes_on: on the same cache as the context forward before it (a chunk of one prompt)."""
        if not goes_on:
            self._tokens += self._first
        self._first = batch
        self._after_end = torch.zeros(2, batch, dtype=torch.float64)

    def decode(self, read: Tensor, length: int, ended: Tensor | None = None) -> None:
        """A decoding forward of `length` tokens per sequence.

        Args:
            read: [B] share of the FFN weights that each reads.
            ended: [B] bool, sequences that were fed an end or padding; None: none.
        """
        new = torch.stack([1 - read.double(), torch.ones_like(read, dtype=torch.float64)]) * length
        if ended is None and not self._after_end.any():
            skipped, tokens = new.sum(1).tolist()
        else:
            if self._after_end.shape[1] != len(read):
                self._after_end = torch.zeros_like(new)
            ended = torch.zeros(len(read), dtype=torch.bool) if ended is None else ended.cpu()
            skipped, tokens = (self._after_end + new)[:, ~ended].sum(1).tolist()
            self._after_end = torch.where(ended, self._after_end + new, 0.0)
        self._skipped += skipped
        self._tokens += tokens

    @property
    def share(self) -> float:
        """Weights not read / all, over the tokens so far; 0 where there are none."""
        tokens = self._tokens + self._first
        return self._skipped / tokens if tokens else 0.0


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
