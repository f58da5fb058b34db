"""Methods that read fewer bytes but decode no faster, since no kernel here turns the bytes into time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dart_eval.bench import packed
from dart_eval.bench.decode import Bench, check_timeable, row
from dart_eval.bench.packed import RoundedSpeed
from dart_eval.kernels.fast import why_no_kernel
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of, stored_share
from dart_eval.pruning.method import Method
from dart_eval.pruning.session import prune
from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import served_share

BYTES_ONLY = "bytes only"  # stands in place of times
ALL_WEIGHTS = "packed products read all weights of a matrix"


@dataclass(frozen=True)
class BytesOnly:
    """The weights that one method reads at one sparsity on one model, where times cannot be measured.

    Attributes:
        weights_read: FFN bytes that a decoded token reads / the model's own; on rounded weights / those of 16 bits.
        ceiling: the speed-up that the bytes of this model would allow.
        state_bytes: of the method.
        why: the reason why no kernel turns these bytes into time.
        bits: the rounding of the FFN weights, as a user types it; None: none.
    """

    method: str
    sparsity: float
    weights_read: float
    ceiling: float
    state_bytes: int
    why: str
    bits: str | None = None

    @property
    def title(self) -> str:
        """The method, and the bits of the weights it ran on."""
        return self.method + (f" on {self.bits} bits" if self.bits else "")


def as_row(result: Any) -> dict[str, Any]:
    """Return a measurement as plain values, timed or not, with method, sparsity and read."""
    if isinstance(result, BytesOnly):  # words in place of times
        held = {name: value for name, value in dataclasses.asdict(result).items() if name != "bits" or value}
        return {**held, "times": BYTES_ONLY, "speedup": None, "control": None}
    if isinstance(result, RoundedSpeed):
        return {"method": "dense", "sparsity": 0.0, **row(result), "weights_read": result.read}
    return row(result)


def refused(model: PreTrainedModel, method: Method, sparsity: float, tokenizer: Any) -> UserError | None:
    """Return why a method cannot run on this model at this sparsity, or None if it can.

    Args:
        tokenizer: of the model, for methods that calibrate on a text; None if it has none.
    """
    ffns = find_ffns(model)
    if method.calibrates and tokenizer is None:
        return UserError("it calibrates on a text, and random weights have no tokenizer", "give a model")
    try:
        method.check(ffns, sparsity)
    except UserError as error:
        return error
    return None


@torch.no_grad()
def measure(
    model: PreTrainedModel, method: Method, sparsity: float, *, tokenizer: Any = None, prompt_tokens: int = 128,
    steps: int = 30, rounding: Rounding | None = None,
) -> BytesOnly:  # fmt: skip
    """Count the weights that one sequence of random tokens reads, by masks.

    Args:
        tokenizer: of the model, for methods that calibrate on a text.
        prompt_tokens: the length of the prompt.
        steps: tokens decoded if the weights read vary by token; else one.
        rounding: the current rounding of the FFN weights (`rounded_ffns`); None: none.

    Raises:
        UserError: the method does not prune or looks ahead.
    """
    check_timeable(method)
    ffns = find_ffns(model)
    if rounding is None:
        why = why_no_kernel(method, ffns) or "it was run by masks"
    else:
        why = packed.why_no_kernel(model, rounding) or ALL_WEIGHTS
    # As the weights lie in memory: a head that is not quantised weighs more beside FFNs that are.
    phi, bench = stored_share(model, ffns), Bench(model, model)
    own = served_share(ffns) if rounding is None else 1.0
    with prune(model, method, sparsity, tokenizer=tokenizer, execution="masked") as run:
        cache = bench.cache()
        bench.step(model, bench.tokens(prompt_tokens), cache)
        for _ in range(1 if method.exact else steps):
            bench.step(model, bench.tokens(1), cache)
        # Of the model's own bytes, as timed rows have it: its weights may have few bits already.
        read, state = run.weights_read / own, run.state_bytes
    ceiling = 1 / (1 - phi * (1 - read))
    return BytesOnly(method.spec, sparsity, read, ceiling, state, why, rounding.text if rounding else None)


def alone(model: PreTrainedModel, rounding: Rounding, why: str) -> BytesOnly:
    """Return the dense model's reads on rounded FFN weights, untimed. why: of `packed.why_no_kernel`."""
    read = packed.share(model, rounding)
    ceiling = 1 / (1 - shape_of(model, find_ffns(model)).ffn_share * (1 - read))
    return BytesOnly("dense", 0.0, read, ceiling, 0, why, rounding.text)
