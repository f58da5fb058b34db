"""Levels of bits: a token reads the first bits of nested codes, more bits where its input is larger."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, ClassVar

from dart_eval.util.bits import OWN_BITS, Rounding
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.util.bits import Stored

TOLERANCE = 0.5 / OWN_BITS  # half a bit beyond the last level: scales of rows of other widths take other bytes


class Levels:
    """What parts share that read some of the first bits of codes.

    Attributes:
        slot, title: see `Part`.
        levels: bits that may be read, ascending; the last number is a code's bits.
        group: number of weights that share a scale; 0: a whole row.
    """

    slot: ClassVar[str]
    title: str
    levels: str
    group: int

    @property
    def bits(self) -> list[int]:
        """The levels."""
        return [int(word) for word in self.levels.split("-")]

    @property
    def step(self) -> int | None:
        """Bits between neighbouring levels; None if they differ."""
        steps = {b - a for a, b in itertools.pairwise(self.bits)}
        return steps.pop() if len(steps) == 1 else None

    @property
    def rounding(self) -> Rounding:
        """Of the codes."""
        return Rounding(self.bits[-1], self.group)

    def check_bits(self, bits: Stored) -> None:
        if bits.code != OWN_BITS:
            raise UserError(
                f"{self.title} makes codes of 16-bit weights, and these have {bits.total:.3g} bits",
                "leave --ffn-bits out, or load the model unquantised",
            )

    def out_of_reach(self, least: float, most: float, share: float) -> UserError:
        """Return the refusal of a read beyond the levels. All three are shares of the bytes."""
        highest = math.floor(1000 * (1 - least)) / 1000
        return UserError(
            f"{self.title} reads {100 * least:.1f} to {100 * most:.1f} % of the bytes, not {100 * share:.4g} %",
            f"use a sparsity from {1 - most:.3f} to {highest:.3f}, or other {self.slot}.levels",
        )

    def scale(self, width: int) -> float:
        """Return the bits of a scale per weight, in rows of `width` weights. They are always read."""
        return self.rounding.weight_bits(width) - self.rounding.bits

    def gains(self, errors: Tensor) -> Tensor:
        """Return [levels - 1] fp32, the error that each step to the next level saves for a bit; never rising.

        These are the slopes of the convex hull of the errors over bits: steps that save more together than the first of
        them alone are one step. (Two bits of weights among much larger ones may be worse than none.)

        Args:
            errors: [levels], the squared error of a column at each level.
        """
        import torch

        bits, steps = self.bits, range(len(self.bits) - 1)
        slopes = {(a, b): (errors[a] - errors[b]) / (bits[b] - bits[a]) for b in range(len(bits)) for a in range(b)}
        found = []
        for step in steps:
            best = [torch.stack([slopes[a, b + 1] for b in steps[step:]]).amax(0) for a in steps[: step + 1]]
            found.append(torch.stack(best).amin(0).clamp(min=0))
        return torch.stack(found) if found else errors[:0]

    def chosen(self, x: Tensor, gains: Tensor, bits: int) -> Tensor:
        """Return [..., n] long, the level of each column, counted from 0.

        Args:
            x: [..., n], the inputs. gains: see `gains`. bits: that a token reads of all.
        """
        import torch

        from dart_eval.kernels.top import top_k_mask

        each = x.float().square()[..., None, :] * gains[:, None].to(x.device)
        shape, saved = each.shape[-2:], each.flatten(-2)
        if step := self.step:  # the largest ones, which need no sorting
            keep = torch.tensor(min((bits - self.bits[0] * x.shape[-1]) // step, saved.shape[-1]))
            return top_k_mask(saved, keep).unflatten(-1, shape).sum(-2)
        order = saved.argsort(dim=-1, descending=True, stable=True)  # of equal steps the lower level's first
        cost = torch.tensor(self.bits, device=x.device).diff()[:, None].expand(shape).flatten()
        fits = cost[order].cumsum(-1) <= bits - self.bits[0] * x.shape[-1]
        return torch.zeros_like(fits).scatter(-1, order, fits).unflatten(-1, shape).sum(-2)

    def multiplied(self, read: float) -> float:
        """See `Part.multiplied`: fewer bits are no fewer products."""
        return 1.0
