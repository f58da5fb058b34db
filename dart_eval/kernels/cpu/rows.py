"""One token times rows of bfloat16 on a CPU, at the speed of memory: torch's own product is slower."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import linear

from dart_eval.kernels.cpu import build
from dart_eval.kernels.cpu.library import Rows, functions


class RowsProduct:
    """x -> weight x + bias. Anything but one token goes to torch.

    Args:
        weight: [rows, width]. It is read where it lies, so that new values in it count.
        bias: [rows], or None.
        level: `avx2`, `avx512`, or None for the best that there is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, level: str | None = None) -> None:
        self.weight, self.bias = weight, bias
        pointers = weight.data_ptr(), bias.data_ptr() if bias is not None else None
        self._job = Rows(*pointers, None, None, *weight.shape)
        self._call, self._level = functions()[Rows.function], build.level(level)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., rows]."""
        rows, width = self.weight.shape
        is_token = x.numel() == width > 0 and x.dtype == torch.bfloat16 and not x.requires_grad
        if not is_token or torch.compiler.is_compiling():
            return linear(x, self.weight, self.bias)
        x, out = x.contiguous(), x.new_empty(*x.shape[:-1], rows)
        job = Rows.from_buffer_copy(self._job)  # of this call alone: others may run at the same time
        job.x, job.out = x.data_ptr(), out.data_ptr()
        self._call(ctypes.byref(job), self._level, torch.get_num_threads())
        return out


def why_no_kernel(weight: Tensor, bias: Tensor | None) -> str | None:
    """Return why a product is torch's own, or None."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return "the product is for rows of bfloat16 on a CPU"
    if bias is not None and (bias.dtype != torch.bfloat16 or not bias.is_contiguous()):
        return "the product is for a bias of bfloat16"
    return build.why_no_kernel()
