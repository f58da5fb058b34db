"""The speeds in `gpu_check.py`: of a card, of one FFN, of a model; each beside what the bytes allow.

A speed-up is over the untouched weights. The most that the bytes allow is 1 / read of one FFN, and the ceiling of
`bench decode` of a model. `rate` is bytes read a second, which the table holds against the card's own (`rate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_models import SPARSITY, Skip, large, seconds
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

from dart_eval.bench import decode
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.registry import make

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
    """One token through FFNs of Llama 3.1 8B's shape in a CUDA graph: dense, and griffin's rows at 70 %."""
    size, width = (160, 128) if dry else (14336, 4096)
    device, whole = torch.device("cpu" if dry else "cuda"), 6 * size * width
    shapes = (size, width), (size, width), (width, size)
    layers = [[torch.randn(*s, device=device).mul_(s[1] ** -0.5).bfloat16() for s in shapes] for _ in range(LAYERS)]
    x = torch.randn(1, width, device=device).bfloat16()
    dense = _timed([_by(_plain, layer) for layer in layers], x)
    rows = [_row("dense", "one FFN", 1.0, 1.0, 1.0, whole / dense)]
    made, read = zip(*map(_griffin, layers), strict=True)
    took = _timed(made, x)
    rows.append(_row("griffin 70 %", "one FFN", read[0] / whole, dense / took, whole / read[0], read[0] / took))
    said = ", ".join(f"{r['what']} {r['speedup']:.2f}x of {r['ceiling']:.2f}x" for r in rows[1:])
    return {"speeds": rows, "microseconds": 1e6 * dense, "said": said}


def _timed(layers: Sequence[Product], x: Tensor) -> float:
    """Seconds of a layer, the layers in turn."""

    def run() -> Tensor:
        return [layer(x) for layer in layers][-1]

    return (seconds(run, x.device, 1) if x.device.type == "cpu" else _in_graph(run)) / len(layers)


def _in_graph(run: Callable[[], Tensor]) -> float:
    """Seconds of a call in a CUDA graph: one among many, after one that warms up."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return seconds(graph.replay, torch.device("cuda"), 200)


def _plain(weight: Tensor) -> Product:
    return lambda x: linear(x, weight)


def _by(product: Callable[[Any], Product], matrices: Sequence[Any]) -> Product:
    """An FFN of three matrices, each in a product of its own."""
    gate, up, down = map(product, matrices)
    return lambda x: down(silu(gate(x)) * up(x))


def _griffin(weights: Sequence[Tensor]) -> tuple[Product, float]:
    gate, up, down = weights
    kept = round((1 - SPARSITY) * len(gate))
    rows = [gate[:kept].clone(), up[:kept].clone(), down[:, :kept].contiguous()]
    return _by(_plain, rows), sum(w.nbytes for w in rows)


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
    if dry and reason:
        raise Skip(reason)
    return mode


def decoding(dry: bool, where: str) -> dict[str, Any]:
    """`bench` of decoding at 70 %: the methods one after the other; compiled, as dense is then too, griffin alone."""
    compiled, methods = _mode(dry, where), ["griffin"]
    if compiled is None:
        methods.append("dart")
    model, about = large(dry, copies=2.0)
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


decode_eager, decode_compiled, decode_graph = (partial(decoding, where=where) for where in MODES)
