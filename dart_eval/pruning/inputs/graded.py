"""Columns in graded bits at work on a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dart_eval.kernels.cpu import blocks, columns
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import plain_matrix
from dart_eval.layers.quantised import bias_of
from dart_eval.pruning.calibration.weight_cache import WeightCache
from dart_eval.pruning.inputs.both import GradedBoth
from dart_eval.pruning.inputs.columns import GradedColumns
from dart_eval.pruning.inputs.matrix import GradedMatrix
from dart_eval.util.bits import OWN_BITS
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import parameter_of

_CACHE: WeightCache[list[GradedMatrix]] = WeightCache()
_KERNELS: WeightCache[columns.ColumnsFFN] = WeightCache()


class GradedInputs:
    """The part attached to a model, before any prompt.

    Args:
        densities: per layer, the share of its bytes that a token reads.

    Attributes:
        replaces: whether codes replace the weights, so that prompts run on them, too.
        swapped: None, as no weights change (see `attached.AttachedInputs`).
        layers: per FFN, the matrices of each projection.
    """

    replaces = True
    swapped = None

    @torch.no_grad()
    def __init__(self, part: GradedColumns, ffns: Sequence[FFN], densities: Sequence[float]) -> None:
        self.part, self.ffns = part, ffns
        try:
            self.layers = [
                [(m, _matrices(part, f, m, d)) for m in f.projections] for f, d in zip(ffns, densities, strict=True)
            ]
        except UserError as error:
            if max(densities) - min(densities) < 1e-9:
                raise
            raise UserError(f"in one of the layers {error.problem}", "use allocation=uniform") from None

    def nbytes(self) -> int:
        """Return the bytes beside the model: gains. Serving would need codes alone."""
        return sum(one.gains.nbytes for layer in self.layers for _, matrices in layer for one in matrices)

    def rows_of(self, ffn: FFN) -> blocks.BlockRows:
        """Return an FFN of whose columns a single token reads the chosen bits alone; cached for the next session."""
        held = {id(module): matrices[0] for module, matrices in self.layers[ffn.layer]}
        gate, up, down = (held[id(m)] for m in (ffn.gate, ffn.up, ffn.down))

        def make() -> columns.ColumnsFFN:
            made = [columns.ColumnsMatrix(m.packed, m.gains.tolist(), m.limit) for m in (gate, up, down)]
            return columns.ColumnsFFN(made, blocks.act_of(ffn) or "")

        own = [parameter_of(m) for m in ffn.projections]
        return blocks.BlockRows(ffn, _KERNELS.get(ffn.up, own, (self.part, gate.limit, down.limit), make))

    def watch(self, add: Callable[[RemovableHandle], None], forward: object) -> None:
        """Install the hooks that replace the products of decoded tokens.

        Args:
            add: called with the handle of each hook.
            forward: the current forward (`hooks.Forward`).
        """
        for ffn, layer in zip(self.ffns, self.layers, strict=True):
            look = None
            if isinstance(self.part, GradedBoth):
                inputs = [one for module, matrices in layer if module is not ffn.down for one in matrices]
                look = SecondLook(ffn, self.part, forward, inputs)
            for module, matrices in layer:
                of_inputs = look if module is not ffn.down else None
                add(module.register_forward_hook(_graded(ffn, matrices, forward, of_inputs)))
            if look is not None:
                add(ffn.into.register_forward_pre_hook(torch.compiler.disable(look.refine)))


class SecondLook:
    """The second look of decoded tokens at gate and up of one FFN, before their h enters what follows."""

    def __init__(self, ffn: FFN, part: GradedBoth, forward: Any, matrices: Sequence[GradedMatrix]) -> None:
        self.ffn, self.part, self.forward, self.matrices = ffn, part, forward, matrices
        self.first: dict[GradedMatrix, tuple[Tensor, Tensor]] = {}  # product, levels
        self.x: Tensor | None = None

    def see(self, x: Tensor, made: Sequence[tuple[GradedMatrix, Tensor, Tensor]]) -> None:
        """Take the first look's products. x: [B, T, D]."""
        self.x = x
        self.first |= {matrix: (product, levels) for matrix, product, levels in made}

    def refine(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Replace the h of neurons that have a second look: a hook."""
        first, x, self.first, self.x = self.first, self.x, {}, None
        if x is None or self.forward.phase != "decode":  # a forward may have ended between gate and down
            return None
        part, ffn = self.part, self.ffn
        looks = [(matrix, *first[matrix]) for matrix in self.matrices]  # a model may call up before gate
        errors = [part.unread(x, matrix, levels) for matrix, _, levels in looks]
        chosen = part.least_known([product for _, product, _ in looks], errors, ffn.act, ffn.lift)
        products, more, layer = [], [], self.forward.state.layers[ffn.layer]
        for matrix, _, levels in looks:
            further = part.second_look(x, matrix)
            products.append(matrix.product(x, further).to(x.dtype))
            more.append((matrix.row_bits(further) - matrix.row_bits(levels)).cpu())
        layer.add_read(sum(more) * part.count(ffn.size) / (OWN_BITS * ffn.matrices * ffn.width))
        a = ffn.act(products[0])
        again = a if len(products) == 1 else a * ffn.lifted(products[1])
        h = torch.where(chosen, again, self.forward.in_batch(args[0]))
        return (h.view(args[0].shape), *args[1:])


def _matrices(part: GradedColumns, ffn: FFN, module: nn.Module, share: float) -> list[GradedMatrix]:
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


def _graded(ffn: FFN, matrices: Sequence[GradedMatrix], forward: Any, look: SecondLook | None) -> Callable[..., object]:
    """Return the hook of a projection. look: receives its products, or None."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if forward.phase != "decode":
            return torch.cat([matrix.whole(args[0]) for matrix in matrices], -1)
        x = forward.in_batch(args[0])
        made = [(matrix, *matrix(x)) for matrix in matrices]
        if look is not None:
            look.see(x, made)
        layer, neuron = forward.state.layers[ffn.layer], OWN_BITS * ffn.matrices * ffn.width
        layer.add_read(sum(matrix.rows * matrix.row_bits(chosen).cpu() for matrix, _, chosen in made) / neuron)
        return torch.cat([product for _, product, _ in made], -1).to(output.dtype).view(output.shape)

    return torch.compiler.disable(hook)
