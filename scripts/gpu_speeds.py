"""The speeds in `gpu_check.py`: of a card, of one FFN, of a model; each beside what the bytes allow.

A speed-up is over the untouched weights. The most that the bytes allow is 1 / read of one FFN, and the ceiling of
`bench decode` of a model. `rate` is bytes read a second, which the table holds against the card's own (`rate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_graded import ffn_of, in_graph
from gpu_models import SPARSITY, Skip, large, seconds
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

from dart_eval.bench import decode, packed
from dart_eval.kernels import gather, products
from dart_eval.kernels.image_kernels import CopyCodes
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.registry import make
from dart_eval.util.bits import OWN_BITS, Rounding
from dart_eval.weights.rounding import rounded

GOAL = 1.9  # times the compiled dense model, at 70 %
LAYERS = 3  # FFNs that take turns, so that no weights are found in the card's cache
# where -> the mode of torch.compile, and why tiny shapes do without it
MODES: dict[str, tuple[str | None, str]] = {
    "eager": (None, ""),
    "compiled": ("default", "a compiler's times mean nothing on tiny shapes; `compile` has traced the model"),
    "graphs": ("reduce-overhead", "CUDA graphs need a CUDA GPU"),
}
Product = Callable[[Tensor], Tensor]


def rate(dry: bool) -> dict[str, Any]:
    """Bytes a second that the card reads (a sum) and copies, the best of some rounds."""
    size = 2**16 if dry else 2**30
    first = torch.ones(size // 4, device="cpu" if dry else "cuda")
    second, turns = torch.empty_like(first), 1 if dry else 20
    runs: tuple[Callable[[], object], ...] = first.sum, lambda: second.copy_(first)
    least = [min(seconds(run, first.device, turns) for _ in range(5)) for run in runs]
    reads, copies = size / least[0], 2 * size / least[1]
    said = f"reads {reads / 1e9:.0f} GB/s, copies {copies / 1e9:.0f} GB/s"
    return {"reads": reads, "copies": copies, "said": said}


# -- one FFN -------------------------------------------------------------------------------------------------------


def ffn(dry: bool) -> dict[str, Any]:
    """One token through FFNs of Llama 3.1 8B's shape in a CUDA graph: kept rows, dart-plus, rounded weights."""
    size, width = (160, 128) if dry else (14336, 4096)
    device, whole = torch.device("cpu" if dry else "cuda"), 6 * size * width
    shapes = (size, width), (size, width), (width, size)
    layers = [[torch.randn(*s, device=device).mul_(s[1] ** -0.5).bfloat16() for s in shapes] for _ in range(LAYERS)]
    x, absent = torch.randn(1, width, device=device).bfloat16(), {}
    dense = _timed([_by(_plain, layer) for layer in layers], x)
    rows = [_row("dense", "one FFN", 1.0, 1.0, 1.0, whole / dense)]
    for what, make_one in _variants(32 if dry else 128).items():
        try:
            made, read = zip(*(make_one(layer) for layer in layers), strict=True)
            took = _timed(made, x)
        except Skip as reason:
            absent[what] = str(reason)
            continue
        rows.append(_row(what, "one FFN", read[0] / whole, dense / took, whole / read[0], read[0] / took))
    said = ", ".join(f"{r['what']} {r['speedup']:.2f}x of {r['ceiling']:.2f}x" for r in rows[1:])
    return {"speeds": rows, "absent": absent, "microseconds": 1e6 * dense, "said": said}


def _timed(layers: Sequence[Product], x: Tensor) -> float:
    """Seconds of a layer, the layers in turn."""

    def run() -> Tensor:
        return [layer(x) for layer in layers][-1]

    return (seconds(run, x.device, 1) if x.device.type == "cpu" else 1e-6 * in_graph(run)[1]) / len(layers)


def _plain(weight: Tensor) -> Product:
    return lambda x: linear(x, weight)


def _by(product: Callable[[Any], Product], matrices: Sequence[Any]) -> Product:
    """An FFN of three matrices, each in a product of its own."""
    gate, up, down = map(product, matrices)
    return lambda x: down(silu(gate(x)) * up(x))


def _variants(group: int) -> dict[str, Callable[[Sequence[Tensor]], tuple[Product, float]]]:
    """What is timed: it makes of gate, up and down what multiplies and its bytes, or skips. group: of 4-bit weights."""
    return {
        "griffin 70 %": _griffin, "dart-plus 70 %": _dart_plus,
        f"4:{group}, torch": partial(_by_torch, Rounding(4, group)), "8:row, torch": partial(_by_torch, Rounding(8, 0)),
        "4:128, Triton": _by_triton,
    }  # fmt: skip


def _griffin(weights: Sequence[Tensor]) -> tuple[Product, float]:
    gate, up, down = weights
    kept = round((1 - SPARSITY) * len(gate))
    rows = [gate[:kept].clone(), up[:kept].clone(), down[:, :kept].contiguous()]
    return _by(_plain, rows), sum(w.nbytes for w in rows)


def _dart_plus(weights: Sequence[Tensor]) -> tuple[Product, float]:
    _need(gather.missing(weights[0].device))
    held = [rounded(w, Rounding(6, 128)) for w in weights]
    values, seen = [p.values.float() for p in held], [p.decoded(torch.float32, 4) for p in held]
    made = ffn_of(held, values, seen, sum(w.nbytes for w in weights))[0]
    return made, made.bytes_read


def _by_torch(rounding: Rounding, weights: Sequence[Tensor]) -> tuple[Product, float]:
    for w in weights:
        _need(products.lacking(rounding, w.shape[1], w.device, w.dtype))
    held = [rounded(w, rounding) for w in weights]
    return _by(lambda one: products.product(one, None, torch.bfloat16), held), _bytes(rounding, weights)


def _by_triton(weights: Sequence[Tensor]) -> tuple[Product, float]:
    _need(gather.missing(weights[0].device))
    rounding = Rounding(4, 128)
    codes = [CopyCodes.of(rounded(w, rounding)) for w in weights]
    return _by(lambda one: lambda x: one.times(x[0]).bfloat16()[None], codes), _bytes(rounding, weights)


def _need(lacking: str | None) -> None:
    if lacking:
        raise Skip(lacking)


def _bytes(rounding: Rounding, weights: Sequence[Tensor]) -> float:
    return sum(w.nbytes * rounding.stored(w.shape[1]).total / OWN_BITS for w in weights)


def _row(what: str, where: str, read: float, speedup: float, ceiling: float, rate: float) -> dict[str, Any]:
    """Of the table of speeds."""
    numbers = {"read": read, "speedup": speedup, "ceiling": ceiling, "share": speedup / ceiling, "rate": rate}
    return {"what": what, "where": where, **numbers}


# -- a model -------------------------------------------------------------------------------------------------------


def _of_model(what: str, where: str, model: PreTrainedModel, row: dict[str, Any]) -> dict[str, Any]:
    """A row of `bench decode` as one of the table of speeds."""
    shape = shape_of(model, find_ffns(model))
    step = 2 * (shape.ffn_weights + shape.other_weights + shape.head_weights)
    rate = step / row["ceiling"] * row["tokens_per_second"]
    read = row["weights_read"] if "weights_read" in row else row["read"]
    return {**_row(what, where, read, row["speedup"], row["ceiling"], rate), "control": row["control"]}


def _mode(dry: bool, where: str) -> str | None:
    mode, reason = MODES[where]
    if dry:
        _need(reason)
    return mode


def decoding(dry: bool, where: str) -> dict[str, Any]:
    """`bench` of decoding at 70 %: the methods one after the other; compiled, as dense is then too, griffin alone."""
    compiled, methods = _mode(dry, where), ["griffin"]
    if compiled is None:
        lacking = gather.missing(torch.device("cpu" if dry else "cuda"))
        methods += ["dart", "dart-choice", *([] if lacking else ["dart-plus"])]
    # Codes, the kernel's own and decoded values of dart-plus stay beside the model and its twin.
    model, about = large(dry, copies=3.4 if "dart-plus" in methods else 2.0)
    prompt, steps, rounds = (8, 1, 1) if dry else (128, 30, 2)
    size: Any = {"prompt_tokens": prompt, "steps": steps, "rounds": rounds, "compiled": compiled}
    rows = [decode.row(decode.measure(model, make(name), SPARSITY, **size)) for name in methods]
    speeds = [_of_model(f"{r['method']} 70 %", where, model, r) for r in rows]
    said = ", ".join(f"{r['method']} {r['speedup']:.2f}x" for r in rows)
    said += f"; dense {rows[0]['control']:.2f}x itself, {rows[0]['dense_tokens_per_second']:.0f} tokens/s"
    if compiled is not None:
        best = max(row["speedup"] for row in rows)
        about |= {"goal": GOAL, "goal_met": best >= GOAL}
        said += f"; goal {GOAL}x: {'met' if best >= GOAL else 'missed'}"
    return {**about, "rows": rows, "speeds": speeds, "said": said}


def rounding_speeds(dry: bool, where: str) -> dict[str, Any]:
    """`bench` of dense on rounded weights, by torch's packed products."""
    compiled = _mode(dry, where)
    model, about = large(dry, copies=2.8)
    prompt, steps, rounds = (8, 2, 1) if dry else (128, 30, 2)
    speeds, absent = [], {}
    for one in (Rounding(4, 32 if dry else 128), Rounding(8, 0)):
        if reason := packed.lacking(model, one):
            absent[one.text] = reason
            continue
        found = packed.measure(model, one, prompt_tokens=prompt, steps=steps, rounds=rounds, compiled=compiled)
        speeds.append(_of_model(f"dense on {one.text} bits", where, model, decode.row(found)))
    if not speeds:
        raise Skip("; ".join(absent.values()))
    said = ", ".join(f"{r['what']} {r['speedup']:.2f}x of {r['ceiling']:.2f}x" for r in speeds)
    return {**about, "speeds": speeds, "absent": absent, "said": said}


decode_eager, decode_compiled, decode_graph = (partial(decoding, where=where) for where in MODES)
rounding, rounding_graph = (partial(rounding_speeds, where=where) for where in ("eager", "graphs"))
