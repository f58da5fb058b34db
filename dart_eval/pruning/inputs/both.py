"""graded-both: more bits of columns with larger inputs, then of the neurons left most uncertain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.inputs.columns import GradedColumns
from dart_eval.pruning.part import option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.inputs.matrix import GradedMatrix


@dataclass(frozen=True, kw_only=True)
class GradedBoth(GradedColumns):
    """A token reads gate and up by graded columns, and then more bits of the neurons that it knows least of.

    With b bits of a weight in all, it looks twice at gate and up, and once at down:

        first look    all rows, b - neurons * more bits of a weight (more, if a second look ends at all bits), columns
                      as `columns` ranks them
        open          E[h^2] - (1 - known) h~^2 of each neuron: h~ by the first look, E[h^2] over its errors +-e,
                      e^2 = the mean over rows of what the bits not read would save (`unread`)
        second look   of the share `neurons` with the largest: `more` bits of a weight more, columns by the same ranking
        down          b bits of a weight, columns as `columns` ranks them

    So bits follow rows and columns at once. This project's own. The bits of a second look lie apart in both directions:
    no layout of memory lets a kernel read them alone.
    """

    name = "both"
    summary = "reads more bits of the columns with larger inputs, and of the neurons that these leave most uncertain"
    granularity = "bits of input channels and neurons"
    neurons: float = option(0.25, "share of the neurons of which a token reads more bits", above=0, most=0.9)
    more: float = option(2.0, "bits of a weight that a second look reads, on average", above=0, most=8)
    known: float = option(
        0.2, "weight of the first look's h^2 beside its uncertainty, in the choice of neurons", least=0, most=1
    )

    def lacking(self, ffn: FFN) -> str | None:
        return f"{self.title} has no kernel"

    @property
    def fewest(self) -> float:
        return self.bits[0] + self.neurons * min(self.more, self.bits[-1] - self.bits[0])

    def first_look(self, room: float) -> float:
        few, most = self.neurons, self.bits[-1]
        return max(room - few * self.more, (room - few * most) / (1 - few))  # a second look ends at all bits

    def second_look(self, x: Tensor, matrix: GradedMatrix) -> Tensor:
        """Return [..., n] long, the level of each column of the neurons of the second look, after both looks.

        Args:
            x: [..., n], the inputs.
        """
        most = min(int(matrix.limit + self.more * matrix.width + 1e-9), self.bits[-1] * matrix.width)
        return self.chosen(x, matrix.gains, most)

    def count(self, neurons: int) -> int:
        """Return the neurons of a second look."""
        return int(self.neurons * neurons + 1e-9)

    def unread(self, x: Tensor, matrix: GradedMatrix, level: Tensor) -> Tensor:
        """Return [..., 1] fp32, the error of a product with a row after a look: the root of its mean square over rows.

        The square is sum_i x_i^2 (E(b_i) - E(all bits)) / rows, E on its convex hull (`Levels.gains`).

        Args:
            x: [..., n], the inputs. level: [..., n], of the columns.
        """
        import torch

        saved = matrix.gains.to(x.device) * torch.tensor(self.bits, device=x.device).diff()
        left = torch.cat([saved.flip(0).cumsum(0).flip(0), saved.new_zeros(1)])  # by levels
        return (x.float().square() * left[level]).sum(-1, keepdim=True).div(matrix.rows).sqrt()

    def least_known(
        self, products: Sequence[Tensor], errors: Sequence[Tensor], act: Callable[[Tensor], Tensor],
        lift: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """Return [..., F] bool, the neurons of the second look.

        Args:
            products: of gate and up, or of a plain FFN's up, by the first look: [..., F] fp32 each.
            errors: of these, [..., 1] each.
            act: the activation. lift: applied to up x before its product with the gate, or None.
        """
        import torch

        from dart_eval.kernels.top import top_k_mask

        h = act(products[0])
        if len(products) > 1:
            h = h * (products[1] if lift is None else lift(products[1]))
        open_ = (expected_square(act, products, errors, lift) - (1 - self.known) * h.square()).clamp(min=0)
        return top_k_mask(open_, torch.tensor(self.count(open_.shape[-1])))

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        inputs = shape.width * (shape.ffn_matrices - 1)
        again = 2 * self.neurons * mask * inputs  # the products of the second look; columns' places are known by then
        return super().flops_per_step(shape, mask) + again + 3 * shape.layers * inputs + 14 * mask


def expected_square(
    act: Callable[[Tensor], Tensor], seen: Sequence[Tensor], errors: Sequence[Tensor],
    lift: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return the expected square of h, if each product is off by its error, up or down: [..., F] fp32.

    Args:
        act: the activation.
        seen: gate x and up x, or a plain FFN's up x, as a first look has them; [..., F] fp32 each.
        errors: of these, of any shape that spreads to theirs.
        lift: applied to up x before the product with the gate, or None.
    """

    def mean(function: Callable[[Tensor], Tensor], x: Tensor, error: Tensor) -> Tensor:
        return (function(x + error).square() + function(x - error).square()) / 2

    expected = mean(act, seen[0], errors[0])
    if len(seen) == 1:
        return expected
    return expected * (seen[1].square() + errors[1].square() if lift is None else mean(lift, seen[1], errors[1]))
