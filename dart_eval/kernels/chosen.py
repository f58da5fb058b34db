"""FFNs whose single token chooses among the mask's neurons, and reads only their weights if it can.

Down is copied by neurons, [K, D], so that a neuron is one row in every matrix. Rows of up and down are read by Triton's
kernels on a GPU (`gather`), and by our own on a CPU (`cpu.rows`); where neither runs, torch multiplies all rows of up
and its `embedding_bag` sums rows of down.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from dart_eval.kernels import gather
from dart_eval.kernels.cpu import rows as cpu_rows
from dart_eval.kernels.mask_rows import MaskRows
from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import plain_matrix

# Most parts of a sum of rows, and least rows of a part; a thread computes a part. The parts follow from the number of
# rows alone, so that no digit depends on the number of threads.
PARTS, PART_ROWS = 16, 256
# Most rows of a sum in one part, since parts have a fixed cost: 614 rows of 640 values in bfloat16 take 70 us in one
# part and 110 in three, 1433 rows 178 and 158 (two threads).
WHOLE = 1024


def weighted_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return [n, D], the weighted sums of rows[index]. rows: [F, D]; index, weights: [n, K]."""
    n, count = index.shape
    if not index.numel():
        return rows.new_zeros(n, rows.shape[1])
    if count <= WHOLE:
        return embedding_bag(index, rows, mode="sum", per_sample_weights=weights)
    length = max(PART_ROWS, -(-count // PARTS))
    starts = torch.arange(0, n * count, count)[:, None] + torch.arange(0, count, length)
    sums = embedding_bag(
        index.flatten(), rows, starts.flatten(), mode="sum", per_sample_weights=weights.flatten()
    )  # [n parts, D]
    return sums.view(n, -1, rows.shape[1]).sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


def best(scores: Tensor, count: int) -> Tensor:
    """Return [count] indices of the largest `scores`, ascending; ties go to the lower index, as in `top`.

    scores: [F]. A CPU compares with the least score taken, which is much faster than sorting, and rows in ascending
    order are read faster.
    """
    if scores.device.type != "cpu":  # without a wait for the device
        return scores.sort(descending=True, stable=True).indices[:count].sort().values
    least = scores.topk(count, sorted=False).values.amin() if count else torch.inf
    rows = (scores >= least).nonzero().flatten()
    if len(rows) != count:  # ties at the least score, or NaN
        rows = top_k_mask(scores[None], torch.tensor([count]))[0].nonzero().flatten()
    return rows


def _kernels(ffn: FFN) -> ModuleType | None:
    """Return the module whose `read_rows` and `write_rows` run an FFN's chosen rows, or None."""
    weights = [plain_matrix(m) for m in ffn.projections]
    if gather.missing(weights[-1].device) is None:
        return gather if all(w.stride(1) == 1 for w in weights[:-1]) else None
    return None if any(cpu_rows.lacking(w, None) for w in weights) else cpu_rows


class ChosenRows(MaskRows):
    """The mask's neurons of one FFN, among which the single token of one sequence chooses.

    The token takes the `taken` largest |act(gate x)| x norm, and reads their rows of up. The rows of down of the
    `written` largest |h| are summed. Gate runs with whichever of gate and up the model calls first.

    Attributes:
        taken: neurons that a token takes.
        written: taken neurons that it writes.
        rows: [K, D], of down.
        kernels: the module that reads rows; None: torch reads all rows of up.
    """

    chooses = True

    def __init__(self, ffn: FFN) -> None:
        super().__init__(ffn)
        self._slots = [slot for slot in self._slots if slot.module is not ffn.down]
        self.taken = self.written = ffn.size
        self.norm = torch.empty(0)
        self._down_rows = plain_matrix(ffn.down).detach().t()
        self.rows = self._down_rows
        self._taken = torch.empty(0)  # rows that the current token took, in the order of their neurons
        self._order: Tensor | None = None  # rows by their neurons; None: they are in that order
        self._chosen = False  # whether it has chosen and up has not run
        self._gated: Tensor | None = None  # gate's output, if up ran first (Falcon-H1)
        self._modules: tuple[Any, ...] = (ffn.gate, ffn.up, ffn.down)
        self.kernels = _kernels(ffn)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (self.rows.nbytes if self.rows is not self._down_rows else 0)

    @property
    def rows_read(self) -> tuple[float, ...]:
        return self.count, self.taken if self.kernels else self.count, self.written

    def _copy(self, neurons: Tensor) -> None:
        super()._copy(neurons)
        self.rows = self._down_rows.index_select(0, neurons)

    def _change(self, rows: Tensor, neurons: Tensor) -> None:
        super()._change(rows, neurons)
        self.rows.index_copy_(0, rows, self._down_rows.index_select(0, neurons))

    def prepare(self, norm: Tensor, taken: int, written: int) -> None:
        self.norm, self.taken, self.written = norm, taken, written
        self._order = None if self.neurons is None else self.neurons.argsort()  # after changes rows are in no order

    def begin(self) -> None:
        super().begin()
        for module, forward in zip(self._modules, (self._gate, self._up, self._down), strict=True):
            self._forwards[module].replace(forward)

    def end(self) -> None:
        for module in self._modules:
            self._forwards[module].put_back()
        super().end()

    def _gate(self, x: Tensor) -> Tensor:
        out, self._gated = self._gated, None
        self._chosen = out is None
        return self._choose(x) if out is None else out

    def _up(self, x: Tensor) -> Tensor:
        if not self._chosen:
            self._gated = self._choose(x)
        self._chosen = False
        return self._rest(x)

    def _choose(self, x: Tensor) -> Tensor:
        """Return gate's output, after the token has chosen by it."""
        out = self._product(self._modules[0], x)
        act: Any = self.ffn.act
        scores = act(out).flatten().float().abs() * self.norm
        if self._order is None:
            self._taken = best(scores, self.taken)
        else:  # in the order of neurons, which settles ties as masks do
            self._taken = self._order[best(scores[self._order], self.taken)]
        return out

    def _rest(self, x: Tensor) -> Tensor:
        """Return up's output, for at least the taken neurons."""
        module: Any = self.ffn.up
        if not self.kernels:
            return self._product(module, x)
        up = self.kernels.read_rows(module.weight, self._taken, x.flatten())
        if module.bias is not None:
            up = up + module.bias[self._taken].float()
        out = x.new_zeros(*x.shape[:-1], self.count)
        out.view(-1)[self._taken] = up.to(x.dtype)
        return out

    def _product(self, module: Any, x: Tensor) -> Tensor:
        product = self._products.get(module)
        return linear(x, module.weight, module.bias) if product is None else product(x)

    def _down(self, h: Tensor) -> Tensor:
        return self._write(h, h.flatten()[self._taken])

    def _write(self, h: Tensor, values: Tensor) -> Tensor:
        """Return the output of the taken neurons: [..., D]. h: only for its shape; values: [taken], their h."""
        rows = self._taken
        if self.written < self.taken:
            top = best(values.float().abs(), self.written)
            rows, values = rows[top], values[top]
        if self.kernels:
            out = self.kernels.write_rows(self.rows, rows, values)
        else:
            out = weighted_rows(self.rows, rows[None], values[None].to(self.rows.dtype))[0]  # under autocast others
        if self._modules[2].bias is not None:
            out = out + self._modules[2].bias.to(out.dtype)
        return out.to(h.dtype).view(*h.shape[:-1], -1)
