"""graded-both: a token reads gate and up by graded columns, and then more bits of the neurons that it knows least of.

With b bits of a weight in all, it looks twice at gate and up, and once at down:

    first look    all rows, b - neurons * more bits of a weight (more, if a second look ends at all bits), columns as
                  `grinqh` ranks them
    open          E[h^2] - (1 - known) h~^2 of each neuron: h~ by the first look, E[h^2] over its errors +-e,
                  e^2 = the mean over rows of what the bits not read would save
    second look   of the share `neurons` with the largest: `more` bits of a weight more, columns by the same ranking
    down          b bits of a weight, columns as `grinqh` ranks them

So bits follow rows and columns at once. This project's own. The bits of a second look lie apart in both directions: no
layout of memory lets a kernel read them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.counts import in_lines
from dart_eval.pruning.method import option
from dart_eval.pruning.methods.columns import Grinqh, Nested

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.method import Hook
    from dart_eval.pruning.session import Session

Act = Callable[[Tensor], Tensor]


class GradedBoth(Grinqh):
    """More bits of the columns with larger inputs, and of the neurons that these leave most uncertain."""

    name = "graded-both"
    summary = "reads more bits of the columns with larger inputs, and of the neurons that these leave most uncertain"
    paper = ""
    recorded: ClassVar = {"allocation": "uniform", "entries": "both"}
    granularity = "bits of input channels and neurons"
    entries_neurons: float = option(0.25, "share of the neurons of which a token reads more bits", above=0, most=0.9)
    entries_more: float = option(2.0, "bits of a weight that a second look reads, on average", above=0, most=8)
    entries_known: float = option(
        0.2, "weight of the first look's h^2 beside its uncertainty, in the choice of neurons", least=0, most=1
    )

    @property
    def fewest(self) -> float:
        bits = self.levels.bits
        return bits[0] + self.entries_neurons * min(self.entries_more, bits[-1] - bits[0])

    def first_look(self, room: float) -> float:
        few, most = self.entries_neurons, self.levels.bits[-1]
        return max(room - few * self.entries_more, (room - few * most) / (1 - few))  # a second look ends at all bits

    def hooks(self, session: Session) -> list[Hook]:
        if not self.matrices:  # sparsity 0
            return []
        self._first: dict[Nested, tuple[Tensor, Tensor, Tensor]] = {}  # x, product and levels of the first look
        self._twice = {m for f in session.ffns for p in f.projections if p is not f.down for m in self.matrices[p]}
        return [(f.into, "register_forward_pre_hook", self._refine(session, f)) for f in session.ffns]

    def product(self, session: Session, matrix: Nested, x: Tensor) -> Tensor:
        level = matrix.choose(x)
        product = matrix.product(x, level)
        if matrix in self._twice:
            self._first[matrix] = x, product, level
        self.count_bits(session, matrix.rows * matrix.row_bits(level))
        return product.to(x.dtype)

    def _refine(self, session: Session, ffn: FFN) -> Callable[..., tuple[Tensor, ...] | None]:
        """Return the hook that replaces the h of neurons with a second look, before it enters what follows."""
        matrices = [m for p in ffn.projections if p is not ffn.down for m in self.matrices[p]]

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            first, self._first = self._first, {}
            if session.phase != "decode" or not first:  # a forward may have ended between gate and down
                return None
            looks = [first[m] for m in matrices]  # a model may call up before gate
            x = looks[0][0]
            errors = [self.unread(x, m, level) for m, (_, _, level) in zip(matrices, looks, strict=True)]
            chosen = self.least_known([product for _, product, _ in looks], errors, ffn.act, ffn.lift)
            products = []
            for matrix, (_, _, level) in zip(matrices, looks, strict=True):
                further = self.second_look(x, matrix)
                products.append(matrix.product(x, further).to(x.dtype))
                more = matrix.row_bits(further) - matrix.row_bits(level)
                self.count_bits(session, more * int(self.entries_neurons * ffn.size + 1e-9))
            a = ffn.act(products[0])
            again = a if len(products) == 1 else a * ffn.lifted(products[1])
            return (torch.where(chosen, again, args[0].view(again.shape)).view(args[0].shape), *args[1:])

        return hook

    def second_look(self, x: Tensor, matrix: Nested) -> Tensor:
        """Return [..., n] long, the level of each column of the neurons of the second look, after both. x: [..., n]."""
        most = int(matrix.limit + self.entries_more * matrix.width + 1e-9)
        return self.levels.choose(x, matrix.gains, min(most, self.levels.bits[-1] * matrix.width))

    def unread(self, x: Tensor, matrix: Nested, level: Tensor) -> Tensor:
        """Return [..., 1] fp32, the error of a product with a row after a look: the root of its mean square over rows.

        The square is sum_i x_i^2 (E(b_i) - E(all bits)) / rows, E on its convex hull (`Levels.gains`).

        Args:
            x: [..., n], the inputs. level: [..., n], of the columns.
        """
        saved = matrix.gains.to(x.device) * torch.tensor(self.levels.bits, device=x.device).diff()
        left = torch.cat([saved.flip(0).cumsum(0).flip(0), saved.new_zeros(1)])  # by levels
        return (x.float().square() * left[level]).sum(-1, keepdim=True).div(matrix.rows).sqrt()

    def least_known(self, products: Sequence[Tensor], errors: Sequence[Tensor], act: Act, lift: Act | None) -> Tensor:
        """Return [..., F] bool, the neurons of the second look.

        Args:
            products: of gate and up, or of a plain FFN's up, by the first look: [..., F] fp32 each.
            errors: of these, [..., 1] each.
            act: the activation. lift: applied to up x before its product with the gate, or None.
        """
        h = act(products[0])
        if len(products) > 1:
            h = h * (products[1] if lift is None else lift(products[1]))
        known = (1 - self.entries_known) * h.square()
        open_ = (expected_square(act, products, errors, lift) - known).clamp(min=0)
        return top_k_mask(open_, torch.tensor(int(self.entries_neurons * open_.shape[-1] + 1e-9)))

    def lines(self, matrix: Nested, x: Tensor, level: Tensor) -> float:
        """A second look fetches its columns for all rows, as a line has bits of many; or its rows whole, of a copy."""
        first = super().lines(matrix, x, level)
        if matrix not in self._twice:
            return first
        rows = int(self.entries_neurons * matrix.rows + 1e-9) * in_lines(self.levels.bits[-1] * matrix.width)
        return min(super().lines(matrix, x, self.second_look(x, matrix)), first + rows)

    def step_flops(self, shape: ModelShape) -> float:
        inputs, neurons = shape.width * (shape.ffn_matrices - 1), sum(shape.ffn_sizes)
        again = 2 * self.entries_neurons * neurons * inputs  # products of the second look, whose columns are known
        return super().step_flops(shape) + again + 3 * shape.layers * inputs + 14 * neurons

    def why_no_kernel(self, ffns: Sequence[FFN]) -> str | None:
        return f"{self.name} has no kernel"


def expected_square(act: Act, seen: Sequence[Tensor], errors: Sequence[Tensor], lift: Act | None = None) -> Tensor:
    """Return the expected square of h, if each product is off by its error, up or down: [..., F] fp32.

    Args:
        act: the activation.
        seen: gate x and up x, or a plain FFN's up x, as a first look has them; [..., F] fp32 each.
        errors: of these, of any shape that spreads to theirs.
        lift: applied to up x before the product with the gate, or None.
    """

    def mean(function: Act, x: Tensor, error: Tensor) -> Tensor:
        return (function(x + error).square() + function(x - error).square()) / 2

    expected = mean(act, seen[0], errors[0])
    if len(seen) == 1:
        return expected
    return expected * (seen[1].square() + errors[1].square() if lift is None else mean(lift, seen[1], errors[1]))
