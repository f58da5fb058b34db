"""Choices by a preview: what a token reads of all gate and up weights, coarser and cheaper, before it chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dart_eval.pruning.choices.choice import Choice, ChoiceLayer, Inside, Token
from dart_eval.pruning.choices.images import Columns, FirstBits, Image, level_of
from dart_eval.pruning.masks.counts import ReadCost
from dart_eval.pruning.part import option
from dart_eval.util.bits import OWN_BITS, SCALE_BITS
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.calibration.calibration import Calibration
    from dart_eval.pruning.choices.serving import Serving
    from dart_eval.util.bits import Stored
    from dart_eval.weights.rounding import Served


@dataclass(frozen=True, kw_only=True)
class Previewing(Choice):
    """Base of choices by a preview, whose bits the image decides (`images`).

    Attributes:
        image: the image of gate and up that every token reads for the whole mask.
        uses_row_errors: whether the error of each image row counts, too.
        fewer: bits that a second, rougher image of gate and up lacks; 0: there is none.
    """

    previews = True
    image: ClassVar[Image]
    uses_row_errors: ClassVar[bool] = True
    fewer: ClassVar[int] = 0

    def at(self, read: float) -> Previewing:
        image = self.image
        return dataclasses.replace(self, image=image.at(level_of(read))) if isinstance(image, FirstBits) else self  # type: ignore[call-arg]

    def serving(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> Serving | None:
        from dart_eval.pruning.calibration.inputs import all_squares
        from dart_eval.pruning.choices.serving import Serving

        if not sparsity or self.image.served is None:
            return None
        orders: list[Tensor | None] = [None] * len(ffns)
        if self.calibrates and calibration is not None:  # columns by their mean x^2 on the calibration text
            orders = [s.argsort(descending=True, stable=True) for s in all_squares(ffns, calibration)[::2]]
        return Serving(ffns, self.image.served, orders)

    def attach(
        self, ffns: Sequence[FFN], orders: Sequence[Tensor | None], taken: Sequence[int],
        calibration: Calibration | None,
    ) -> list[ChoiceLayer]:  # fmt: skip
        from dart_eval.pruning.choices.previews import PreviewLayer

        return [PreviewLayer(self, f, self.image, order, self.fewer) for f, order in zip(ffns, orders, strict=True)]

    def check_weights(self, ffns: Sequence[FFN], sparsity: float) -> None:
        from dart_eval.weights.rounding import on_grid, parameter_of, served_bits, stored_of

        if not isinstance(self.image, FirstBits):
            return
        modules = [m for f in ffns for m in f.projections if m is not f.down or self.adds]
        mixed = served_bits(ffns) != OWN_BITS  # then the read sets no codes (`Pruner.at`)
        for module in (m for m in modules if not on_grid(m)):
            if (bits := stored_of(module).total) != OWN_BITS:
                raise UserError(
                    f"choice={self.name} needs FFN weights of 16 bits, or codes on an even grid: those of this model "
                    f"have {bits:.3g} bits, and no such codes were found",
                    "use a method that chooses in another way, give image=copy, or load the model unquantised",
                )
            if sparsity and mixed and self.image.served is None:
                raise UserError(
                    f"choice={self.name} needs codes, and only some FFN weights of this model have fewer than 16 bits",
                    "give image.code=8",
                )
            if sparsity:
                parameter_of(module)

    def lacking(self, ffn: FFN) -> str | None:
        return f"{self.title} with {self.image.title} has no kernel"

    def columns(self, width: int) -> Columns:
        """Return the shares of the columns of gate and up that a preview reads. width: D."""
        return Columns()

    # -- what it reads ---------------------------------------------------------------------------------------

    def _row_error_bits(self, width: int) -> float:
        """Return the bits of a neuron's row errors per weight of its row; 0 if the image is exact."""
        return 0.0 if self.image.exact or not self.uses_row_errors else SCALE_BITS * (1 + self.fewer) / width

    def _norm_bits(self, width: int) -> float:
        """Return the bits of the norm of a neuron's column of down, per weight; 0 if the choice does not use it."""
        return SCALE_BITS / width if self.adds else 0.0

    def read_costs(self, ffns: Sequence[FFN], everything: bool, unit: float) -> list[ReadCost]:
        return [self._price(ffn, everything, unit) for ffn in ffns]

    def _price(self, ffn: FFN, everything: bool, unit: float) -> ReadCost:
        from dart_eval.weights.rounding import served_inputs, served_output

        image, columns = self.image, self.columns(ffn.width)
        in_mask = taken = 0.0
        for matrix in served_inputs(ffn):
            bits, (rows, width) = self._stored(matrix), matrix.weight.shape
            in_mask += image.bits_read(bits, rows, width, columns) + self._row_error_bits(ffn.width)
            taken += image.remaining_bits(bits, rows, width, columns)
        down = served_output(ffn)
        bits, (rows, width) = self._stored(down), down.weight.shape
        shared = image.shared_bits(bits, rows, width, self.adds) / unit
        in_mask = (in_mask + self._norm_bits(ffn.width)) / unit + shared * everything
        approximated = image.down_bits(bits, rows, width) / unit
        return ReadCost(in_mask, taken / unit, bits.code / unit, approximated, shared * (not everything))

    def _stored(self, matrix: Served) -> Stored:
        """Return the bits of a weight as a session serves it: 16-bit weights as the image's codes."""
        wanted = self.image.served
        plain = matrix.packed is None and matrix.stored.total == OWN_BITS
        return wanted.stored(matrix.weight.shape[1]) if wanted is not None and plain else matrix.stored

    def worst_read_cost(self, sizes: Sequence[int], width: int, matrices: int, bits: Stored) -> ReadCost:
        image, unit, columns = self.image, bits.total, self.columns(width)
        if image.served is not None and bits.code == OWN_BITS:
            bits = image.served.stored(width)
        bits_read = sum(
            size * (image.bits_read(bits, size, width, columns) + self._row_error_bits(width)) for size in sizes
        )
        shared = max(image.shared_bits(bits, width, size, self.adds) for size in sizes)
        in_mask = ((matrices - 1) * bits_read / sum(sizes) + self._norm_bits(width) + shared) / unit
        rest = (matrices - 1) * image.remaining_bits(bits, sizes[0], width, columns) / unit
        return ReadCost(in_mask, rest, bits.code / unit, image.down_bits(bits, width, sizes[0]) / unit)

    def stored(self, ffns: Sequence[FFN]) -> int:
        from dart_eval.weights.rounding import served_inputs, served_output

        inputs = [(f, m) for f in ffns for m in served_inputs(f)]
        bits = sum(m.weight.numel() * self._row_error_bits(f.width) for f, m in inputs)
        bits += sum(f.pool * f.width * self._norm_bits(f.width) for f in ffns)
        if self.image.stored:
            matrices = [m for _, m in inputs] + ([served_output(f) for f in ffns] if self.adds else [])
            bits += sum(m.weight.numel() * self.image.bits_of(m.stored, *m.weight.shape) for m in matrices)
        return round(bits / 8)


@dataclass(frozen=True, kw_only=True)
class ByPreview(Inside, Previewing):
    """A token takes the k neurons with the largest expected h^2, given an image of gate and up (`Preview.look`).

    Their rows are read exactly; then the largest |h| write.

    Prox (arXiv 2607.27591, `Prox`) previews by a copy of 4 bits; first bits of the served weights, exact
    counts and the expectation are ours.
    """

    name = "preview"
    summary = "chooses the largest |h| by a preview of gate and up, then writes the largest exact |h|"
    image: Image = option(FirstBits(), "what every token reads of gate and up before it chooses")  # type: ignore[misc]
    write_share: float = option(0.7, "share of the chosen neurons whose columns of down are read", above=0, most=1)  # type: ignore[misc]
    gathers = True

    def importance(self, token: Token) -> Tensor:
        assert token.expected is not None
        return token.expected

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return 2 * mask * shape.width * (shape.ffn_matrices - 1) + 14 * mask  # the preview, and the choice
