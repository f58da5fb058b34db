"""FFNs that a kernel runs as a whole while one token decodes: down(act(gate x) * up x) and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from dart_eval.kernels.cpu import build
from dart_eval.kernels.cpu.library import ACTS
from dart_eval.kernels.forward import Forward
from dart_eval.kernels.mask_rows import MaskRows
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.layers.quantised import bias_of

TWINS: tuple[Callable[[Tensor], Tensor], ...] = (silu, lambda x: gelu(x, approximate="tanh"), gelu, relu)
CLOSE = 1e-6  # to a twin, of an activation whatever its name; GELU by tanh and by erf are 5e-4 apart


def act_of(ffn: FFN) -> str | None:
    """Return the name among `ACTS` of an FFN's activation, told by its values; None: it is none of them."""
    x = torch.cat([torch.linspace(-8, 8, 257), torch.tensor([-1e3, -20, -10.5, 10.5, 20, 1e3])])  # clipped ones, too
    act: Any = ffn.act
    with torch.no_grad():
        own = (act.forward if isinstance(act, nn.Module) else act)(x)  # without hooks, which belong to the model
    return next((n for n, twin in zip(ACTS, TWINS, strict=True) if torch.allclose(own, twin(x), atol=CLOSE)), None)


@torch.no_grad()
def lacking(ffn: FFN) -> str | None:
    """Return why no kernel runs an FFN as a whole, or None."""
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


class BlockRows(MaskRows):
    """One FFN that a kernel runs as a whole while a single token decodes. No rows are copied.

    Args:
        kernel: [1, D] -> [1, D]; it has `nbytes` and `bytes_read`.
    """

    def __init__(self, ffn: FFN, kernel: Any) -> None:
        super().__init__(ffn)
        self._slots = []
        self.kernel = kernel
        self._block, self._run = Forward(ffn.block), single(ffn, kernel)

    @property
    def nbytes(self) -> int:
        return int(self.kernel.nbytes)

    @property
    def rows_read(self) -> tuple[float, ...]:
        return (self.kernel.bytes_read / (6 * self.ffn.width),) * 3  # as rows of 16 bits

    def select(self, mask: Tensor) -> int:
        return 0

    def begin(self) -> None:
        self._block.replace(self._run)

    def end(self) -> None:
        self._block.put_back()


def single(ffn: FFN, kernel: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a forward for an FFN's block: a kernel runs single tokens ([1, D] -> [1, D]), and the block all others."""
    own: Callable[..., Tensor] = ffn.block.forward

    def forward(x: Tensor, *others: Any, **named: Any) -> Tensor:
        return kernel(x.reshape(1, -1)).view(x.shape) if x.numel() == x.shape[-1] else own(x, *others, **named)

    return forward
