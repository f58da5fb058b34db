"""Several GPUs played by the CPU: real numbers, and the refusals of real cards.

Under `Cards`, `tensor.to("lazy:1")` gives a tensor that says it is on that card. Operations compute on the CPU; an
operation on tensors of two devices raises, as CUDA does. A CPU scalar may join, and a CPU tensor may index.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXING = {
    torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl_.default,
}  # fmt: skip


class OnCard(torch.Tensor):
    """A tensor on a card: `kept` has its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, kept, card):
        return torch.Tensor._make_wrapper_subclass(
            cls, kept.shape, strides=kept.stride(), storage_offset=kept.storage_offset(), dtype=kept.dtype, device=card
        )

    def __init__(self, kept, card):
        self.kept, self.card = kept, card

    def __repr__(self):
        return f"{self.kept!r} on {self.card}"

    def tolist(self):
        return self.kept.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class Cards(TorchDispatchMode):
    """While it is entered, there are cards."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(data, device=...)` begins on the CPU
        return super().__enter__()

    def __exit__(self, *raised):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
    asked = kwargs.get("device")
    asked = torch.device(asked) if asked is not None else None
    flat, spec = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    devices = {x.device for x in tensors if isinstance(x, OnCard)}
    if func in COPIES:
        card = asked or tensors[0].device
    else:
        loose = tensors[1:] if func in INDEXING else []
        if devices and any(x.dim() and not isinstance(x, OnCard) and not any(x is y for y in loose) for x in tensors):
            devices.add(torch.device("cpu"))
        if len(devices) > 1:
            raise RuntimeError(f"{func}: expected all tensors on the same device, found {sorted(map(str, devices))}")
        card = asked or next(iter(devices), torch.device("cpu"))
    if card.type == "lazy" and card.index is None:
        card = torch.device("lazy:0")
    kept = [
        x.kept if isinstance(x, OnCard) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat
    ]
    plain_args, plain_kwargs = tree_unflatten(kept, spec)
    found = func(*plain_args, **plain_kwargs)
    same = {id(k): x for k, x in zip(kept, flat, strict=True) if isinstance(x, OnCard)}  # of operations in place

    def on_card(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in same and same[id(x)].device == card:
            return same[id(x)]
        return OnCard(x, card) if card.type == "lazy" else x

    return tree_map(on_card, found)
