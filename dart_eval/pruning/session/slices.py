"""How projections multiply the kept neurons alone, once these are their first ones.

A weight is there whole or as a view of its first K neurons, so that the module's own forward runs; two need a forward
of their own: one that holds gate above up (the kept rows of both are no one view), and down.

Down is stored by neurons, [F, D], so that a neuron is one row in every matrix and a swap is cheap. What multiplies it
goes by device, tokens and dtype:

    a GPU, or many tokens on a CPU      a linear layer on the transposed weight
    at most `FEW` tokens on a CPU       weighted sums of rows, by torch's `embedding_bag`
    many tokens on a CPU, float16       products in float32, a few neurons at a time

For one token the sum of rows takes 0.4 to 0.75 of the time of a product with the first K columns of [D, F], in every
dtype; the linear layer on the transposed weight takes as long as on the model's own in float32, twice as long in
bfloat16, and in float16 50 to 100 times as long, for any number of tokens: torch has no fast product of this layout
there, and one in float32 takes 0.4 to 1.5 of the time of the model's own (640 x 2048 and 2048 x 8192, two threads).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from dart_eval.kernels import gather
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import is_conv1d
from dart_eval.pruning.masks.top import top_k_mask

FEW = 4  # tokens for which weighted sums of rows beat a product on a CPU
# Sums of rows are made in so many parts at most, of at least so many rows each: one thread makes a part. They follow
# from the number of rows alone, so that no digit depends on the number of threads.
PARTS, PART_ROWS = 16, 256
# Rows up to which one sum is made, since parts cost a fixed time beside it: 614 rows of 640 values in bfloat16 take 70
# us in one part and 110 in three, 1433 rows 178 and 158 (two threads).
WHOLE = 1024
CHUNK = 256  # neurons of down that are in float32 at a time


def slots(ffn: FFN) -> list[Slot | FusedSlot]:
    """What narrows the projections into h, weights and biases."""
    if ffn.fused:
        return [FusedSlot(ffn)]
    return [slot for module in (ffn.gate, ffn.up) if module is not None for slot in _slots(module)]


def _slots(module: Any) -> list[Slot]:
    conv = is_conv1d(module)
    made = [Slot(module, "weight", int(conv), module.weight, "nf" if conv else None)]
    if getattr(module, "bias", None) is not None:
        made.append(Slot(module, "bias", 0, module.bias))
    return made


@dataclass
class Slot:
    """A parameter of a projection: whole, or a view of its first neurons along `dim`.

    features: the attribute where the module keeps the number of its outputs, if its forward uses it (Conv1D).
    """

    module: Any
    name: str
    dim: int
    whole: nn.Parameter
    features: str | None = None
    part: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        self.part = self.whole

    def cut(self, count: int) -> None:
        """Set how many neurons it has when narrow."""
        self.part = nn.Parameter(self.whole.detach().narrow(self.dim, 0, count), requires_grad=False)

    def narrow(self) -> None:
        self._put(self.part)

    def widen(self) -> None:
        self._put(self.whole)

    def _put(self, parameter: nn.Parameter) -> None:
        # Not by attribute: a module's __setattr__ would take longer than all the rest.
        self.module._parameters[self.name] = parameter
        if self.features is not None:
            setattr(self.module, self.features, parameter.shape[self.dim])


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


class FusedSlot:
    """A projection that holds gate above up."""

    def __init__(self, ffn: FFN) -> None:
        self.module: Any = ffn.up
        self.size = ffn.size
        self._forward = _Forward(self.module)
        self.cut(ffn.size)

    def cut(self, count: int) -> None:
        """Set how many neurons it has when narrow."""
        weight, bias = self.module.weight.detach(), self.module.bias
        gate, up = (half[:count] for half in weight.split(self.size))
        gate_bias, up_bias = (None, None) if bias is None else (half[:count] for half in bias.detach().split(self.size))

        def forward(x: Tensor) -> Tensor:
            return torch.cat([linear(x, gate, gate_bias), linear(x, up, up_bias)], dim=-1)

        self.forward = forward

    def narrow(self) -> None:
        self._forward.replace(self.forward)

    def widen(self) -> None:
        self._forward.put_back()


class Down:
    """A down projection stored by neurons. It multiplies as many as h has, from the first on.

    rows: [F, D], the weight's own memory.
    """

    def __init__(self, ffn: FFN) -> None:
        self.ffn = ffn
        self.module: Any = ffn.down
        weight: Any = ffn.down.weight
        self.rows = weight.detach().as_strided((ffn.size, ffn.width), (ffn.width, 1))
        self.index = torch.arange(ffn.size, device=self.rows.device)
        self._forward = _Forward(self.module)

    def begin(self) -> None:
        """From here on the rows are in place."""
        self._forward.replace(self.forward)

    def end(self) -> None:
        self._forward.put_back()

    def forward(self, h: Tensor) -> Tensor:
        """[..., K] -> [..., D], K neurons, the first ones."""
        count, flat = h.shape[-1], h.flatten(0, -2)  # not by reshape(-1, K): a layer may keep no neuron
        rows = self.rows[:count]
        if h.device.type == "cpu" and len(flat) <= FEW:
            out = weighted_rows(rows, self.index[:count].expand(len(flat), count), flat)
        elif h.device.type == "cpu" and h.dtype == torch.float16:
            out = in_float32(rows, flat)
        else:
            out = linear(flat, rows.t())
        if self.module.bias is not None:
            out = out + self.module.bias
        return out.view(*h.shape[:-1], -1)


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


def in_float32(rows: Tensor, weights: Tensor) -> Tensor:
    """[n, D]: weights @ rows, multiplied in float32. rows: [K, D]; weights: [n, K]."""
    out = torch.zeros(len(weights), rows.shape[1])
    for part, some in zip(rows.split(CHUNK), weights.split(CHUNK, dim=1), strict=True):
        out.addmm_(some.float(), part.float())
    return out.to(rows.dtype)


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


class GatheredFFN:
    """One FFN whose token chooses among the kept neurons, and reads the weights of these alone where it can.

    While narrow: gate multiplies its first K rows. The token takes the `taken` largest |act(gate x)| x norm; of up a
    CUDA GPU reads their rows alone (`gather.read_rows`), a CPU the first K, since reading scattered rows costs it more.
    Of those taken, the `written` largest |h| are summed from down's rows. For one sequence and one token. Gate runs
    with whichever of gate and up the model calls first.

    Attributes:
        kept, taken, written: neurons of the mask, those of them that a token takes, those of these that it writes.
        kernels: whether Triton's kernels read the rows.
    """

    def __init__(self, ffn: FFN, down: Down) -> None:
        self.ffn, self.down = ffn, down
        self.kept = self.taken = self.written = ffn.size
        self.norm = torch.empty(0)
        self._taken = torch.empty(0)  # which neurons the token under way took, by row
        self._chosen = False  # it has chosen, and up has not run
        self._gated: Tensor | None = None  # what gate gives, where up ran first (Falcon-H1)
        self._modules: tuple[Any, ...] = (ffn.gate, ffn.up, ffn.down)
        self._forwards = [_Forward(m) for m in self._modules]
        self.kernels = gather.missing(down.rows.device) is None

    @property
    def read(self) -> tuple[float, float, float]:
        """Neurons of which gate, up and down read weights."""
        return self.kept, self.taken if self.kernels else self.kept, self.written

    def prepare(self, norm: Tensor, taken: int, written: int) -> None:
        """norm: [K] fp32, root of the mean square of up x of the kept neurons, by row."""
        self.norm, self.taken, self.written = norm, taken, written

    def cut(self, count: int) -> None:
        """Set how many neurons it has when narrow."""
        self.kept = count

    def narrow(self) -> None:
        for forward, new in zip(self._forwards, (self._gate, self._up, self._down), strict=True):
            forward.replace(new)

    def widen(self) -> None:
        for forward in self._forwards:
            forward.put_back()
        self.down.begin()

    def _linear(self, module: Any, x: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias[: self.kept]
        return linear(x, module.weight[: self.kept], bias)

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
        out = self._linear(self.ffn.gate, x)
        act: Any = self.ffn.act
        self._taken = (act(out).flatten().float().abs() * self.norm).topk(self.taken, sorted=False).indices
        return out

    def _rest(self, x: Tensor) -> Tensor:
        """What up gives, of the neurons taken at least."""
        module: Any = self.ffn.up
        if not self.kernels:
            return self._linear(module, x)
        up = gather.read_rows(module.weight, self._taken, x.flatten())
        if module.bias is not None:
            up = up + module.bias[self._taken].float()
        out = x.new_zeros(*x.shape[:-1], self.kept)
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
            out = gather.write_rows(self.down.rows, rows, values)
        else:
            out = weighted_rows(self.down.rows, rows[None], values[None])[0]
        if self._modules[2].bias is not None:
            out = out + self._modules[2].bias.to(out.dtype)
        return out.to(h.dtype).view(*h.shape[:-1], -1)
