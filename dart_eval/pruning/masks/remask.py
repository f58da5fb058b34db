"""The state of re-masks per sequence: recent FFN inputs, the drift detector, counters; and when a re-mask is due."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dart_eval.layers.experts import routing
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.masks.drift import DriftDetector
from dart_eval.pruning.masks.remasks import Remask
from dart_eval.pruning.masks.ring import RingBuffer
from dart_eval.pruning.session.sequence import PerSequence


class RemaskState(PerSequence):
    """State of B sequences under a part `remask`.

    Attributes:
        detector: the drift detector, if the part has one.
        ring: FFN inputs per layer, followed by the experts that tokens had, if the part has a ring.
        alarms: [B] bool, raised by the last forward.
        ran: decoded tokens since the context; the same for all, since they decode together.
        dense_left: [B] long, tokens still to run dense after an alarm.
        fresh_tokens: [B], tokens that ran dense after it so far.
    """

    def __init__(self, part: Remask, ffns: Sequence[FFN], batch: int, device: torch.device) -> None:
        self.part, self.device, self.ffns = part, device, tuple(ffns)
        self.detector = DriftDetector(part, batch, ffns[-1].width, device) if part.watches else None  # type: ignore[arg-type]
        self.ring = RingBuffer(part.ring, len(ffns) * (1 + any(f.routed for f in ffns))) if part.needs_ring else None
        self.alarms = torch.zeros(batch, dtype=torch.bool, device=device)
        self.ran = 0
        self.dense_left = torch.zeros(batch, dtype=torch.long, device=device)
        self.fresh_tokens = torch.zeros(batch, device=device)

    @property
    def released(self) -> bool:
        """Whether all further tokens run dense, up to the next context."""
        return 0 < self.part.release <= self.ran

    @property
    def dense_now(self) -> Tensor:
        """[B] bool, the sequences that run dense to gather scores after an alarm."""
        return self.dense_left > 0

    @property
    def to_be_dense(self) -> Tensor:
        """[B] bool, the sequences whose dense tokens after an alarm have not begun."""
        return (self.dense_left > 0) & (self.dense_left == self.part.dense_tokens)

    def observe_input(self, layer: int, x: Tensor, valid: Tensor) -> None:
        """Keep a forward's FFN inputs. x: [B, T, D]; valid: [B, T] bool."""
        if self.ring is not None:
            self.ring.write(layer, x, valid)
            if (routed := self.ffns[layer].routed) is not None:
                self.ring.write(self.routing(layer), routing(routed, len(x)), valid)

    def routing(self, layer: int) -> int:
        """Return the ring's index of the experts that a layer's tokens had."""
        return len(self.ffns) + layer

    def inputs(self, ffn: FFN, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the recent inputs of an FFN, [b, R, D], their validity, [b, R] bool, and their experts.

        Args:
            rows: [b] indices of sequences.
        """
        ring = self.ring
        assert ring is not None and ring.valid is not None
        x = ring[ffn.layer]
        at = rows.to(x.device)
        had = ring[self.routing(ffn.layer)][at] if ffn.routed else None
        return x[at], ring.valid[rows].to(x.device), had

    def observe_attention(self, a: Tensor, valid: Tensor, before: Tensor) -> None:
        """Feed the detector the context. a: [B, T, D]; before: [B], tokens of the context that came earlier."""
        if self.detector is None:
            return
        if self.part.skip_first:
            valid = valid & (valid.long().cumsum(1) + before.long()[:, None] > 1)
        self.detector.observe(a.to(self.device), valid)

    def finish(self, valid: Tensor) -> None:
        """Close a context forward whose real tokens were `valid` ([B, T] bool)."""
        if self.ring is not None:
            self.ring.advance(valid)
        if self.detector is not None:
            self.detector.set_reference()
        self.ran = 0
        self.dense_left = torch.zeros_like(self.dense_left)

    def room(self) -> int | None:
        """Return the tokens that may run in one forward before a mask may change; None for any number."""
        if self.released:
            return None
        limits = [self.detector.room()] if self.detector is not None else []
        if self.part.release:
            limits.append(self.part.release - self.ran)
        if bool(self.dense_now.any()):
            limits.append(int(self.dense_left[self.dense_now].min()))
        return min(limits, default=None)

    def decoded(self, attention: Tensor | None, valid: Tensor, shared: bool) -> Tensor:
        """Close a decoding forward, and return the sequences whose new masks are due: [B] bool.

        Args:
            attention: [B, T, D] attention output of the last layer, if there is a detector.
            valid: [B, T] bool.
            shared: all sequences have one mask and are re-masked together.
        """
        none = torch.zeros_like(self.alarms)
        if self.ring is not None:
            self.ring.advance(valid)
        self.ran += valid.shape[1]
        if self.released:
            return none
        alarms = none
        if self.detector is not None and attention is not None:
            self.alarms = self.detector.update(attention.to(self.device), valid, self.dense_now)
            if shared:
                self.alarms = self.alarms.any().expand_as(self.alarms)
            alarms = self.alarms if self.part.alarms_remask else none
        if not self.part.dense_tokens:
            return alarms
        ended = self._dense_ended(valid, shared)
        self.dense_left = self.dense_left.masked_fill(alarms, self.part.dense_tokens)
        self.fresh_tokens = self.fresh_tokens.masked_fill(alarms, 0.0)
        return ended

    def _dense_ended(self, valid: Tensor, shared: bool) -> Tensor:
        """Count dense tokens; return [B] bool, the sequences whose dense tokens have just ended."""
        dense = self.dense_now
        if not bool(dense.any()):
            return torch.zeros_like(dense)
        self.fresh_tokens = self.fresh_tokens + torch.where(dense, valid.sum(1), 0)
        ran = valid.shape[1] if shared else valid.sum(1)  # together, ended or not
        rest = (self.dense_left - ran).clamp_min(0)
        self.dense_left = torch.where(dense, rest, self.dense_left)
        return dense & (rest == 0)

    def moved(self, rows: Tensor) -> None:
        """Move the reference to the recent windows of sequences with new masks. rows: [B] bool."""
        if self.detector is not None:
            self.detector.rebase(rows)
