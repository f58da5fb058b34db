"""Parts that read first bits of codes at work on a model (`entries.Graded`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dart_eval.kernels.cpu import blocks, columns
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import plain_matrix
from dart_eval.layers.quantised import bias_of
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.calibration.weight_cache import WeightCache
from dart_eval.pruning.choices.serving import Decoded
from dart_eval.pruning.inputs.both import GradedBoth
from dart_eval.pruning.inputs.entries import Coded, Graded
from dart_eval.util.bits import OWN_BITS
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import parameter_of, rounded

_CACHE: WeightCache[list[GradedMatrix]] = WeightCache()
_KERNELS: WeightCache[columns.ColumnsFFN] = WeightCache()


class GradedInputs:
    """The part attached to a model, before any prompt.

    Args:
        densities: per layer, the share of its bytes that a token reads.

    Attributes:
        swapped: None, as no weights change (see `attached.AttachedInputs`).
    """

    swapped = None

    @torch.no_grad()
    def __init__(
        self, part: Graded, ffns: Sequence[FFN], densities: Sequence[float], calibration: Calibration | None
    ) -> None:
        self.part, self.ffns = part, ffns
        try:
            made = [
                [(m, _matrices(part, f, m, d)) for m in f.projections] for f, d in zip(ffns, densities, strict=True)
            ]
        except UserError as error:
            if max(densities) - min(densities) < 1e-9:
                raise
            raise UserError(f"in one of the layers {error.problem}", "use allocation=uniform") from None
        found: Any = itertools.repeat(None)
        if part.calibrates:
            assert calibration is not None
            name = f"sizes of inputs by {part!r}, {[*densities]} read"
            found = iter(calibration.once(name, lambda: _sizes(made, ffns, calibration)))
        self.layers = [
            [(m, [(one, one.part.limit(one, next(found))) for one in matrices]) for m, matrices in layer]
            for layer in made
        ]

    @property
    def replaces(self) -> bool:
        """Whether codes replace the weights, so that prompts run on them, too."""
        return self.part.replaces

    def nbytes(self) -> int:
        """Return the bytes beside the model: limits, gains, copies. Serving would need codes alone."""
        return sum(one.nbytes for layer in self.layers for _, matrices in layer for one, _ in matrices)

    def rows_of(self, ffn: FFN) -> blocks.BlockRows:
        """Return an FFN of whose columns a single token reads the chosen bits alone; cached for the next session."""
        held = {id(module): matrices[0] for module, matrices in self.layers[ffn.layer]}
        gate, up, down = (held[id(m)] for m in (ffn.gate, ffn.up, ffn.down))

        def make() -> columns.ColumnsFFN:
            made = [columns.ColumnsMatrix(m.packed, m.gains.tolist(), int(bits)) for m, bits in (gate, up, down)]
            return columns.ColumnsFFN(made, blocks.act_of(ffn) or "")

        own = [parameter_of(m) for m in ffn.projections]
        return blocks.BlockRows(ffn, _KERNELS.get(ffn.up, own, (self.part, gate[1], down[1]), make))

    def watch(self, add: Callable[[RemovableHandle], None], forward: object) -> None:
        """Install the hooks that replace the products of decoded tokens.

        Args:
            add: called with the handle of each hook.
            forward: the current forward (`hooks.Forward`).
        """
        for ffn, layer in zip(self.ffns, self.layers, strict=True):
            look = SecondLook(ffn, self.part, forward, layer) if isinstance(self.part, GradedBoth) else None
            for module, matrices in layer:
                of_inputs = look if module is not ffn.down else None
                add(module.register_forward_hook(_graded(ffn, matrices, forward, of_inputs)))
            if look is not None:
                add(ffn.into.register_forward_pre_hook(torch.compiler.disable(look.refine)))


class GradedMatrix(Coded):
    """A matrix of which tokens read first bits.

    Args:
        part: the rule. weight: [out, n]. bias: [out]; None. share: of the bytes of 16-bit weights, which a token reads.
        down: whether its inputs are neurons.
    """

    def __init__(self, part: Graded, weight: Tensor, bias: Tensor | None, share: float, down: bool) -> None:
        self.bias, (self.rows, self.width) = bias, weight.shape
        part.check_read(share, self.rows, self.width)
        self.scale = part.scale(self.width)
        room, copied = OWN_BITS * share - self.scale, 0 if down else part.copied
        self.room = room if down else part.first_look(room)
        self.part = part.at(self.room)
        self.packed = rounded(weight, self.part.rounding)
        self.values = [
            Decoded(self.packed, weight.dtype, bits, whole=part.replaces) if bits else None for bits in self.part.bits
        ]
        self.gains = self.part.fit(weight, self.packed)
        self.nbytes = 4 * part.calibrates + self.gains.nbytes + int(weight.numel() * copied / 8)  # beside its codes

    def whole(self, x: Tensor) -> Tensor:
        """Return the product with all bits of the codes, [..., out]. x: [..., n]."""
        values = self.values[-1]
        assert values is not None
        return nn.functional.linear(x, values(), self.bias)

    def __call__(self, x: Tensor, limit: float, position: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the product, [..., out], and the level of each column, [..., n] long. For the rest: `Graded.level`."""
        chosen = self.part.level(x, self, limit, position)
        return self.product(x, chosen), chosen

    def product(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the product, [..., out]. chosen: [..., n], the level of each column."""
        out: Any = 0.0
        for level, values in enumerate(self.values):
            if values is not None:
                product = nn.functional.linear(x * (chosen == level), values())
                out = out + product.to(torch.promote_types(product.dtype, torch.float32))
        made: Tensor = out if self.bias is None else out + self.bias
        return made

    def row_bits(self, chosen: Tensor) -> Tensor:
        """Return the bits that a row takes, [...] fp64. chosen: [..., n], the level of each column."""
        bits = torch.tensor(self.part.bits, device=chosen.device)[chosen].sum(-1, dtype=torch.float64)
        return bits + self.width * self.scale


Limited = Sequence[tuple[GradedMatrix, float]]  # matrices of a projection, and what each may read (`Graded.limit`)


class SecondLook:
    """The second look of decoded tokens at gate and up of one FFN, before their h enters what follows."""

    def __init__(self, ffn: FFN, part: GradedBoth, forward: Any, layer: Sequence[tuple[nn.Module, Limited]]) -> None:
        self.ffn, self.part, self.forward = ffn, part, forward
        self.matrices = [one for module, matrices in layer if module is not ffn.down for one, _ in matrices]
        self.first: dict[GradedMatrix, tuple[float, Tensor, Tensor]] = {}  # limit, product, levels
        self.x: Tensor | None = None

    def see(self, x: Tensor, made: Sequence[tuple[GradedMatrix, float, Tensor, Tensor]]) -> None:
        """Take the first look's products. x: [B, T, D]."""
        self.x = x
        self.first |= {matrix: (limit, product, levels) for matrix, limit, product, levels in made}

    def refine(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Replace the h of neurons that have a second look: a hook."""
        first, x, self.first, self.x = self.first, self.x, {}, None
        if x is None or self.forward.phase != "decode":  # a forward may have ended between gate and down
            return None
        part, ffn = self.part, self.ffn
        looks = [(matrix, *first[matrix]) for matrix in self.matrices]  # a model may call up before gate
        errors = [part.unread(x, matrix, levels) for matrix, _, _, levels in looks]
        chosen = part.least_known([product for _, _, product, _ in looks], errors, ffn.act, ffn.lift)
        products, more, layer = [], [], self.forward.state.layers[ffn.layer]
        for matrix, limit, _, levels in looks:
            further = part.second_look(x, matrix, limit, levels)
            products.append(matrix.product(x, further).to(x.dtype))
            more.append(part.read_again(matrix.row_bits(levels), matrix.row_bits(further), matrix.width).cpu())
        layer.add_read(sum(more) * part.count(ffn.size) / (OWN_BITS * ffn.matrices * ffn.width))
        a = ffn.act(products[0])
        again = a if len(products) == 1 else a * ffn.lifted(products[1])
        h = torch.where(chosen, again, self.forward.in_batch(args[0]))
        return (h.view(args[0].shape), *args[1:])


def _matrices(part: Graded, ffn: FFN, module: nn.Module, share: float) -> list[GradedMatrix]:
    """Return the matrices of a projection, cached for the next session."""
    down = module is ffn.down
    parts = 2 if ffn.fused and not down else 1

    def make() -> list[GradedMatrix]:
        bias = bias_of(module)
        biases = [None] * parts if bias is None else bias.chunk(parts)
        weights = plain_matrix(module).chunk(parts)
        return [GradedMatrix(part, w, b, share, down) for w, b in zip(weights, biases, strict=True)]

    held = [parameter_of(module), *([] if (bias := bias_of(module)) is None else [bias])]
    return _CACHE.get(module, held, (part, share), make)


def _sizes(
    layers: Sequence[Sequence[tuple[nn.Module, Sequence[GradedMatrix]]]], ffns: Sequence[FFN], calibration: Calibration
) -> list[Tensor]:
    """Return for each matrix the sizes of the text's tokens, [T], in the order of `layers`."""
    found: dict[GradedMatrix, list[Tensor]] = {one: [] for layer in layers for _, ms in layer for one in ms}

    def see(layer: int, x: Tensor, h: Tensor) -> None:
        for module, matrices in layers[layer]:
            for one in matrices:
                found[one].append(one.part.size(h if module is ffns[layer].down else x, one).cpu())

    calibration.visit(see)
    return [torch.cat(sizes) if sizes else torch.zeros(1) for sizes in found.values()]  # a shape has no text


def _graded(ffn: FFN, matrices: Limited, forward: Any, look: SecondLook | None) -> Callable[..., object]:
    """Return the hook of a projection. look: receives its products, or None."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if forward.phase != "decode":
            replaced = matrices[0][0].part.replaces
            return torch.cat([matrix.whole(args[0]) for matrix, _ in matrices], -1) if replaced else None
        state = forward.state
        x, position = forward.in_batch(args[0]), state.positions(forward.valid)
        made = [(matrix, limit, *matrix(x, limit, position)) for matrix, limit in matrices]
        if look is not None:
            look.see(x, made)
        layer, neuron = state.layers[ffn.layer], OWN_BITS * ffn.matrices * ffn.width
        layer.add_read(sum(matrix.rows * matrix.row_bits(chosen).cpu() for matrix, _, _, chosen in made) / neuron)
        return torch.cat([product for _, _, product, _ in made], -1).to(output.dtype).view(output.shape)

    return torch.compiler.disable(hook)
