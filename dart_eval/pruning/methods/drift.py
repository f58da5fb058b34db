"""Drift detector: has the text moved away from the context that the mask was made from?

Signal: the last layer's attention output after its projection, a_t in R^D (no attention probabilities, so any
attention backend). Reference: the mean b over the prompt's tokens; the prompt's windows of W tokens give
s_k = cos(mean of window k, b), their mean mu and standard deviation sigma. While decoding, each full window is
compared with b: it is flagged if s < mu - max(remask.sigma * sigma, floor). A counter goes up on a flag and
down otherwise; the alarm is raised when it reaches `patience` (arXiv 2601.22632; the floor and the cool-down are
ours). Everything is per sequence.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dart_eval.pruning.rows import PerSequence

MAX_REFERENCE_WINDOWS = 64  # the latest; bounds the memory of long prompts at 64 x D fp32


class DriftSettings(NamedTuple):
    """Settings of the detector: see the options `remask.*` of `dart`.

    Attributes:
        recent: windows that make the new reference after a re-mask.
    """

    window: int
    sigma: float
    floor: float
    patience: int
    cooldown: int
    min_windows: int
    recent: int


class DriftDetector(PerSequence):
    """State of the detector for B sequences. Feed the prompt to `observe`, then `set_reference`, then `update`."""

    def __init__(self, config: DriftSettings, batch: int, width: int, device: torch.device) -> None:
        self.config = config
        self.total = torch.zeros(batch, width, device=device)  # sum of a_t over the prompt
        self.count = torch.zeros(batch, device=device)
        self.windows: list[Tensor] = [torch.zeros(0, width, device=device) for _ in range(batch)]
        self.prompt_sum = torch.zeros(batch, width, device=device)  # the prompt's window being filled
        self.prompt_fill = torch.zeros(batch, dtype=torch.long, device=device)
        self.window_sum = torch.zeros(batch, width, device=device)  # the decoded tokens' window being filled
        self.fill = torch.zeros(batch, dtype=torch.long, device=device)
        self.position = 0  # decoded tokens in the current window; the same for all, since they decode together
        self.reference = torch.zeros(batch, width, device=device)
        self.threshold = torch.full((batch,), -torch.inf, device=device)
        self.mean = torch.full((batch,), torch.nan, device=device)  # mu of the prompt's windows
        self.deviation = torch.full((batch,), torch.nan, device=device)  # their sigma, where there are two or more
        self.pressure = torch.zeros(batch, dtype=torch.long, device=device)
        self.cooling = torch.zeros(batch, dtype=torch.long, device=device)
        self.recent = torch.zeros(batch, config.recent, width, device=device)
        self.signal = torch.full((batch,), torch.nan, device=device)  # cosine of the window just closed

    def observe(self, a: Tensor, valid: Tensor) -> None:
        """Add prompt tokens. a: [B, T, D]; valid: [B, T] bool. May be called for each chunk of a prompt."""
        a = a.float().masked_fill(~valid[..., None], 0.0)
        size = self.config.window
        self.total += a.sum(1)
        self.count += valid.sum(1)
        for row in range(a.shape[0]):
            tokens = a[row, valid[row]]
            head = int(min(size - int(self.prompt_fill[row]), len(tokens)))
            self.prompt_sum[row] += tokens[:head].sum(0)
            self.prompt_fill[row] += head
            if int(self.prompt_fill[row]) < size:
                continue
            rest = tokens[head:]
            full = len(rest) // size
            means = torch.cat(
                [self.prompt_sum[row : row + 1] / size, rest[: full * size].reshape(full, size, a.shape[2]).mean(1)]
            )
            self.windows[row] = torch.cat([self.windows[row], means])[-MAX_REFERENCE_WINDOWS:]
            self.prompt_sum[row] = rest[full * size :].sum(0)
            self.prompt_fill[row] = len(rest) - full * size

    def set_reference(self) -> None:
        """Close the prompt so far: set reference and threshold, and begin an empty window for decoded tokens."""
        config = self.config
        self.reference = self.total / self.count.clamp_min(1)[:, None]
        for row, windows in enumerate(self.windows):
            if not len(windows):
                continue
            similarity = cosine_similarity(windows, self.reference[row][None], dim=-1)
            self.mean[row] = similarity.mean()
            margin = config.floor
            if len(windows) >= 2:
                self.deviation[row] = similarity.std()
            if len(windows) >= max(config.min_windows, 2):
                margin = max(config.sigma * float(self.deviation[row]), config.floor)
            self.threshold[row] = self.mean[row] - margin
        self.position = 0
        for tensor in (self.window_sum, self.fill, self.pressure, self.cooling, self.recent):
            tensor.zero_()

    def room(self) -> int:
        """Return the tokens that `update` can take until the current window closes."""
        return self.config.window - self.position

    def update(self, a: Tensor, valid: Tensor, hold: Tensor | None = None) -> Tensor:
        """Add decoded tokens, at most up to the end of the current window.

        Args:
            a: [B, T, D], T <= room().
            valid: [B, T] bool, False for padding after a sequence's end.
            hold: [B] bool, sequences that run dense after an alarm: none of their windows is flagged.

        Returns:
            [B] bool, the sequences whose alarm has just been raised.
        """
        config = self.config
        self.window_sum += a.float().masked_fill(~valid[..., None], 0.0).sum(1)
        self.fill += valid.sum(1)
        self.position += a.shape[1]
        full = self.fill >= config.window  # not for sequences that ended inside the window
        if self.position < config.window:
            return torch.zeros_like(full)
        mean = self.window_sum / config.window
        self.signal = torch.where(full, cosine_similarity(mean, self.reference, dim=-1), torch.nan)
        shifted = torch.cat([self.recent[:, 1:], mean[:, None]], dim=1)
        self.recent = torch.where(full[:, None, None], shifted, self.recent)
        cooling = self.cooling > 0
        if hold is not None:
            full = full & ~hold
        flagged = full & ~cooling & (self.signal < self.threshold)
        self.pressure = torch.where(
            full & ~cooling, torch.where(flagged, self.pressure + 1, (self.pressure - 1).clamp_min(0)), self.pressure
        )
        self.cooling = torch.where(full & cooling, self.cooling - 1, self.cooling)
        alarm = full & (self.pressure >= config.patience)
        self.pressure = self.pressure.masked_fill(alarm, 0)
        self.cooling = self.cooling.masked_fill(alarm, config.cooldown)
        self.position = 0
        self.window_sum = torch.zeros_like(self.window_sum)
        self.fill = torch.zeros_like(self.fill)
        return alarm

    def rebase(self, rows: Tensor) -> None:
        """Move the reference of the given sequences ([B] bool) to their latest windows."""
        self.reference = torch.where(rows[:, None], self.recent.mean(1), self.reference)

    def select(self, rows: Tensor) -> DriftDetector:
        """An independent copy for the given sequences (indices, repeats allowed)."""
        windows, bare = self.windows, copy.copy(self)
        bare.windows = []  # their first dimension is not the batch
        new = super(DriftDetector, bare).select(rows)
        new.windows = [windows[int(r)] for r in rows]
        return new
