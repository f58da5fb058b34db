"""What makes fewer bytes into less time, for one sequence: which kernel runs, and when.

Under a mask, copies of its rows (`mask_rows`) stand in place of the weights. Of methods that read bits of columns a
kernel runs the whole FFN (`cpu.columns`), as does that of whole numbers (`cpu.ffns`) in benchmarks.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from dart_eval.kernels.cpu import build
from dart_eval.kernels.cpu.library import ACTS
from dart_eval.kernels.mask_rows import RowCopies, Swap, replacing
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.layers.projection import bias_of, encoded, is_conv1d
from dart_eval.util.errors import UserError, nearest

if TYPE_CHECKING:
    from dart_eval.pruning.log import Step
    from dart_eval.pruning.method import Method

TWINS: tuple[Callable[[Tensor], Tensor], ...] = (silu, lambda x: gelu(x, approximate="tanh"), gelu, relu)
CLOSE = 1e-6  # to a twin, of an activation whatever its name; GELU by tanh and by erf are 5e-4 apart


class Fast:
    """How the decoding forwards of one session run.

    Args:
        execution: `masked`, or `auto`: by copies or a kernel where all sequences have one mask.
        shared_mask: all sequences of a batch have one mask.

    Attributes:
        copies: per FFN what replaces it; None while the current sequences run by masks.
        on: whether the current forward runs on it.
        available: whether one sequence may run on copies or kernels, if the execution is `auto`.

    Raises:
        UserError: unknown execution.
    """

    def __init__(self, ffns: Sequence[FFN], method: Method, execution: str, shared_mask: bool) -> None:
        if execution not in ("auto", "masked"):
            raise UserError(f"unknown execution {execution!r}", nearest(execution, ("auto", "masked")))
        self.ffns, self.method, self.shared_mask = ffns, method, shared_mask
        self.copies: list[Swap] | None = None
        self.on = self._ready = False
        reason = method.why_no_kernel(ffns) or unlike_plain(ffns) if method.prunes else "it is dense"
        self.available = reason is None
        self._possible = self.available and execution == "auto"
        if execution == "auto" and method.prunes and method.why_no_kernel(ffns) is None and reason:
            warnings.warn(f"{reason}: pruning by masks, which saves no time", stacklevel=5)

    def choose(self, batch: int, by_hand: bool) -> None:
        """Choose for new sequences.

        Args:
            by_hand: whether a user calls the forwards, each continuing the one before; else any sequence may be
                resumed with another mask.
        """
        one = batch == 1 or (self.method.granularity == "" and (self.shared_mask or not self.method.keeps_state))
        if not (self._possible and one and by_hand):
            self.drop()
        elif self.copies is None:
            kernels = ((f, self.method.kernel(f)) for f in self.ffns)
            self.copies = [RowCopies(f) if kernel is None else WholeFFN(f, kernel) for f, kernel in kernels]
            self._ready = all(isinstance(copy, WholeFFN) for copy in self.copies)

    def copy_rows(self, masks: Sequence[Tensor]) -> None:
        """Copy the weights of neurons that are new in the masks. masks: per layer [1, F]; none: tokens run dense."""
        if self.copies is None or isinstance(self.copies[0], WholeFFN):
            return
        self._ready = False  # until every layer is copied: forwards then run by masks
        for mask, copy in zip(masks, self.copies, strict=False):
            copy.select(mask[0])
        self._ready = bool(masks) and all(copy.runs for copy in self.copies)

    def begin(self, step: Step) -> None:
        """Let a decoding forward run on the copies alone, if every sequence is pruned."""
        if self.copies is None or not self._ready:
            return
        share = step.read if isinstance(self.copies[0], WholeFFN) else step.mask
        if bool((share < 1).all()):
            self.on = True
            for copy in self.copies:
                copy.begin()

    def end(self) -> None:
        """Restore the model's own weights and forwards; also after an exception in a forward."""
        if self.on:
            for copy in self.copies or ():
                copy.end()
        self.on = False

    def drop(self) -> None:
        """Drop the copies."""
        self.end()
        self.copies = None


class WholeFFN(Swap):
    """An FFN that a kernel runs as a whole while a single token decodes, and the block itself all other forwards.

    Args:
        kernel: [1, D] -> [1, D]; it has `bytes_read`.
    """

    def __init__(self, ffn: FFN, kernel: Any) -> None:
        self.ffn, self.kernel, self.count = ffn, kernel, ffn.size
        self.rows_read = (kernel.bytes_read / (6 * ffn.width),) * 3  # as rows of 16 bits
        own = ffn.block.forward

        def forward(x: Tensor, *others: Any, **named: Any) -> Any:
            return kernel(x.reshape(1, -1)).view(x.shape) if x.numel() == x.shape[-1] else own(x, *others, **named)

        self.entries = [replacing(ffn.block, "forward", forward)]


# -- which models have kernels -----------------------------------------------------------------------------------------


def why_no_kernel(method: Method, ffns: Sequence[FFN]) -> str | None:
    """Return why one sequence decodes no faster under a method, or None."""
    return unlike_plain(ffns) or method.why_no_kernel(ffns)


def unlike_plain(ffns: Sequence[FFN]) -> str | None:
    """Return why the rows of these projections' weights cannot be copied, or None."""
    owners: dict[int, FFN] = {}
    for ffn in ffns:
        if ffn.routed is not None:
            return f"the experts of layer {ffn.number} are one module, which has no kernels yet"
        if ffn.norm is not None:
            return f"the FFN of layer {ffn.number} has a norm of its neurons, which has no kernels yet"
        for module in ffn.projections:
            if reason := _unlike_plain(module):
                return f"{type(module).__name__} (layer {ffn.number}) {reason}"
            other = owners.setdefault(id(module), ffn)
            if other is not ffn:
                return f"layers {other.number} and {ffn.number} have one FFN, which cannot keep neurons for each"
    return None


def _unlike_plain(module: nn.Module) -> str | None:
    """Return why a projection is not a plain one, or None."""
    if reason := encoded(module):
        return f"has weights that {reason}"
    weight: Any = module._parameters.get("weight")
    if weight is None or weight.is_meta:
        return "has weights that are computed on the fly or held elsewhere"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return "is not torch's own linear layer"
    # accelerate wraps the forward of every module of a model that is spread over devices.
    own = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return "has a forward of its own, which may quantise what it is given"
    return None


def act_of(ffn: FFN) -> str | None:
    """Return the name among `ACTS` of an FFN's activation, told by its values; None: it is none of them."""
    x = torch.cat([torch.linspace(-8, 8, 257), torch.tensor([-1e3, -20, -10.5, 10.5, 20, 1e3])])  # clipped ones, too
    act: Any = ffn.act
    with torch.no_grad():
        own = (act.forward if isinstance(act, nn.Module) else act)(x)  # without hooks, which belong to the model
    return next((n for n, twin in zip(ACTS, TWINS, strict=True) if torch.allclose(own, twin(x), atol=CLOSE)), None)


@torch.no_grad()
def why_not_whole(ffn: FFN) -> str | None:
    """Return why no kernel runs an FFN as a whole, or None: down(act(gate x) * up x) and nothing else."""
    if reason := build.why_no_kernel():
        return reason
    modules: list[Any] = ffn.projections
    plain = ffn.gate is not None and ffn.norm is None and ffn.lift is None and ffn.routed is None
    if not plain or any(bias_of(m) is not None for m in modules):
        return f"the kernel runs gated FFNs without norms and biases, and that of layer {ffn.number} is another"
    if device_of(ffn).type != "cpu" or any(not m.weight.is_floating_point() for m in modules):
        return "the kernel is for plain weights on a CPU"
    if act_of(ffn) is None:
        return f"the kernel has no {type(ffn.act).__name__}"
    x = torch.randn(1, 1, ffn.width, generator=torch.Generator().manual_seed(0)).to(modules[0].weight.dtype)
    with contextlib.suppress(Exception):  # a block that takes more than x is another one, too
        if ffn.block is not ffn.holder and torch.equal(ffn.block(x), ffn.down(ffn.intermediate(x))):
            return None
    return f"{type(ffn.block).__name__} does more than its projections"
