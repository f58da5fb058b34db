"""Previews of h, through images of gate and up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Preview:
    """The images of one layer, by neuron.

    Attributes:
        weights: functions that return the image of gate and up, or of up alone, [F, D] each.
        biases: of the same, [F] each or None.
        row_errors: of the same, [F] fp32 each: root mean square error of the image of a neuron's row.
        act: the activation.
        down: returns the image of down, [D, F], if neurons write through it; else None.
        columns: [F] fp32, squared norms of down's own columns, if there is an image of down.
        lift: applied to up x before the product with the gate, or None.
        rougher: images with one bit fewer per weight and no biases, if tokens read some columns so; else None.
    """

    weights: tuple[Callable[[], Tensor], ...]
    biases: tuple[Tensor | None, ...]
    row_errors: tuple[Tensor, ...]
    act: Callable[[Tensor], Tensor]
    down: Callable[[], Tensor] | None = None
    columns: Tensor | None = None
    lift: Callable[[Tensor], Tensor] | None = None
    rougher: Preview | None = None

    def look(self, x: Tensor, rough: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return h according to the images, and its expected square.

        An image has an error in every row. If x is not aligned with it, a product with x is off by about
        ||x|| * row_error, up or down; the expected square of h averages both.

        Args:
            x: [..., D].
            rough: [..., D], the part of x that the rougher images multiply, or None.

        Returns:
            [..., F] h by the images, and [..., F] fp32 the expected square of h.
        """
        seen, off = self._project_parts(x, rough)
        h = self.act(seen[0])
        if len(seen) > 1:
            h = h * (seen[1] if self.lift is None else self.lift(seen[1]))
        most = torch.finfo(h.dtype).max  # a preview may overflow where the exact h does not
        return h.clamp(-most, most), expected_square(self.act, [s.float() for s in seen], off, self.lift)

    def _project_parts(self, x: Tensor, rough: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return the images' products with both parts of x, and their errors. Arguments as of `look`."""
        seen, off = self._project(x)
        if rough is not None and self.rougher is not None:
            more, beside = self.rougher._project(rough)
            seen = [a + b for a, b in zip(seen, more, strict=True)]
            off = [torch.hypot(a, b) for a, b in zip(off, beside, strict=True)]
        return seen, off

    def _project(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return each image's product with x [..., D], [..., F], and its error in fp32."""
        size = x.float().norm(dim=-1, keepdim=True)
        return self.project(x), [size * row_error for row_error in self.row_errors]

    def project(self, x: Tensor) -> list[Tensor]:
        """Return each image's product with x [..., D]: [..., F]."""
        return [nn.functional.linear(x, w(), b) for w, b in zip(self.weights, self.biases, strict=True)]

    def write(self, h: Tensor) -> Tensor:
        """Multiply h with the image of down: [..., F] -> [..., D]."""
        assert self.down is not None
        return nn.functional.linear(h, self.down())


def expected_square(
    act: Callable[[Tensor], Tensor], seen: Sequence[Tensor], errors: Sequence[Tensor],
    lift: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return the expected square of h, if each product is off by its error, up or down: [..., F] fp32.

    Args:
        act: the activation.
        seen: gate x and up x, or a plain FFN's up x, as a preview has them; [..., F] fp32 each.
        errors: of these, of any shape that spreads to theirs.
        lift: applied to up x before the product with the gate, or None.
    """

    def mean(function: Callable[[Tensor], Tensor], x: Tensor, error: Tensor) -> Tensor:
        return (function(x + error).square() + function(x - error).square()) / 2

    expected = mean(act, seen[0], errors[0])
    if len(seen) == 1:
        return expected
    return expected * (seen[1].square() + errors[1].square() if lift is None else mean(lift, seen[1], errors[1]))
