"""The cards of docs/methods.md: idea, formula, paper, needs, lowest read, faster today, and the second program."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from dart_eval.bench import shapes
from dart_eval.kernels.fast import why_no_kernel
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import describe, find_ffns
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.columns import Grinqh
from dart_eval.pruning.methods.rounding import RoundedWeights
from dart_eval.util.errors import UserError

TESTS = Path(__file__).parents[1] / "tests" / "derivations"
SHAPE = "llama-3.1-8b"
# Formula, file of tests/derivations, and the functions of it that are the method's second program.
CARDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "dense": ("y = down h", "", ()),
    "random": ("s = a seeded random order", "", ()),
    "magnitude": ("s_j = ||gate_j|| ||up_j||, rows of neuron j", "static", ("magnitude",)),
    "static": ("s_j = || (h_tj / ||h_t||)_t ||, t in a calibration text", "static", ("static",)),
    "wanda-sp": ("s_j = mean_i |down_ij| || (h_tj)_t ||, t in a calibration text", "static", ("wanda_sp",)),
    "flap": ("s_j = var_t(h_tj) ||down_j||^2, standardised per layer, one ranking over all layers", "flap",
             ("ranked",)),
    "griffin": ("s_j = || (h_tj / ||h_t||)_t ||, t in the prompt", "griffin", ("griffin",)),
    "dart": ("s_j = sum_t h_tj^2; densities by how much a layer changes the stream; re-mask when the attention output "
             "drifts from the prompt's mean", "dart_drift", ("Detector", "dart")),
    "dart-code": ("as dart, with the settings of the public code", "dart_allocation", ("sensitivity", "pruned_shares")),
    "cats": ("largest |act(gate x)_j|", "choices", ("chosen",)),
    "m-countdown": ("largest |(up x)_j|", "choices", ("chosen",)),
    "oracle-token": ("largest |h_j|", "choices", ("chosen",)),
    "teal": ("columns i with |x_i| > t, one t per layer for x (gate, up), one for h (down)", "entries", ("thinned",)),
    "wina": ("gate: columns i with the largest |x_i| ||W_i||; up and down: the largest |x_i|", "entries", ("thinned",)),
    "grinqh": ("column i in its first b_i bits, with least sum_i x_i^2 E(b_i), E one curve for all columns", "columns",
               ("raised",)),
    "decdec": ("3 bits of all columns, 7 of those with the largest |x_i|", "columns", ("raised",)),
    "graded-both": ("grinqh with fewer bits of gate and up, then 2 bits more of the neurons with the largest "
                    "E[h_j^2] - .8 h~_j^2", "both", ("Matrix",)),
    "rounding": ("W rounded, for decoded tokens", "", ()),
    "noise": ("x (1 + 2^-9 n) after every layer, n standard normal by seed, tokens so far, layer and element", "rivals",
              ("mix", "noise")),
    "larosa": ("y = (W Q) (m * Q^T x), Q the eigenvectors of the inputs of a text, m the largest |Q^T x|", "rivals",
               ("compared",)),
    "rsparse": ("y = W (m * x) + U_r S_r V_r^T ((1 - m) * x), m where |x_i| ||(V S)_i|| > t", "rivals", ("compared",)),
    "sirius": ("of k - 1 pruned tokens the first n with softmax(logits / .6)[t] >= threshold under dense, then dense's",
               "rivals", ("corrected",)),
    "oracle": ("griffin's s_j, t in the scored tokens", "griffin", ("griffin",)),
}  # fmt: skip


def card(method: Method) -> Iterator[str]:
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
    yield f"| faster today | {_faster(method)} |"
    if file:
        yield f"| derivation | [tests/derivations/test_{file}.py](../tests/derivations/test_{file}.py) |"
    yield ""
    if functions:
        yield "<details><summary>Its second program</summary>\n"
        yield "```python"
        yield "\n\n\n".join(_source(file, name) for name in functions)
        yield "```\n"
        yield "</details>\n"


def _needs(method: Method) -> str:
    found = []
    if method.needs_context:
        found.append("the text that is scored" if method.looks_ahead else "a prompt")
    if method.calibrates:
        found.append("a calibration text")
    if isinstance(method, Grinqh | RoundedWeights):
        found.append("16-bit weights")
    return ", ".join(found) or "nothing"


def _lowest_read(method: Method) -> str:
    """In per cent of the bytes, on the shape of Llama 3.1 8B."""
    if not method.prunes:
        return "100 %"
    if not method.sized:
        return "set by its options, not by a sparsity"
    ffns = describe(shapes.without_weights(SHAPE))
    least = 0.01
    while least < 1:
        try:
            method.check(ffns, 1 - least)
        except UserError:
            least += 0.01
        else:
            break
    return "any" if least == 0.01 else f"{least:.0%}".replace("%", " %")


def _faster(method: Method) -> str:
    if not method.prunes:
        return "-"
    if method.upper_bound:
        return "nowhere: it is an upper bound"
    if reason := why_no_kernel(method, _gated()):
        return f"nowhere yet: {reason}"
    which = "one sequence" if method.keeps_state or method.granularity else "any batch size"
    return f"{which} on a CPU ([times](../results/speed.md))"


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
