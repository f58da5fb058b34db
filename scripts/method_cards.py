"""What docs/methods.md says of each method: its formula, its paper, what it needs, and its second program."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import describe, find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.models import shapes
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.session.kernels import lacking
from dart_eval.util.bits import OWN_BITS, Stored
from dart_eval.util.errors import UserError

TESTS = Path(__file__).parents[1] / "tests" / "derivations"
SHAPE = "llama-3.1-8b"
# Formula, file of tests/derivations, and the functions of it that are the method's second program.
CARDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "dense": ("h", "", ()),
    "random": ("the order of a seeded draw", "", ()),
    "magnitude": ("s_j = ||gate_j|| ||up_j||, its rows", "static", ("magnitude",)),
    "mag-sp": ("s_j = ||down_j||, its column", "static", ("mag_sp",)),
    "static": ("s_j = || (h_tj / ||h_t||)_t ||, t on a text", "static", ("static",)),
    "wanda-sp": ("s_j = mean_i |down_ij| || (h_tj)_t ||, t on a text", "wanda_sp", ("wanda_sp",)),
    "flap": ("s_j = var_t(h_tj) ||down_j||^2, standardised over its layer; all layers in one ranking", "flap",
             ("ranked",)),
    "griffin": ("s_j = || (h_tj / ||h_t||)_t ||, t in the prompt", "griffin", ("griffin",)),
    "dart": ("s_j = sum_t h_tj^2; layers by how much they change the stream; anew when the attention output drifts",
             "dart_drift", ("Detector", "dart")),
    "dart-code": ("as dart, with the settings of its public code", "dart_allocation", ("sensitivity", "pruned_shares")),
    "coreinfer": ("s_j = tokens t in which h_tj is among the largest fifth of the positive ones", "prompt_rivals",
                  ("votes",)),
    "glass": ("s_j = w rank(griffin's score on the prompt) + (1 - w) rank(on a text)", "prompt_rivals", ("ranks",)),
    "probe": ("s_j = (p_j^2 + q_j^2) / (p_j + q_j) sqrt(sum_i down_ij^4), p on the prompt, q on a text",
              "prompt_rivals", ("fused",)),
    "pop": ("a core by s_j = mean_i |down_ij| || h_j ||; of the next, those with the largest s_j of this token",
            "candidates", ("pop",)),
    "dart-plus": ("exact where a preview leaves most open, (E - P^2 + .2 P^2) ||down_j||^2; the next write P",
                  "dart_plus", ("by_hand",)),
    "dart-choice": ("|act(gate x)_j| rms_t (up x_t)_j inside a wide mask, then |h_j|", "dart_choice", ("dart_choice",)),
    "cats": ("|act(gate x)_j|", "choices", ("chosen",)),
    "m-countdown": ("|(up x)_j|", "choices", ("chosen",)),
    "preview": ("E h_j^2 by the first bits of gate and up", "", ()),
    "prox": ("|h_j| by copies of 4 bits and the largest half of x", "thresholds", ("shown",)),
    "top-p": ("the fewest j with sum |h_j| >= p sum |h|", "choices", ("fewest",)),
    "oracle-token": ("|h_j|", "choices", ("chosen",)),
    "teal": ("inputs with |x_i| > t of their layer", "entries", ("thinned",)),
    "wina": ("inputs with the largest |x_i| ||W_i||", "entries", ("thinned",)),
    "wanda": ("weights with the largest |W_ij| || (x_tj)_t || of each row", "entries", ("thinned",)),
    "rounding": ("the rounded W", "", ()),
    "fewer-experts": ("the k experts with the largest router weight", "routings", ("with_count",)),
    "drop-experts": ("experts by the mean of router weight times ||output|| on a text", "routings",
                     ("saliency_by_hand",)),
    "oracle": ("griffin's score, t being the tokens that are scored", "griffin", ("griffin",)),
}  # fmt: skip


def card(method: Pruner) -> Iterator[str]:
    """The lines of a method."""
    formula, file, functions = CARDS[method.name]
    yield f"### `{method.name}`\n"
    yield f"{method.name} {method.summary}.\n"
    yield "| | |"
    yield "| --- | --- |"
    yield f"| formula | `{formula.replace('|', chr(92) + '|')}` |"
    if method.paper:
        yield f"| paper | [arXiv {method.paper}](https://arxiv.org/abs/{method.paper}) |"
    yield f"| needs | {_needs(method)} |"
    yield f"| lowest read | {_lowest_read(method)} |"
    yield f"| kernel today | {_kernel(method)} |"
    if file:
        yield f"| derivation | [tests/derivations/test_{file}.py](../tests/derivations/test_{file}.py) |"
    yield ""
    if functions:
        yield "<details><summary>Its second program</summary>\n"
        yield "```python"
        yield "\n\n\n".join(_source(file, name) for name in functions)
        yield "```\n"
        yield "</details>\n"


def _needs(method: Pruner) -> str:
    found = []
    if method.needs_context:
        found.append("the text that is scored" if method.looks_ahead else "a prompt")
    if method.calibrates:
        found.append("a calibration text")
    if method.choice.previews and method.choice.adds:
        found.append("weights of 16 bits, or integer codes")
    if method.leaves_out == "experts":
        found.append("routed experts")
    return ", ".join(found) or "nothing"


def _lowest_read(method: Pruner) -> str:
    """On the shape of Llama 3.1 8B."""
    if not method.sized:
        return "1" if not method.prunes else "not set"
    if method.leaves_out == "experts":
        return "one expert a layer" if method.name == "fewer-experts" else "1 (it saves memory)"
    shape = shape_of(model := shapes.without_weights(SHAPE), describe(model))
    least = 0.01
    while least < 1:
        try:
            bits = Stored(OWN_BITS)
            method.check_reach(1 - least, shape.ffn_sizes, shape.width, shape.ffn_matrices, bits)
        except UserError:
            least += 0.01
        else:
            break
    return "any" if least == 0.01 else f"{least:.2f}"


def _kernel(method: Pruner) -> str:
    if not method.prunes:
        return "-"
    if method.upper_bound:
        return "no: it is an upper bound"
    reason = lacking(method, _gated())
    if reason:
        return f"none yet: {reason}"
    which = "any batch" if method.mask.fixed and not method.choice.chooses else "one sequence"
    return f"{which}, on a CPU or a GPU ([times](../results/speed.md))"


@functools.cache
def _gated() -> list[FFN]:
    """The FFNs of a small model, on a CPU."""
    sizes: Any = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return find_ffns(model.bfloat16())


def _source(file: str, name: str) -> str:
    text = (TESTS / f"test_{file}.py").read_text(encoding="utf-8")
    node = next(n for n in ast.parse(text).body if getattr(n, "name", "") == name)
    return ast.get_source_segment(text, node) or ""
