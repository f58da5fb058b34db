"""dart-plus at the speed of memory: a kernel reads first bits of all neurons, and the rest of those that are taken."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dart_eval.kernels import gather, graded_triton
from dart_eval.kernels.cpu import blocks, ffns, packing
from dart_eval.kernels.mask_rows import MaskRows
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning.calibration.weight_cache import WeightCache
from dart_eval.pruning.choices.dart_plus import DartPlus
from dart_eval.pruning.choices.images import Columns, FirstBits
from dart_eval.pruning.choices.previews import images_of
from dart_eval.pruning.choices.serving import move
from dart_eval.weights.rounding import coded, on_grid, parameter_of

Kernel = ffns.GradedFFN | graded_triton.GradedFFN
_CACHE: WeightCache[Kernel] = WeightCache()


def by_triton(ffn: FFN) -> bool:
    """Whether Triton's kernels run an FFN: on a GPU, or in Triton's interpreter."""
    device = device_of(ffn)
    return device.type == "cuda" or gather.missing(device) is None


def lacking(choice: DartPlus, ffn: FFN) -> str | None:
    """Return why no kernel here runs a choice on an FFN, or None."""
    image = choice.image
    if any(on_grid(m) for m in ffn.projections):
        return "the kernel takes weights of 16 bits, which it rounds itself"
    if not isinstance(image, FirstBits):
        return f"{choice.title} with {image.title} has no kernel"
    if image.served is None or image.first(image.code) != packing.FIRST:
        return f"the kernel previews by {packing.FIRST} first bits"
    if choice.columns(ffn.width) != Columns():
        return "the kernel previews by all columns"
    if image.code == packing.FIRST:
        return f"the kernel needs codes of more than {packing.FIRST} bits"
    reasons = [packing.lacking(image.served, width) for width in (ffn.width, ffn.size)]
    if triton := by_triton(ffn):
        reasons += [gather.missing(device_of(ffn)), graded_triton.lacking(image.code)]
    return next(filter(None, reasons), None) or blocks.lacking(ffn, triton)


@torch.no_grad()
def packed(choice: DartPlus, ffn: FFN) -> Kernel:
    """Return the kernel with the codes of an FFN, cached for the next session."""
    kind = graded_triton.GradedFFN if by_triton(ffn) else ffns.GradedFFN

    def make() -> Kernel:
        preview, act = images_of(choice.image, ffn, down=True), blocks.act_of(ffn)
        gate, up, down = (m for m in map(coded, ffn.projections) if m is not None)
        assert preview.columns is not None and act is not None
        return kind(gate, up, down, preview.row_errors, preview.columns, 0, 0, choice.known, act)

    own = [parameter_of(m) for m in ffn.projections]
    return _CACHE.get(ffn.up, own, (choice.image, choice.known, kind), make)


class GradedRows(blocks.BlockRows):
    """One FFN whose single token reads first bits of all neurons, and the rest of those that it takes."""

    def prepare(self, norm: Tensor, taken: int, written: int) -> None:
        self.kernel.grade(taken, written - taken)


def rows_of(ffn: FFN, choice: DartPlus) -> MaskRows:
    """Return what runs a choice on an FFN; at sparsity 0 no weights are served as codes, and all are multiplied."""
    return MaskRows(ffn) if any(coded(m) is None for m in ffn.projections) else GradedRows(ffn, packed(choice, ffn))


def hold_codes_alone(ffn: FFN, choice: DartPlus) -> None:
    """Free an FFN's codes but for those of its kernel. The model's own weights are not needed."""
    kernel = packed(choice, ffn)
    assert isinstance(kernel, ffns.GradedFFN)
    for which, module in enumerate(ffn.projections):
        held = coded(module)
        assert held is not None
        move(held, functools.partial(packing.unpacked, kernel.codes, which))
