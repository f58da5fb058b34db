"""Products that read only the weights of chosen neurons, so that a token's choice saves time on a GPU.

Two Triton kernels for one token (a matrix times a vector): `read_rows` gathers rows of up, `write_rows` rows of a
transposed down, both inside the product, with fp32 sums. Triton is optional (`pip install 'dart-eval[triton]'`) and
needs a CUDA GPU, or its interpreter (TRITON_INTERPRET=1), which is slow and for tests.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # optional
    triton = tl = None

ROWS = 16  # neurons that one program reads at a time
COLUMNS = 128  # of the model's width
SPLITS = 8  # programs that share the neurons of one block of columns in `write_rows`


def missing(device: torch.device) -> str | None:
    """Return why the kernels cannot run on this device, or None."""
    if triton is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton's kernels need a CUDA GPU, not {device.type}"
    if device.type == "cuda" and not any(map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "clang"))):
        return "Triton needs a C compiler (gcc or clang) on the PATH"
    return None


if triton is not None:

    @triton.jit
    def _read_rows(weight, rows, x, out, count, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """out[n] = weight[rows[n]] . x"""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row = tl.load(rows + n, mask=n < count, other=0).to(tl.int64)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, width, COLUMNS):
            d = start + tl.arange(0, COLUMNS)
            inside = (n < count)[:, None] & (d < width)[None, :]
            w = tl.load(weight + row[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(w * tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)[None, :], axis=1)
        tl.store(out + n, total, mask=n < count)

    @triton.jit
    def _write_rows(
        weight, rows, h, out, count, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr
    ):
        """out[split] = sum over n of h[n] * weight[rows[n]]: programs that added to one sum would do so in any order"""
        d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        for start in range(tl.program_id(1) * ROWS, count, SPLITS * ROWS):
            n = start + tl.arange(0, ROWS)
            row = tl.load(rows + n, mask=n < count, other=0).to(tl.int64)
            inside = (n < count)[:, None] & (d < width)[None, :]
            w = tl.load(weight + row[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(w * tl.load(h + n, mask=n < count, other=0.0).to(tl.float32)[:, None], axis=0)
        tl.store(out + tl.program_id(1) * width + d, total, mask=d < width)


def read_rows(weight: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """Return weight[rows] @ x, without a copy of the rows.

    Args:
        weight: [F, D], rows contiguous.
        rows: [N] int.
        x: [D].

    Returns:
        [N] fp32.
    """
    count, width = len(rows), weight.shape[1]
    out = torch.empty(count, dtype=torch.float32, device=x.device)
    if not count:
        return out
    grid = (-(-count // ROWS),)
    with torch.cuda.device_of(weight):
        _read_rows[grid](weight, rows, x.contiguous(), out, count, width, weight.stride(0), ROWS, COLUMNS)
    return out


def write_rows(weight: Tensor, rows: Tensor, h: Tensor) -> Tensor:
    """Return h @ weight[rows], without a copy of the rows.

    Args:
        weight: [F, D], rows contiguous (a transposed down).
        rows: [N] int.
        h: [N].

    Returns:
        [D] fp32.
    """
    count, width = len(rows), weight.shape[1]
    parts = torch.zeros(SPLITS, width, dtype=torch.float32, device=h.device)
    if count:
        grid = (-(-width // COLUMNS), SPLITS)
        with torch.cuda.device_of(weight):
            _write_rows[grid](
                weight, rows, h.contiguous(), parts, count, width, weight.stride(0), ROWS, COLUMNS, SPLITS
            )
    return parts.sum(0)
