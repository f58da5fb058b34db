"""The log of a session's decoding forwards, and the tally of the bytes that its tokens did not read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dart_eval.util.text import Json


@dataclass(frozen=True)
class Step:
    """The weights of a decoding forward, fp64 on the CPU. They differ only if tokens choose inside the mask.

    Attributes:
        read: [B] FFN weights read / all.
        mask: [B] neurons in the mask / all.
    """

    read: Tensor
    mask: Tensor


class Tally:
    """Counts generated tokens: the first one, dense, from the context's last position, then one per decoding forward.

    After a sequence's end, `generate` keeps feeding padding until the others end. These steps are buffered, and count
    only if a real token follows.
    """

    def __init__(self) -> None:
        self._skipped = 0.0  # shares of the weights not read, summed over tokens
        self._tokens = 0.0
        self._first = 0  # first tokens made by the last context forward, one per sequence
        self._after_end = torch.zeros(2, 0, dtype=torch.float64)  # [2, B] weights not read, tokens

    def context(self, batch: int, goes_on: bool) -> None:
        """Count a dense forward. goes_on: it continues the context forward before it (a chunk of one prompt)."""
        if not goes_on:
            self._tokens += self._first
        self._first = batch
        self._after_end = torch.zeros(2, batch, dtype=torch.float64)

    def decode(self, read: Tensor, length: int, ended: Tensor | None = None) -> None:
        """Count a decoding forward of `length` tokens per sequence.

        Args:
            read: [B] share of the FFN weights read.
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
        self.correct(skipped, tokens)

    def correct(self, skipped: float, tokens: float) -> None:
        """Add to the sums: of weights not read, and of tokens."""
        self._skipped += skipped
        self._tokens += tokens

    @property
    def share(self) -> float:
        """Weights not read / all, over the tokens so far; 0 without tokens."""
        tokens = self._tokens + self._first
        return self._skipped / tokens if tokens else 0.0


@dataclass
class Log:
    """Notes since the last new context.

    Attributes:
        steps: the weights of each decoding forward.
        events: re-masks: step, token, sequence, overlap.
        alarms: of the detector: token, sequence.
        signals: [B] per detector window; NaN for sequences that had ended.
        decoded: tokens per sequence.
    """

    steps: list[Step] = field(default_factory=list)
    events: list[dict[str, object]] = field(default_factory=list)
    alarms: list[dict[str, object]] = field(default_factory=list)
    signals: list[Tensor] = field(default_factory=list)
    decoded: int = 0

    def remasked(self, due: Tensor, overlaps: list[list[float]]) -> None:
        """Log new masks. due: [B] bool, their sequences; overlaps: per layer and sequence, |old and new| / |old|."""
        for k, row in enumerate(due.nonzero().flatten().tolist()):
            overlap = [of_layer[k] for of_layer in overlaps]
            self.events.append({"step": len(self.steps), "token": self.decoded, "sequence": row, "overlap": overlap})

    def mark(self) -> tuple[int, int, int]:
        """Return how long the lists but `steps` are, for `cut`."""
        return len(self.events), len(self.alarms), len(self.signals)

    def cut(self, mark: tuple[int, int, int]) -> None:
        """Forget what was noted since a mark."""
        every: tuple[list[Any], ...] = (self.events, self.alarms, self.signals)
        for notes, kept in zip(every, mark, strict=True):
            del notes[kept:]

    def trace(self, detector: Any, row: int, tokens: int | None) -> Json | None:
        """Return the detector's trace of one sequence since its context, or None if no window was full.

        Args:
            detector: of the current sequences (`methods.drift`).
            row: index of the sequence.
            tokens: end the trace after this many pruned tokens; None: at the last one.

        Returns:
            `window` (tokens); `threshold` (None if the prompt had no full window); `signal` (cosines, one per full
            window); `mean` and `deviation` of the prompt's windows, if there were any; `alarms` (decoded tokens
            before each) and `remasks` (before each new mask after an alarm).
        """
        window = detector.config.window
        last = len(self.signals) if tokens is None else min(len(self.signals), tokens // window)
        signal = [value for s in self.signals[:last] if not math.isnan(value := float(s[row]))]
        if not signal:
            return None

        def tokens_of(events: list[Json]) -> list[int]:
            mine = [e["token"] for e in events if e["sequence"] == row]
            return [token for token in mine if tokens is None or token <= tokens]

        threshold = float(detector.threshold[row])
        trace = {
            "window": window, "threshold": threshold if math.isfinite(threshold) else None, "signal": signal,
            "alarms": tokens_of(self.alarms), "remasks": tokens_of(self.events),
        }  # fmt: skip
        for name in ("mean", "deviation"):
            value = float(getattr(detector, name)[row])
            if not math.isnan(value):
                trace[name] = value
        return trace
