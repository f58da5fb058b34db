"""Parts of the slot `routing` at work on a model: routers that choose fewer experts, or among fewer of them.

A router is whatever code of the model chooses experts: in every type it takes the best of one score for each expert by
`topk`, mostly after a softmax over them. While a layer runs, these two calls are given what the part asks for, so that
all else about the choice, its weights, groups and biases, stays the type's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dart_eval.layers.experts import Routed
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.experts.routings import Fewer, Routing, chosen
from dart_eval.util.errors import UserError

CHOOSE = (torch.topk, Tensor.topk)
NORMALISE = (torch.softmax, Tensor.softmax, nn.functional.softmax)


class Choosing(TorchFunctionMode):
    """The router of one layer while this is in force.

    Args:
        routed: the experts. count: of a token; as many as it has else: the router decides.
        left: [E] bool, the experts that there are; None: all.
    """

    def __init__(self, routed: Routed, count: int, left: Tensor | None) -> None:
        super().__init__()
        self.routed, self.count, self.left = routed, count, left
        self.asked = False  # whether a choice among all experts was seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and (func in CHOOSE or func in NORMALISE):
            first, rest = args[0], list(args[1:])
            over = tuple(first.shape[1:])  # of each token
            if self.left is not None and over and _product(over) == self.routed.all:  # in groups, perhaps
                first = first.masked_fill(~self.left.to(first.device).view(over), -torch.inf)
            if func in CHOOSE and over == (self.routed.all,):
                self.asked = True
                if rest and rest[0] == self.routed.count:
                    rest[0] = self.count
                elif kwargs.get("k") == self.routed.count:
                    kwargs["k"] = self.count
            args = (first, *rest)
        return func(*args, **kwargs)


def _product(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


class Order:
    """What the router of one layer is to do differently.

    Args:
        routed: the experts. count: of a token. own: the router is asked for that many; else its own choice is cut.
        left: [E] bool, the experts that there are; None: all.
    """

    def __init__(self, routed: Routed, count: int, own: bool, left: Tensor | None) -> None:
        self.routed, self.count, self.own, self.left = routed, count, own, left
        self._mode: Choosing | None = None

    def begin(self) -> None:
        """The layer runs from here on."""
        self.end()
        self.routed.settle = self.settle
        self._mode = Choosing(self.routed, self.count if self.own else self.routed.count, self.left)
        self._mode.__enter__()

    def end(self) -> None:
        """The layer is done; also where it never began, or was left by an exception."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)
        self.routed.settle = None

    def settle(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of N tokens and what they count, [N, count of the model]: -1 and 0 where a token has fewer.

        Args:
            index, weights: [N, k], as the router gives them.

        Raises:
            UserError: the router did not choose as it was asked to.
        """
        routed, mode = self.routed, self._mode
        if self.own and (mode is None or not mode.asked or index.shape[1] != self.count):
            raise UserError(
                f"the router of {routed.title} chooses experts in a way that is not understood",
                "take another method",
            )
        if not self.own and self.count < index.shape[1]:
            weights, best = weights.topk(self.count, dim=1)
            index = index.gather(1, best)
        if self.left is not None:  # where its groups have too few, a router takes what there is
            gone = ~self.left.to(index.device)[index]
            index, weights = index.masked_fill(gone, -1), weights.masked_fill(gone, 0)
        missing = (0, routed.count - index.shape[1])
        return nn.functional.pad(index, missing, value=-1), nn.functional.pad(weights, missing)


class Rerouted:
    """What a part has made of a model's routers before any prompt.

    Args:
        counts: [L] experts of a token in each layer, 0 where there are none.

    Attributes:
        orders: layer -> what its router is to do.
        fine: no weights are others (see `attached.AttachedInputs`).
    """

    fine = None

    def __init__(
        self, part: Routing, ffns: Sequence[FFN], counts: Sequence[int], calibration: Calibration | None
    ) -> None:
        own = not isinstance(part, Fewer) or part.weights == "own"
        left: list[Tensor | None] = [None] * len(ffns)
        if part.calibrates and calibration is not None:
            left = [_best(part, f, s) for f, s in zip(ffns, saliency(ffns, calibration), strict=True)]
        self.ffns = ffns
        self.orders = {
            f.layer: Order(routed, count, own, some)
            for f, count, some in zip(ffns, counts, left, strict=True)
            if (routed := chosen(f))
        }

    def nbytes(self) -> int:
        """Bytes beside the model: a bit for each expert would do, a byte is kept."""
        return sum(order.left.numel() for order in self.orders.values() if order.left is not None)

    def watch(self, add: Callable[[Any], None], forward: Any) -> None:
        """Install the hooks by which routers choose otherwise while tokens are decoded.

        Args:
            add: takes the handle of each. forward: the one under way (`hooks.Forward`).
        """
        for ffn in self.ffns:
            order = self.orders.get(ffn.layer)
            if order is not None:
                add(ffn.holder.register_forward_pre_hook(_beginning(order, forward)))
                add(ffn.holder.register_forward_hook(_ending(order), always_call=True))
                add(_Ending(order))


def _beginning(order: Order, forward: Any) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any) -> None:
        if forward.phase == "decode" and forward.state is not None:
            order.begin()

    return torch.compiler.disable(hook)


def _ending(order: Order) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
        order.end()

    return torch.compiler.disable(hook)


class _Ending:
    """Removed with the hooks: an interrupt may have left a layer under way."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def remove(self) -> None:
        self.order.end()


def _best(part: Routing, ffn: FFN, saliency: Tensor) -> Tensor | None:
    """[E] bool, the experts of a layer that are left; ties go to the lower index."""
    routed = chosen(ffn)
    if routed is None:
        return None
    order = saliency.sort(descending=True, stable=True).indices
    left = torch.zeros(routed.all, dtype=torch.bool)
    left[order[: part.experts_left(routed.all)]] = True
    return left


@torch.no_grad()
def saliency(ffns: Sequence[FFN], calibration: Calibration) -> list[Tensor]:
    """REAP's saliency of the experts of each layer on the calibration text, [E] fp32; [0] of other FFNs.

    The mean over the tokens that have an expert of the norm of what it writes, the router's weight in it.
    """

    def measure() -> list[Tensor]:
        sums = [torch.zeros(f.routed.all if f.routed else 0) for f in ffns]
        tokens = [torch.zeros_like(s) for s in sums]

        def see(layer: int, _x: Tensor, h: Tensor) -> None:
            routed = ffns[layer].routed
            if routed is not None:
                index, norms = routed.index[-len(h) :].cpu(), routed.written(h).cpu()
                some = index >= 0  # LongCat: a token may have fewer
                sums[layer].index_add_(0, index[some], norms[some])
                tokens[layer].index_add_(0, index[some], torch.ones(int(some.sum())))

        calibration.visit(see)
        return [s / n.clamp_min(1) for s, n in zip(sums, tokens, strict=True)]

    return calibration.once("saliency of experts", measure)
