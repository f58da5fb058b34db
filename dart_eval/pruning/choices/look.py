"""What h looks like through images of gate and up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Preview:
    """The images of one layer, by neuron.

    Attributes:
        weights: of gate and up, or of up alone, what gives [F, D] each. biases: of the same, [F] each or None.
        doubts: of the same, [F] fp32 each: the root mean square of what the image leaves out of a neuron's row.
        act: the activation.
        down: of down, what gives [D, F], where neurons write through an image; else None.
        columns: then [F] fp32, the squares of the norms of down's own columns.
        lift: what is done to up x before it is multiplied; None.
        rougher: the same, biases left out, with one bit fewer of each weight, where tokens read some columns so; None.
        order: [D], the columns in the order in which they lie, where that is not their own; None.
    """

    weights: tuple[Callable[[], Tensor], ...]
    biases: tuple[Tensor | None, ...]
    doubts: tuple[Tensor, ...]
    act: Callable[[Tensor], Tensor]
    down: Callable[[], Tensor] | None = None
    columns: Tensor | None = None
    lift: Callable[[Tensor], Tensor] | None = None
    rougher: Preview | None = None
    order: Tensor | None = None

    def look(self, x: Tensor, rough: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h as the images have it, and how much of it is to be expected.

        An image leaves something out of every row. Where x does not prefer it, a product with x is off by
        ||x|| * doubt, up or down; the expected square of h takes both in.

        Args:
            x: [..., D]. rough: [..., D], another part of x, which is multiplied with the rougher images; None: none.

        Returns:
            [..., F] h by the images, and [..., F] fp32 the expected square of h.
        """
        seen, off = self._both(x, rough)
        first = seen[0].float()
        expected = (self.act(first + off[0]).square() + self.act(first - off[0]).square()) / 2
        if len(seen) == 1:
            return self.act(seen[0]), expected
        up = seen[1] if self.lift is None else self.lift(seen[1])
        return self.act(seen[0]) * up, expected * (up.float().square() + off[1].square())

    def _both(self, x: Tensor, rough: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """What the images make of both parts of x together, and how far that may be off. Arguments as of `look`."""
        seen, off = self._seen(x)
        if rough is not None and self.rougher is not None:
            more, beside = self.rougher._seen(rough)
            seen = [a + b for a, b in zip(seen, more, strict=True)]
            off = [torch.hypot(a, b) for a, b in zip(off, beside, strict=True)]
        return seen, off

    def _seen(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What the images make of x: [..., F] for each, and fp32 how far that may be off. x: [..., D]."""
        size = x.float().norm(dim=-1, keepdim=True)
        return self.seen(x), [size * doubt for doubt in self.doubts]

    def seen(self, x: Tensor) -> list[Tensor]:
        """What the images make of x: [..., F] for each. x: [..., D]."""
        return [nn.functional.linear(x, w(), b) for w, b in zip(self.weights, self.biases, strict=True)]

    def write(self, h: Tensor) -> Tensor:
        """[..., F] -> [..., D], what h adds through the image of down."""
        assert self.down is not None
        return nn.functional.linear(h, self.down())
