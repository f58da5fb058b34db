"""The C library as Python calls it: what it is handed, field by field as in kernels.c."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_float, c_int, c_int32, c_uint8, c_void_p
from typing import Any

import torch
from torch import Tensor

from dart_eval.kernels.cpu import build

ACTS = ("silu", "gelu_tanh", "gelu", "relu")  # as `activate` counts them
MOST_THREADS = 64
COLUMNS, BLOCK = 128, 256  # columns of a chunk of coded weights; rows of a block of a matrix


class Rows(ctypes.Structure):
    """Rows of bfloat16, and the vector that they are multiplied with."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias", "x", "out")),
        *((name, c_int32) for name in ("rows", "width")),
    )
    function = "rows_product"


class Coded(ctypes.Structure):
    """Coded weights."""

    _fields_ = (
        *((n, c_int32) for n in ("neurons", "padded", "width", "chunks", "last_bits", "zero", "act", "step", "group")),
        *((n, c_void_p) for n in ("first", "last", "dfirst", "dlast", "scales", "dscales", "x", "out", "scratch")),
    )
    function = "coded_ffn"

    def floats(self, threads: int) -> int:
        """Return how many floats `scratch` has: sums of gate and up, h, x as whole numbers, and each thread's sums."""
        columns = COLUMNS * self.chunks
        return (6 + 1) * self.padded + columns // 2 + 2 * columns + threads * columns


class Matrix(ctypes.Structure):
    """A matrix, of whose columns a token reads some planes."""

    _fields_ = (
        *((name, c_int32) for name in ("rows", "width", "group", "groups", "steps")),
        ("slope", c_float * 5), ("start", c_float * 5), ("gain", c_float * 4), ("table", c_uint8 * 16),
        *((name, c_void_p) for name in (
            "planes", "scales", "scratch", "unit", "offset", "list", "ends", "high", "low", "level",
        )),
    )  # fmt: skip


class Columns(ctypes.Structure):
    """An FFN of such matrices."""

    _fields_ = (
        ("matrices", POINTER(Matrix)), *((name, c_void_p) for name in ("x", "out", "scratch")),
        *((name, c_int32) for name in ("act", "width")),
    )  # fmt: skip
    function = "columns_ffn"

    def floats(self, threads: int) -> int:
        """Return how many floats `scratch` has: the rows of gate, up and down in whole blocks, for any `threads`."""
        return sum(-(-self.matrices[i].rows // BLOCK) * BLOCK for i in range(3))


_SCRATCH = [torch.empty(0)]  # that kernels work in, one call at a time: fresh memory would cost more than the work


def call(job: Coded | Columns, x: Tensor, level: int) -> Tensor:
    """Run one token through a kernel.

    Args:
        job: what it is handed, but for x, out and scratch.
        x: [1, D], of any floating dtype.
        level: of `build.level`.

    Returns:
        [1, D] in the dtype of x.
    """
    if torch.compiler.is_compiling():  # a graph would free tensors that only a pointer names
        outside: Tensor = torch.compiler.disable(call)(job, x, level)
        return outside
    fields: Any = type(job).from_buffer_copy(job)  # of this call alone: others may run at the same time
    if x.shape != (1, fields.width) or x.device.type != "cpu":
        raise ValueError(f"x is {tuple(x.shape)} on {x.device}, and one token of width {fields.width} is multiplied")
    threads = max(1, min(MOST_THREADS, torch.get_num_threads()))
    given, out = x.detach().float().contiguous(), torch.empty(1, fields.width)
    if len(work := _SCRATCH[0]) < (floats := job.floats(threads)):
        work = _SCRATCH[0] = torch.empty(floats)
    fields.x, fields.out, fields.scratch = given.data_ptr(), out.data_ptr(), work.data_ptr()
    functions()[job.function](ctypes.byref(fields), level, threads)
    return out.to(x.dtype)


@functools.cache
def functions() -> dict[str, Any]:
    """The kernels by name: each takes what it is handed, `build.level`, and the number of threads."""
    by_name = {}
    for kind in (Rows, Coded, Columns):
        function = by_name[kind.function] = getattr(build.library(), kind.function)
        function.argtypes, function.restype = [POINTER(kind), c_int, c_int], None
    return by_name
