"""How much the FFN of every layer changes the residual stream, on the tokens of a context: DART's sensitivity.

    S_l = (1 - mean cos(y, z)) * mean(||z - y|| / ||y||)

y is the stream that enters the FFN, z the FFN's output (of the setting `residual`, the stream behind it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from dart_eval.layers import verify
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.rows import PerSequence

if TYPE_CHECKING:
    from dart_eval.pruning.method import Hook
    from dart_eval.pruning.session import Session


class ChangeState(PerSequence):
    """How much each layer's FFN changes the stream, summed over the context's tokens of B sequences.

    Attributes:
        residual: compare with the stream behind the FFN, not with its output.
        numbers: the decoder layer of each FFN.
    """

    def __init__(self, batch: int, ffns: Sequence[FFN], residual: bool) -> None:
        layers, self.residual = len(ffns), residual
        self.numbers = tuple(f.number for f in ffns)
        self.tokens = torch.zeros(batch)
        self.cosine = torch.zeros(batch, layers)  # sum over tokens of cos(y, z), on the CPU
        self.change = torch.zeros(batch, layers)  # sum over tokens of ||z - y|| / ||y||

    @torch.no_grad()
    def observe(self, layer: int, y: Tensor, added: Tensor, valid: Tensor) -> None:
        """Add a layer's tokens. y: the stream that enters the FFN; added: the FFN's output, both [B, T, D]."""
        y, z, valid = y.float(), added.float(), valid.to(y.device)
        if self.residual:
            z = y + z
        cosine = cosine_similarity(y, z, dim=-1)
        change = (z - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-12)
        self.cosine[:, layer] += torch.where(valid, cosine, 0).sum(1).cpu()
        self.change[:, layer] += torch.where(valid, change, 0).sum(1).cpu()

    def finish(self, valid: Tensor) -> None:
        """Close a context forward whose real tokens were `valid` ([B, T] bool)."""
        self.tokens += valid.sum(1).cpu()

    def sensitivity(self, index: Tensor, magnitude: bool = True) -> dict[int, float]:
        """Return S_l of every decoder layer, over the tokens of these sequences together.

        Args:
            index: [b] of the sequences.
            magnitude: False: the first factor alone.
        """
        n = max(float(self.tokens[index].sum()), 1.0)
        turn = 1 - self.cosine[index].sum(0) / n
        values = turn * (self.change[index].sum(0) / n) if magnitude else turn
        return dict(zip(self.numbers, values.tolist(), strict=True))


class ChangeHooks:
    """The hooks on the stream before and behind the FFNs of a model. FFNs of one layer count together."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._before: Tensor | None = None  # the stream that entered the current FFN

    def all(self) -> list[Hook]:
        """Return the hooks."""
        hooks: list[Hook] = []
        for f in self.session.ffns:
            together = [g for g in self.session.ffns if g.holder is f.holder]
            leave = self._leave(together if f.joint else [f])
            if not f.joint:
                hooks += [(f.residual, "register_forward_pre_hook", self._enter)]
                hooks += [(f.output, "register_forward_hook", leave)]
            elif f is together[0]:
                hooks += [(f.residual, "register_forward_pre_hook", self._enter_copied)]
                if f.after is not None:
                    hooks += [(f.after, "register_forward_pre_hook", leave)]
                else:
                    hooks += [(f.holder, "register_forward_hook", leave)]
        return hooks

    def _enter(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.session.phase == "context":
            self._before = self.session.in_batch(args[0])

    def _enter_copied(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.session.phase == "context":
            self._enter(module, (args[0].clone(),))  # a model may add to it in place before it leaves the layer

    def _leave(self, ffns: Sequence[FFN]) -> Callable[..., None]:
        """Return the hook of a module behind FFNs: it tells what they add together."""
        joint, layer = ffns[0].joint, ffns[0].holder

        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            before, self._before = self._before, None
            if self.session.phase != "context" or self.session.rows is None or before is None:
                return
            stream = args[0] if output is None else verify.unscaled(layer, output) if joint else output
            stream = self.session.in_batch(stream)
            added = stream - before if joint else stream * ffns[0].scale
            for f in ffns:
                self.session.rows.change.observe(f.layer, before, added, self.session.valid)

        return hook
