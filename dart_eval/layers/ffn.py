"""The FFN of a layer, whatever the family: its modules, and what they compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dart_eval.layers import experts
from dart_eval.layers.projection import bias_of, encoded, refuse_offloaded, weight_matrix


@dataclass(eq=False)
class FFN:
    """One layer's FFN, whatever the family. F neurons, model width D.

    Attributes:
        layer: its index among the FFNs.
        number: of the decoder layer, for messages.
        holder: the decoder layer.
        block: module whose first input is the FFN's input x, [B, T, D].
        gate, up, down: the projections (gate None for a plain FFN; `fused`: up holds gate and up).
        act: the activation.
        lift: function of up x before the product, or None.
        norm: between h and down, or None.
        residual: module whose first input is the residual stream y that enters the FFN, [B, T, D].
        output: module whose output the FFN adds to the stream, [B, T, D].
        attention: the output projection of the attention or its replacement, in the same layer or before.
        size, width: F, D.
        dtype: of x in the trial forward.
        scale: factor on the output before it is added (Granite).
        after: module whose first input is the stream that leaves the FFN; None: that is the layer's output.
        adds: whether, in the trial forward, that stream was y + scale * the output of `output` (+ that of `attention`,
            if side by side).
        joint: whether its layer has other FFNs, all of which then add to that stream.
        runs: times that it runs for a token.
        routed: the routed experts that it consists of, or None.
    """

    layer: int
    number: int
    holder: nn.Module
    block: nn.Module
    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    act: Callable[[Tensor], Tensor]
    fused: bool
    residual: nn.Module
    output: nn.Module
    attention: nn.Module
    size: int
    width: int
    scale: float = 1.0
    after: nn.Module | None = None
    adds: bool = True
    joint: bool = False
    lift: Callable[[Tensor], Tensor] | None = None
    norm: nn.Module | None = None
    runs: int = 1
    routed: experts.Routed | None = None
    dtype: torch.dtype | None = None

    @property
    def into(self) -> nn.Module:
        """Module whose first input is h."""
        return self.down if self.norm is None else self.norm

    @property
    def pool(self) -> int:
        """All of its neurons: with routed experts more than a token has."""
        return self.routed.pool if self.routed else self.size

    def of_token(self, mask: Tensor, batch: int) -> Tensor:
        """Return a mask [B or 1, pool] for each token of the current forward: [B or 1, T or 1, F]."""
        return self.routed.gather(mask, batch) if self.routed else mask[:, None]

    def spread(self, h: Tensor, some: slice = slice(None), tokens: int | None = None) -> Tensor:
        """Fill in 0 for the experts that a token lacks: [B, t, F] -> [B, t, pool]; without experts h as it is.

        Args:
            some: the place of these tokens among `tokens` of the current forward; by default its last ones.
        """
        return self.routed.spread(h, some, tokens) if self.routed else h

    def mask_of(self, take: Callable[[Tensor, Tensor], Tensor], scores: Tensor, keep: Tensor) -> Tensor:
        """Return a mask of the best neurons, [B, pool] bool: equally many of each expert.

        Args:
            take: makes a mask from scores [n, ...] and counts [n].
            scores: [B, pool].
            keep: [B], of a token's neurons.
        """
        return self.routed.mask_of(take, scores, keep) if self.routed else take(scores, keep)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a = act(gate x) and u = up x, each [..., F]; for a plain FFN act(up x) and None."""
        if self.gate is not None:
            return self.act(self.gate(x)), self.lifted(self.up(x))
        if self.fused:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.act(gate), self.lifted(up)
        return self.act(self.up(x)), None

    def lifted(self, up: Tensor) -> Tensor:
        """Return [..., F], the factor of act(gate x). up: up x."""
        return up if self.lift is None else self.lift(up)

    def intermediate(self, x: Tensor) -> Tensor:
        """Return h = act(gate x) * (up x), or act(up x) for a plain FFN: [..., D] -> [..., F]."""
        a, u = self.parts(x)
        return a if u is None else a * u

    def input_weights(self) -> list[Tensor]:
        """Return the matrices that make h, each [F, D] (gate and up, or up alone)."""
        if self.routed:
            return self.routed.input_weights()
        if self.gate is not None:
            return [self.matrix(self.gate), self.matrix(self.up)]
        return list(self.matrix(self.up).chunk(2)) if self.fused else [self.matrix(self.up)]

    def output_weight(self) -> Tensor:
        """Return the down projection, [D, F]."""
        return self.routed.output_weight() if self.routed else self.matrix(self.down)

    def matrix(self, projection: nn.Module) -> Tensor:
        """Return the weight of one of its projections, [out, in], in the dtype that it computes in."""
        weight = weight_matrix(projection)
        return weight.to(self.dtype) if self.dtype is not None and encoded(projection) else weight

    def write(self, h: Tensor) -> Tensor:
        """Return down h without its bias: [..., F] -> [..., D] fp32."""
        bias = bias_of(self.down)
        added = self.down(h).float()
        return added if bias is None else added - bias.float()

    @property
    def projections(self) -> list[nn.Module]:
        """Gate, if there is one, up and down."""
        return [m for m in (self.gate, self.up, self.down) if m is not None]

    @property
    def matrices(self) -> int:
        """F x D matrices that a token multiplies: 3 for gated FFNs, 2 for plain ones."""
        return 3 if self.gated else 2

    @property
    def gated(self) -> bool:
        """Whether h is a product of act(gate x) and up x."""
        return self.gate is not None or self.fused


def device_of(ffn: FFN) -> torch.device:
    """Return the device of an FFN's weights, which some libraries hold as buffers."""
    refuse_offloaded(ffn.down)
    return next(itertools.chain(ffn.down.parameters(), ffn.down.buffers())).device
