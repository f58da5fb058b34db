"""Execution `permuted`: kept neurons are moved, in place, into the first K rows, and the FFN multiplies slices.

The order of an FFN's neurons is free: rows of gate and up and columns of down may change places together. Swapping the
kept neurons to the front makes a pruned FFN a dense one of K neurons, on a view of the same memory: no second copy of
the weights, and shapes and addresses that do not change while K does not. A new mask swaps only what changed.

Down is turned, in its own memory, so that its neurons are rows too (`slices`). Everything is done in steps that can be
finished after an interrupt (`inplace`), and undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import encoded, is_conv1d
from dart_eval.pruning.session.inplace import Step, Work, involutions, swap, transpose
from dart_eval.pruning.session.slices import Down, GatheredFFN, slots
from dart_eval.util.errors import UserError

Gather = Callable[[FFN, Down], GatheredFFN]
REORDERED = "the neurons of this model are reordered by another prune()"


class PermutedFFNs:
    """All FFNs of a model, their neurons in an order of our choice.

    Nothing is changed before `begin()`, and `restore()` undoes everything. Between `slice()` and `whole()` the
    projections multiply the first `kept` neurons of each layer alone.

    Args:
        gather: makes what reads the rows alone that the one token of one sequence chooses among the kept neurons
            (`slices.GatheredFFN`); None where no token chooses.

    Raises:
        UserError: weights are quantised, or shared with other modules, or reordered already.
    """

    def __init__(self, ffns: Sequence[FFN], model: nn.Module, gather: Gather | None = None) -> None:
        if any(f.order is not None for f in ffns):
            raise UserError(REORDERED, "leave that one first")
        if reason := quantised(ffns) or shared(ffns, model):
            raise UserError(reason, "use execution='masked'")
        self.ffns = list(ffns)
        self.kept = [f.size for f in ffns]
        self.downs = [Down(f) for f in ffns]
        self.gathered = [gather(f, d) for f, d in zip(ffns, self.downs, strict=True)] if gather else []
        self._slots: list[list[Any]] = [[g] for g in self.gathered] or [slots(f) for f in ffns]
        self._banks = [_banks(f, d) for f, d in zip(ffns, self.downs, strict=True)]
        into = [m for f in ffns for m in (f.gate, f.up) if m is not None]
        self._own = [(p, p.detach()) for m in into for p in m.parameters(recurse=False)]
        self._turned = [False] * len(ffns)
        self._work: Work | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Take the neurons over."""
        for ffn in self.ffns:
            ffn.order = torch.arange(ffn.size, dtype=torch.int32, device=next(ffn.down.parameters()).device)
        for layer in range(len(self.ffns)):
            self._turn(layer, True)

    @torch.no_grad()
    def select(self, layer: int, mask: Tensor) -> int:
        """Move the neurons of `mask` ([F] bool, by neuron) to the front of a layer; returns how many moved there."""
        ffn = self.ffns[layer]
        assert ffn.order is not None
        mask = mask.to(ffn.order.device)
        count = int(mask.sum())
        front = ffn.by_row(mask)
        leaving = (~front[:count]).nonzero().flatten()
        entering = front[count:].nonzero().flatten() + count
        self._swap(layer, leaving, entering)
        if count != self.kept[layer]:
            self.kept[layer] = count
            for slot in self._slots[layer]:
                slot.cut(count)
        return len(entering)

    def slice(self) -> None:
        """The projections multiply the kept neurons."""
        for layer in self._slots:
            for slot in layer:
                slot.narrow()

    def whole(self) -> None:
        """The projections multiply all neurons."""
        for layer in self._slots:
            for slot in layer:
                slot.widen()

    def executed(self) -> float:
        """FFN weights that a sliced forward multiplies / all FFN weights."""
        total = sum(f.size * f.matrices for f in self.ffns)
        if self.gathered:
            return sum(sum(g.read) for g in self.gathered) / total
        return sum(kept * f.matrices for kept, f in zip(self.kept, self.ffns, strict=True)) / total

    @torch.no_grad()
    def restore(self) -> None:
        """Every neuron back to its place, bit for bit; also after an exception or an interrupt.

        What an interrupt leaves undone the next call does.
        """
        self._finish()
        self.whole()
        for parameter, own in self._own:
            if parameter.data_ptr() != own.data_ptr():  # cast or moved meanwhile, and so in an order of ours
                parameter.data = own
        for layer, ffn in enumerate(self.ffns):
            if ffn.order is not None:
                for a, b in involutions(ffn.order.tolist()):
                    self._swap(layer, torch.tensor(a), torch.tensor(b))
                self._turn(layer, False)
            self.downs[layer].end()
        for ffn in self.ffns:
            ffn.order = None

    def _swap(self, layer: int, a: Tensor, b: Tensor) -> None:
        """Swap the neurons at rows a with those at rows b; no row occurs twice."""
        if not len(a):
            return
        ffn = self.ffns[layer]
        assert ffn.order is not None
        a, b = a.to(ffn.order.device), b.to(ffn.order.device)
        after = ffn.order.index_copy(0, torch.cat([a, b]), ffn.order[torch.cat([b, a])])

        def done() -> None:
            ffn.order = after

        self._do((step for tensor, dim in self._banks[layer] for step in swap(tensor, dim, a, b)), done)

    def _turn(self, layer: int, by_neurons: bool) -> None:
        """Store a layer's down by neurons, or again as it was."""
        down, ffn = self.downs[layer], self.ffns[layer]
        weight = down.module.weight
        if self._turned[layer] == by_neurons:
            return
        memory = down.rows.view(-1)
        steps: Iterable[Step] = ()
        if not is_conv1d(down.module):
            shape = (ffn.width, ffn.size) if by_neurons else (ffn.size, ffn.width)
            steps = transpose(memory, *shape)

        def done() -> None:
            if not is_conv1d(down.module):
                weight.data = down.rows.t() if by_neurons else memory.view(ffn.width, ffn.size)
            self._turned[layer] = by_neurons
            if by_neurons:
                down.begin()

        self._do(steps, done)

    def _do(self, steps: Iterable[Step], done: Callable[[], None]) -> None:
        self._finish()
        self._work = Work(steps, done)
        self._finish()

    def _finish(self) -> None:
        """Carry out the work under way, from wherever it stands."""
        if self._work is not None:
            self._work.finish()
            self._work = None


def _banks(ffn: FFN, down: Down) -> list[tuple[Tensor, int]]:
    """Tensors with one entry of every neuron along a dimension: views of the parameters."""
    banks = [(down.rows, 0)]
    projections: list[Any] = [ffn.gate, ffn.up]
    for module in projections:
        if module is None:
            continue
        dim, halves = int(is_conv1d(module)), 2 if ffn.fused else 1
        banks += [(part, dim) for part in module.weight.detach().chunk(halves, dim)]
        if getattr(module, "bias", None) is not None:
            banks += [(part, 0) for part in module.bias.detach().chunk(halves)]
    return banks


def quantised(ffns: Sequence[FFN]) -> str | None:
    """Why these projections have no plain weights whose rows could change places, or None."""
    for ffn in ffns:
        if ffn.routed is not None:
            return f"the experts of layer {ffn.number} are one module, which has no kernels yet"
        if ffn.norm is not None:
            return f"the FFN of layer {ffn.number} has a norm of its neurons, which has no kernels yet"
        for module in (ffn.gate, ffn.up, ffn.down):
            if module is not None and (reason := _unlike_plain(module, ffn.order is not None)):
                return f"{type(module).__name__} (layer {ffn.number}) {reason}"
    return None


def _unlike_plain(module: nn.Module, reordered: bool) -> str | None:
    """What keeps a projection from being a plain one, or None. reordered: by us, who turn weights and set forwards."""
    if reason := encoded(module):
        return f"has weights that {reason}"
    weight: Any = module.weight
    if not isinstance(weight, nn.Parameter) or weight.is_meta or not (weight.is_contiguous() or reordered):
        return "has weights that are computed on the fly, held elsewhere or not contiguous"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return "is not torch's own linear layer"
    # accelerate wraps the forward of every module of a model that is spread over devices.
    own = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    if not reordered and own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return "has a forward of its own, which may quantise what it is given"
    return None


def shared(ffns: Sequence[FFN], model: nn.Module) -> str | None:
    """Which FFN weights lie in memory that another module uses too, or None."""
    mine = {id(m.weight) for f in ffns for m in f.projections}
    spans = []
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if tensor.numel() and not tensor.is_meta:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + (last + 1) * tensor.element_size(), name, id(tensor) in mine))
    reach, last_name, last_ours = 0, "", False  # of the spans so far, the one that ends last
    pairs = []
    for start, end, name, ours in sorted(spans):
        if start < reach and (ours or last_ours):
            pairs.append(sorted((last_name, name)))
        if end > reach:
            reach, last_name, last_ours = end, name, ours
    if not pairs:
        return None
    one, other = min(pairs)  # whatever lies first in memory
    return f"the weights {one} and {other} share memory, so their neurons cannot be reordered apart"
