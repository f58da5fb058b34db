"""How many tokens the sequences of a session have generated, and which share of the FFN weights these did not read."""

from __future__ import annotations

import torch
from torch import Tensor


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
