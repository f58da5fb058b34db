"""The work and the memory that a method adds, counted from the loaded model and its shapes (`shape.ModelShape`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dart_eval.kernels.cpu import packing
from dart_eval.kernels.fast import why_not_whole
from dart_eval.layers.ffn import FFN
from dart_eval.layers.shape import ModelShape
from dart_eval.pruning.method import Method
from dart_eval.util.bits import Rounding
from dart_eval.util.text import Json
from dart_eval.weights.rounding import parameter_of, served_bits


def memory(method: Method, ffns: Sequence[FFN], fast: bool, state: int, rounding: Rounding | None = None) -> int:
    """Return the bytes that lie beside the dense model while one sequence decodes with `execution="auto"`.

    They are copies of the mask's rows or a kernel's codes, codes that prompts run on with their decoded values (which
    are cached while there is room), masks and statistics that sequences share, and the state of one sequence. All are
    counted from shapes, so that a session that runs by masks, or in batches, tells the same.

    Args:
        method: fitted to a model. ffns: of that model.
        fast: whether one sequence decodes by copies or a kernel (`Fast.available`).
        state: bytes that each sequence adds.
        rounding: of the served FFN weights; None: none. Dense runs on a kernel's codes of them where there is one
            (`why_not_packed`), all else on their values.
    """
    of_method = method.nbytes() + method.weight_bytes(fast)
    if rounding is None:
        return of_method + state
    if not method.prunes and why_not_packed(ffns, rounding) is None:
        return round(served_bits(ffns, rounding) * sum(f.size * f.width * f.matrices for f in ffns) / 8)
    return of_method + state + sum(parameter_of(m).nbytes for f in ffns for m in f.projections)


def why_not_packed(ffns: Sequence[FFN], rounding: Rounding) -> str | None:
    """Return why no kernel runs dense FFNs on rounded weights, or None."""
    if any(f.routed for f in ffns):
        return "experts have no packed products here"
    reasons = (packing.why_no_kernel(rounding, width) for f in ffns for width in (f.width, f.size))
    return next(filter(None, reasons), None) or next(filter(None, map(why_not_whole, ffns)), None)


@dataclass(frozen=True)
class Overhead:
    """The work that a method adds.

    Attributes:
        prefill: FLOPs of observing the prompt's tokens. An upper bound: five operations per neuron and
            token, as token normalisation needs. Sorting takes comparisons, which are not counted.
        decode_step: FLOPs per decoded token: the detector, and the choice of neurons.
        remask: FLOPs of one re-mask. From the ring: gate and up, dense on the ring's inputs, and their observation.
            From dense tokens: their observation, and their FLOPs beyond those of a pruned token.
        remask_read: FFN weights that a re-mask reads / those of a dense token. The ring reads each weight once, for
            all of its inputs, whose experts count as different ones (at most all of a layer). Dense tokens count with
            what they read beyond a pruned token.
    """

    prefill: int
    decode_step: float
    remask: int
    remask_read: float


def overhead(method: Method, shape: ModelShape, tokens: int, weights_read: float) -> Overhead:
    """Return the work that a method adds, one FLOP per element and operation.

    Args:
        tokens: length of the prompt.
        weights_read: share of the FFN weights that a pruned token multiplies.
    """
    observing = sum(shape.ffn_sizes) * method.observe_flops
    flops, read = method.remask_cost(shape, observing, weights_read)
    prefill = tokens * (observing + method.prompt_flops(shape))
    return Overhead(round(prefill), method.step_flops(shape), flops, read)


def describe(method: Method, shape: ModelShape, context: float, weights_read: float, remasks_per_token: float) -> Json:
    """Return the costs that a record holds, in FLOPs.

    `overhead_decode_step` includes the observed re-masks, spread over the tokens. `remask_reads` is what these
    re-masks read, per decoded token, over the FFN weights of a dense token.

    Args:
        context: mean length of the contexts.
        weights_read: share of the FFN weights that a pruned token multiplied.
        remasks_per_token: observed re-masks per decoded token.
    """
    tokens = max(1, round(context))
    added = overhead(method, shape, tokens, weights_read)
    dense = shape.decode(tokens + 1)
    per_token = added.decode_step + added.remask * remasks_per_token
    return {
        "context_tokens": tokens,
        "prefill": shape.prefill(tokens),
        "decode_step_dense": dense,
        "decode_step_pruned": shape.decode(tokens + 1, weights_read),
        "overhead_prefill": added.prefill,
        "overhead_decode_step": per_token,
        "overhead_share": per_token / dense,
        "remask": added.remask,
        "remask_reads": added.remask_read * remasks_per_token,
        "ffn_share": shape.ffn_share,
    }
