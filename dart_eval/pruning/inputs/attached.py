"""Parts of the slot `entries` at work on a model: they leave out inputs or bits, not neurons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import plain_matrix, weight_matrix
from dart_eval.layers.quantised import bias_of
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.calibration.inputs import Quantile
from dart_eval.pruning.inputs.columns import GradedColumns
from dart_eval.pruning.inputs.entries import Entries, Inputs, Share
from dart_eval.pruning.inputs.graded import GradedInputs
from dart_eval.pruning.inputs.rounded import RoundedEntries
from dart_eval.pruning.masks.counts import keep_counts
from dart_eval.util.bits import Stored
from dart_eval.weights.rounding import as_held, parameter_of, served_bits, stored_inputs, stored_of


def counts(ffns: Sequence[FFN], densities: Sequence[float], sparsity: float) -> list[tuple[int, int]]:
    """Return per layer the number of inputs read: of x, and of h."""
    of_x = keep_counts(densities, [f.width for f in ffns], sparsity)
    return [*zip(of_x, keep_counts(densities, [f.size for f in ffns], sparsity), strict=True)]


def share_read(part: Entries, ffns: Sequence[FFN], densities: Sequence[float], sparsity: float) -> float:
    """Return the share of the FFN weight bytes that a token reads, on average. densities: see `attach`."""
    read = everything = 0.0
    for ffn, wanted, (of_x, of_h) in zip(ffns, densities, counts(ffns, densities, sparsity), strict=True):
        sides = [(of_x, ffn.size, ffn.width)] * (ffn.matrices - 1) + [(of_h, ffn.width, ffn.size)]
        for bits, (count, rows, width) in zip(_bits(ffn), sides, strict=True):
            density = wanted if part.in_bits else count / width
            read += ffn.size * bits.total * part.bytes_read(density, bits, rows, width)
            everything += ffn.size * bits.total
    return read / everything


def scales_read(ffns: Sequence[FFN]) -> float:
    """Return the share of the FFN weight bytes that scales take; every token reads them (`Entries.share`)."""
    bits = [(ffn.size, one) for ffn in ffns for one in _bits(ffn)]
    return sum(size * one.scale for size, one in bits) / sum(size * one.total for size, one in bits)


def _bits(ffn: FFN) -> list[Stored]:
    """Return the bits of a served weight of each matrix, down last."""
    return [*stored_inputs(ffn), stored_of(ffn.down)]


def attach(
    part: Entries, ffns: Sequence[FFN], densities: Sequence[float], sparsity: float, calibration: Calibration | None
) -> AttachedInputs | GradedInputs | SwappedWeights:
    """Return a part attached to a model. densities: per layer, the share of its bytes that a token reads."""
    if isinstance(part, GradedColumns):
        return GradedInputs(part, ffns, densities)
    if isinstance(part, RoundedEntries):
        return SwappedWeights(part, ffns)
    return AttachedInputs(part, ffns, counts(ffns, densities, sparsity), calibration)


class AttachedInputs:
    """A part attached to a model, before any prompt.

    Args:
        input_counts: see `counts`.

    Attributes:
        inputs: per layer and matrix, down last.
        bits: bits of a served weight, likewise.
        mean: mean bits of a weight over all matrices.
        swapped: None, as no weights change.
    """

    replaces = False  # see `GradedInputs`
    swapped = None

    @torch.no_grad()
    def __init__(
        self, part: Entries, ffns: Sequence[FFN], input_counts: Sequence[tuple[int, int]],
        calibration: Calibration | None,
    ) -> None:  # fmt: skip
        self.part, self.ffns = part, ffns
        thresholds = _thresholds(part, input_counts, calibration)
        self.inputs: list[list[Inputs]] = []
        self.mean = served_bits(ffns)
        self.bits = [_bits(f) for f in ffns]
        for ffn, least, (of_x, of_h) in zip(ffns, thresholds, input_counts, strict=True):
            last, norms = ffn.matrices - 1, [None] * ffn.matrices
            if any(map(part.weighs, range(ffn.matrices))):
                weights = [*ffn.input_weights(), ffn.output_weight()]
                norms = [w.float().norm(dim=0) if part.weighs(i) else None for i, w in enumerate(weights)]
            sides = [(of_x, least[0])] * last + [(of_h, least[1])]
            self.inputs.append([Inputs(*side, norm) for side, norm in zip(sides, norms, strict=True)])

    def nbytes(self) -> int:
        """Return the bytes beside the model: norms and thresholds."""
        norms = sum(one.norms.nbytes for layer in self.inputs for one in layer if one.norms is not None)
        return norms + 8 * len(self.inputs) * self.part.calibrates

    def watch(self, add: Callable[[RemovableHandle], None], forward: object) -> None:
        """Install the hooks that thin the inputs of every matrix while tokens are decoded.

        Args:
            add: called with the handle of each hook.
            forward: the current forward (`hooks.Forward`).
        """
        for ffn in self.ffns:
            last = ffn.matrices - 1
            add(ffn.down.register_forward_pre_hook(self._thin(ffn, last, forward)))
            if ffn.fused:
                add(ffn.up.register_forward_hook(self._both(ffn, forward)))
                continue
            for i, module in enumerate(m for m in (ffn.gate, ffn.up) if m is not None):
                add(module.register_forward_pre_hook(self._thin(ffn, i, forward)))

    def _read_columns(self, ffn: FFN, matrix: int, x: Tensor, state: Any) -> Tensor:
        """Zero the inputs that tokens skip, and count the rest."""
        columns = self.part.columns_read(x, self.inputs[ffn.layer][matrix])
        share = columns.sum(-1, dtype=torch.float64).cpu() / x.shape[-1]
        bits = self.bits[ffn.layer][matrix]
        state.layers[ffn.layer].add_read(self._cost(ffn, bits, share))
        return x * columns

    def _cost(self, ffn: FFN, bits: Stored, share: Share) -> Share:
        """Return the bytes of a share of a matrix's columns, counted in neurons. bits: of a served weight."""
        return self.part.share(share, bits) * bits.total / self.mean * ffn.size / ffn.matrices

    def _thin(self, ffn: FFN, matrix: int, forward: Any) -> Callable[..., object]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if forward.phase != "decode" or forward.state is None:
                return None
            x = self._read_columns(ffn, matrix, forward.in_batch(args[0]), forward.state)
            return (x.view(args[0].shape), *args[1:])

        return torch.compiler.disable(hook)

    def _both(self, ffn: FFN, forward: Any) -> Callable[..., object]:
        """Return the hook of gate and up in one projection: each reads inputs of its own."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if forward.phase != "decode" or forward.state is None:
                return None
            x = forward.in_batch(args[0])
            halves = weight_matrix(module).chunk(2)
            biases = [None, None] if (both := bias_of(module)) is None else both.chunk(2)
            outputs = [
                nn.functional.linear(self._read_columns(ffn, i, x, forward.state), half, bias)
                for i, (half, bias) in enumerate(zip(halves, biases, strict=True))
            ]
            return torch.cat(outputs, dim=-1).view(output.shape)

        return torch.compiler.disable(hook)


class SwappedWeights:
    """FFN weights that decoding forwards read rounded; prompts read them as they are.

    Attributes:
        held: each projection's parameter, its own weights, and the weights that decoding forwards read.
    """

    replaces = False

    @torch.no_grad()
    def __init__(self, part: RoundedEntries, ffns: Sequence[FFN]) -> None:
        self.held = [
            (parameter_of(m), parameter_of(m).data, as_held(m, part.as_read(plain_matrix(m))))
            for f in ffns
            for m in f.projections
        ]
        self.in_place = False

    @property
    def swapped(self) -> SwappedWeights:
        """Itself."""
        return self

    def nbytes(self) -> int:
        """Return the bytes beside the model: none, as serving would need the rounded weights alone."""
        return 0

    def watch(self, add: Callable[[RemovableHandle], None], forward: object) -> None:
        """Install no hooks."""

    def begin(self) -> None:
        """Swap in the weights of decoding forwards."""
        self.in_place = True
        for parameter, _, read in self.held:
            parameter.data = read

    def end(self) -> None:
        """Restore the weights, to the bit."""
        for parameter, own, _ in self.held:
            parameter.data = own
        self.in_place = False


def _thresholds(
    part: Entries, input_counts: Sequence[tuple[int, int]], calibration: Calibration | None
) -> list[list[Any]]:
    """Return per layer, for x and h, the threshold on the text; None without one."""
    if not part.calibrates or calibration is None:
        return [[None, None] for _ in input_counts]
    name = f"quantiles of inputs, {[*input_counts]} read"
    return calibration.once(name, lambda: [_quantiles(input_counts, calibration)])[0].tolist()


def _quantiles(input_counts: Sequence[tuple[int, int]], calibration: Calibration) -> Tensor:
    """Return [L, 2] fp64 thresholds for x and h that leave these numbers of inputs on the text."""
    quantiles = [[Quantile(), Quantile()] for _ in input_counts]

    def see(layer: int, *sides: Tensor) -> None:
        for quantile, values, count in zip(quantiles[layer], sides, input_counts[layer], strict=True):
            quantile.add(values, count)

    calibration.visit(see)
    return torch.tensor([[one.threshold for one in both] for both in quantiles], dtype=torch.float64)
