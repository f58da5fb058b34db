"""Previews of h through images of the experts of each token, times the router's weight."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dart_eval.layers.expert_pool import input_biases
from dart_eval.layers.experts import Routed
from dart_eval.pruning.choices.look import Preview, expected_square


@dataclass(frozen=True)
class ExpertPreview(Preview):
    """The images of the experts of one layer: F neurons of a token's experts, `pool` neurons of all.

    Attributes:
        weights, biases, row_errors: see `Preview`, for all experts: [pool, D], [pool], [pool].
        down: returns the image of down, [E D, I]; None.
        columns: [pool] fp32, if there is an image of down.
        of: the experts, under the routing of the current forward.
    """

    of: weakref.ref[Routed] = field(kw_only=True)

    @property
    def routed(self) -> Routed:
        """The experts."""
        routed = self.of()
        assert routed is not None
        return routed

    def look(self, x: Tensor, rough: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Preview.look`. Up counts after `Routed.rest`, and h with the router's weight.

        Args:
            x: [..., D], of the last tokens of the current forward.
        """
        routed, shape = self.routed, (*x.shape[:-1], self.routed.size)
        x = x.reshape(-1, x.shape[-1])
        seen, off = self._project_parts(x, None if rough is None else rough.reshape(x.shape))
        weight = routed.weights[-len(x) :, :, None]
        h = self.act(seen[0]) if len(seen) == 1 else routed.gated(*seen)
        expected = expected_square(self.act, [s.float() for s in seen], off, routed.rest)
        most = torch.finfo(h.dtype).max
        h, expected = (h * weight.to(h.dtype)).clamp(-most, most), expected * weight.float().square()
        return h.reshape(shape), expected.reshape(shape)

    def _project(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return each image's product with x [N, D] and its error in fp32: [N, count, I]."""
        routed, size = self.routed, x.float().norm(dim=-1, keepdim=True)
        shape = len(x), routed.count, routed.inner
        seen = [x.new_zeros(shape) for _ in self.weights]
        off = [torch.zeros(shape, device=x.device) for _ in self.weights]
        matrices = [weight() for weight in self.weights]
        for expert, tokens, places in routed.each(routed.index[-len(x) :]):
            some = slice(expert * routed.inner, (expert + 1) * routed.inner)
            for i, (matrix, bias, row_error) in enumerate(zip(matrices, self.biases, self.row_errors, strict=True)):
                seen[i][tokens, places] = nn.functional.linear(
                    x[tokens], matrix[some], None if bias is None else bias[some]
                )
                off[i][tokens, places] = size[tokens] * row_error[some]
        if routed.inward is not None:
            factor = routed.inward[-len(x) :, :, None]
            seen, off = [s * factor.to(s.dtype) for s in seen], [o * factor.float().abs() for o in off]
        return seen, off

    def write(self, h: Tensor) -> Tensor:
        """Multiply h of the last tokens with the images of their experts' down: [..., F] -> [..., D]."""
        assert self.down is not None
        routed, each = self.routed, h.reshape(-1, self.routed.count, self.routed.inner)
        out, down = h.new_zeros(len(each), routed.width), self.down().view(-1, routed.width, routed.inner)
        for expert, tokens, places in routed.each(routed.index[-len(each) :]):
            out.index_add_(0, tokens, nn.functional.linear(each[tokens, places], down[expert]))
        return out.view(*h.shape[:-1], routed.width)


def of_experts(
    routed: Routed, inputs: Sequence[Callable[[], Tensor]], row_errors: Sequence[Tensor],
    down: Callable[[], Tensor] | None, exact: Tensor | None,
) -> ExpertPreview:  # fmt: skip
    """Return the preview of a layer's experts.

    Args:
        inputs: return the images of the matrices that make h, [pool, D] each.
        row_errors: of these, [pool] each.
        down: returns the image of down, the experts' rows below each other, [E D, I]; None.
        exact: down's own weights, if there is an image of it.
    """
    shape = routed.all, routed.width, routed.inner
    columns = None if exact is None else exact.view(shape).float().norm(dim=1).half().float().square().flatten()
    experts = routed.experts
    of = weakref.ref(routed)
    act = functools.partial(_act, of) if experts.has_gate else experts.act_fn
    return ExpertPreview(tuple(inputs), input_biases(routed), tuple(row_errors), act, down, columns, of=of)


def _act(of: weakref.ref[Routed], gate: Tensor) -> Tensor:
    """Return the gate's factor in h, elementwise (`Routed.act`)."""
    routed = of()
    assert routed is not None
    return routed.act(gate)
