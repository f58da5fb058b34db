"""The work that a method adds, in FLOPs and bytes, counted from the shapes of the loaded model (`shape.ModelShape`)."""

from __future__ import annotations

from dataclasses import dataclass

from dart_eval.layers.shape import ModelShape
from dart_eval.pruning.method import Method
from dart_eval.util.text import Json


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
