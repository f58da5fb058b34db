"""One rounding of bfloat16 after every layer: the floor below which no difference from dense means anything.

    x <- round(x (1 + 2^-9 n)),   n standard normal for each element of each layer's output, prompt too

2^-9 is the largest relative error of a rounding to bfloat16's 8 bits, so a layer that is computed in bfloat16 in place
of fp32 errs about as much (exllamav3, 4f8ad01, `eval/qbench`, which reruns its reference so). The product is taken in
fp32 and rounded once to the model's dtype.

n is a function of the seed, the tokens up to and with its own, the layer and the element: a document has the same noise
in any batch, beside a shared prefix, and after a resume. The function is SplitMix64 on 64 bits, whose leading 53 are a
uniform number, and the inverse of the normal distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dart_eval.layers.find import decoder_layers
from dart_eval.pruning.method import Method, option
from dart_eval.pruning.methods.griffin import SEEDS
from dart_eval.pruning.rows import Rows
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from dart_eval.pruning.method import Hook
    from dart_eval.pruning.session import Session

STEP = 2.0**-9
STEPS = (0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xDA942042E4DD58B5)  # odd: of a token, a layer, an element
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's
PIECE = 1 << 16  # elements at a time, in 64 bits: few enough for a core's cache


def signed(number: int) -> int:
    """Return a number's last 64 bits, read with a sign."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def mixed(x: Tensor) -> Tensor:
    """Return SplitMix64's mix of each number, int64."""
    for shift, factor in ((30, FIRST), (27, SECOND)):
        x = (x ^ _shifted(x, shift)).mul_(signed(factor))
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)  # without the sign's copies


def normal(x: Tensor) -> Tensor:
    """Return a standard normal number for each pattern, fp64."""
    uniform = _shifted(x, 11).double().add_(0.5).mul_(2.0**-52)
    return uniform.sub_(1).erfinv_().mul_(math.sqrt(2))


class Noise(Method):
    """Dense with noise of bfloat16's size after every layer: the control of all differences."""

    name = "noise"
    summary = "runs dense with noise of one bfloat16 rounding after every layer (control)"
    sized = False
    keeps_state = True
    replaces = True
    fits_repeats = False
    noise_seed: int = option(0, "seed of the noise; --seed by default", least=0, most=SEEDS)

    _keys = torch.zeros(0, 0, dtype=torch.long)  # [B, T] of the current forward's tokens

    def begin(self, rows: Rows) -> None:
        rows.length, rows.digest = torch.zeros_like(rows.seen), torch.zeros_like(rows.seen)

    def hooks(self, session: Session) -> list[Hook]:
        layers = list(dict.fromkeys(decoder_layers(session.model)))
        noisy: list[Hook] = [(layer, "register_forward_hook", self._after(n)) for n, layer in enumerate(layers)]
        return [(layers[0], "register_forward_pre_hook", lambda *_: self._follow(session)), *noisy]

    def _follow(self, session: Session) -> None:
        """Give each token of a forward its key, of all tokens up to it."""
        rows, tokens, real, device = session.rows, session.tokens, session.real, session.tokens.device
        assert rows is not None
        if tokens.is_floating_point():
            raise UserError("noise follows tokens, and this forward has embeddings", "call the model with input_ids")
        again = real & ~session.valid  # the last tokens that the sequence has
        place = (rows.length.to(device) - again.sum(1))[:, None] + real.long().cumsum(1) - 1
        each = mixed(mixed(tokens) + place * signed(STEPS[0])) * real
        before = rows.digest.to(device) - (each * again).sum(1)
        self._keys = mixed(before[:, None] + each.cumsum(1) + self.noise_seed)
        rows.length, rows.digest = rows.length + session.valid.sum(1), before + each.sum(1)

    def _after(self, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: object, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            noisy = self.noisy(x.view(*self._keys.shape, -1), layer).view(x.shape)
            return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

        return hook

    def noisy(self, x: Tensor, layer: int) -> Tensor:
        """Return a layer's output with its noise. x: [B, T, D]."""
        elements = torch.arange(x.shape[-1], device=x.device) * signed(STEPS[2])
        wide, pieces = torch.promote_types(x.dtype, torch.float32), []
        for keys, part in zip(*(t.split(max(1, PIECE // x[:, 0].numel()), 1) for t in (self._keys, x)), strict=True):
            of_layer = mixed(keys.to(x.device) + signed(layer * STEPS[1]))
            noise = normal(mixed(of_layer[..., None] + elements))
            pieces.append((part.to(wide) * (1 + STEP * noise).to(wide)).to(x.dtype))
        return torch.cat(pieces, 1)
