"""FFNs whose one token chooses among the kept neurons, and reads the weights of these alone where it can.

Down is copied by neurons, [K, D], so that a neuron is one row in every matrix. On a CPU rows of down are summed by
torch's `embedding_bag`; on a GPU Triton's kernels read rows of up and down (`gather`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from dart_eval.kernels import gather
from dart_eval.kernels.kept import KeptRows
from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import plain_matrix

# Sums of rows are made in so many parts at most, of at least so many rows each: one thread makes a part. They follow
# from the number of rows alone, so that no digit depends on the number of threads.
PARTS, PART_ROWS = 16, 256
# Rows up to which one sum is made, since parts cost a fixed time beside it: 614 rows of 640 values in bfloat16 take 70
# us in one part and 110 in three, 1433 rows 178 and 158 (two threads).
WHOLE = 1024


def weighted_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """[n, D]: for each of n, the sum of rows[index] times their weights. rows: [F, D]; index, weights: [n, K]."""
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
    """[count], where the largest of `scores` are, ascending on a CPU; ties go to the lower index, as in `top`.

    scores: [F]. On a CPU the least score that is taken says which they are: much faster than to sort, and rows that are
    read in the order in which they lie come faster.
    """
    if scores.device.type != "cpu":  # without a wait for the device
        return scores.sort(descending=True, stable=True).indices[:count]
    least = scores.topk(count, sorted=False).values.amin() if count else torch.inf
    rows = (scores >= least).nonzero().flatten()
    if len(rows) != count:  # several have the least score, or some are no number
        rows = top_k_mask(scores[None], torch.tensor([count]))[0].nonzero().flatten()
    return rows


class _Forward:
    """A module's forward, replaced and put back."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.before = module.__dict__.get("forward")

    def replace(self, forward: Any) -> None:
        self.module.__dict__["forward"] = forward

    def put_back(self) -> None:
        if self.before is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self.before


class ChosenRows(KeptRows):
    """The kept neurons of one FFN, of which the one token of one sequence chooses some.

    The token takes the `taken` largest |act(gate x)| x norm; of up a CUDA GPU reads their rows alone
    (`gather.read_rows`), a CPU all kept ones, since reading scattered rows costs it more. Of those taken, the `written`
    largest |h| are summed from down's rows. Gate runs with whichever of gate and up the model calls first.

    Attributes:
        taken, written: neurons that a token takes, and those of these that it writes.
        rows: [K, D], of down. kernels: whether Triton's kernels read the rows.
    """

    def __init__(self, ffn: FFN) -> None:
        super().__init__(ffn)
        self._slots = [slot for slot in self._slots if slot.module is not ffn.down]
        self.taken = self.written = ffn.size
        self.norm = torch.empty(0)
        self._down_rows = plain_matrix(ffn.down).detach().t()
        self.rows = self._down_rows
        self._taken = torch.empty(0)  # which neurons the token under way took, by row
        self._chosen = False  # it has chosen, and up has not run
        self._gated: Tensor | None = None  # what gate gives, where up ran first (Falcon-H1)
        self._modules: tuple[Any, ...] = (ffn.gate, ffn.up, ffn.down)
        self._forwards = [_Forward(m) for m in self._modules]
        self.kernels = gather.missing(self.rows.device) is None

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
        """norm: [K] fp32, root of the mean square of up x of the kept neurons, by row."""
        self.norm, self.taken, self.written = norm, taken, written

    def begin(self) -> None:
        super().begin()
        for forward, new in zip(self._forwards, (self._gate, self._up, self._down), strict=True):
            forward.replace(new)

    def end(self) -> None:
        for forward in self._forwards:
            forward.put_back()
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
        """What gate gives; the token has chosen by it."""
        out = linear(x, self._modules[0].weight, self._modules[0].bias)
        act: Any = self.ffn.act
        self._taken = (act(out).flatten().float().abs() * self.norm).topk(self.taken, sorted=False).indices
        return out

    def _rest(self, x: Tensor) -> Tensor:
        """What up gives, of the neurons taken at least."""
        module: Any = self.ffn.up
        if not self.kernels:
            return linear(x, module.weight, module.bias)
        up = gather.read_rows(module.weight, self._taken, x.flatten())
        if module.bias is not None:
            up = up + module.bias[self._taken].float()
        out = x.new_zeros(*x.shape[:-1], self.count)
        out.view(-1)[self._taken] = up.to(x.dtype)
        return out

    def _down(self, h: Tensor) -> Tensor:
        return self._write(h, h.flatten()[self._taken])

    def _write(self, h: Tensor, values: Tensor) -> Tensor:
        """What the neurons taken add: [..., D]. h: [..., any], for its shape. values: [taken], theirs of it."""
        rows = self._taken
        if self.written < self.taken:
            top = best(values.float().abs(), self.written)
            rows, values = rows[top], values[top]
        if self.kernels:
            out = gather.write_rows(self.rows, rows, values)
        else:
            out = weighted_rows(self.rows, rows[None], values[None])[0]
        if self._modules[2].bias is not None:
            out = out + self._modules[2].bias.to(out.dtype)
        return out.to(h.dtype).view(*h.shape[:-1], -1)
