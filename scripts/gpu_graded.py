"""The check of dart-plus' kernels in `gpu_check.py`: are they right, and how long do they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_models import SPARSITY, STEPS, Skip, apart, logits_of, require, seconds, small
from torch import Tensor
from torch.nn.functional import silu

from dart_eval.kernels import gather, graded_triton
from dart_eval.pruning.choices.look import Preview
from dart_eval.pruning.prune import prune
from dart_eval.pruning.registry import make
from dart_eval.pruning.session.execution import Wanted
from dart_eval.util.bits import Rounding
from dart_eval.weights.codes import Packed
from dart_eval.weights.rounding import rounded

EXECUTIONS: tuple[Wanted, ...] = ("masked", "copied")


def graded(dry: bool) -> dict[str, Any]:
    """dart-plus' kernels against float64 and in a CUDA graph, their times at 30 %, and a model against masks."""
    device = torch.device("cpu" if dry else "cuda")
    if reason := gather.missing(device):
        raise Skip(reason)
    numbers: dict[str, Any] = {}
    for size, width in ((90, 130),) if dry else ((14336, 4096), (8192, 2048), (1001, 777)):
        for rounding in (Rounding(6, 128), Rounding(8, 0)):
            numbers |= layer(size, width, rounding, device)
    model, found = small(dry, layers=2), []
    for execution in EXECUTIONS:
        with prune(model, make("dart-plus"), SPARSITY, execution=execution) as session:
            found.append(logits_of(model, steps=2 if dry else STEPS))
            kernels = {type(getattr(rows, "kernel", rows)) for rows in session.copies or ()}
    if kernels != {graded_triton.GradedFFN}:
        raise AssertionError("another kernel ran the model")
    numbers["model"] = apart(*found)
    # Rounding moves which neurons a token chooses, at the edge of what it may: they are the smallest.
    require(numbers["model"], 4e-4, "dart-plus, masked and copied, in float32")
    times = ", ".join(f"{v:.2f}x dense" for k, v in numbers.items() if k.endswith("speedup"))
    return {**numbers, "said": f"{numbers['model']:.1g} from masks; {times or 'no times (dry)'}"}


def layer(size: int, width: int, rounding: Rounding, device: torch.device) -> dict[str, Any]:
    """Of one FFN of codes at 30 % of its bytes: how far from float64, and its time in a CUDA graph beside dense."""
    draw, name = torch.Generator().manual_seed(0), f"{size}x{width} {rounding.text}"
    dense = [
        (torch.randn(*shape, generator=draw) * shape[1] ** -0.5).to(device, torch.bfloat16)
        for shape in ((size, width), (size, width), (width, size))
    ]
    packed, whole = [rounded(w, rounding) for w in dense], sum(w.nbytes for w in dense)
    values, seen = [p.values.double() for p in packed], [p.decoded(torch.float32, 4).double() for p in packed]
    ffn, doubts, columns, count = ffn_of(packed, values, seen, whole)
    x = torch.randn(1, width, generator=draw).to(device)
    out, (exact, others) = ffn(x), (index.long() for index in ffn.chosen)

    shown, expected = Preview((lambda: seen[0], lambda: seen[1]), (None, None), tuple(doubts), silu).look(x.double())
    scores = ((expected - (1 - ffn.known) * shown.square()).clamp(min=0) * columns)[0]
    strangers = 1 - torch.isin(exact, scores.topk(count).indices).double().mean().item()
    require(strangers, 0.01, f"{name}: neurons read exactly that others should be (equal within rounding)")
    h = silu(x.double() @ values[0][exact].T) * (x.double() @ values[1][exact].T)
    written = h @ values[2][:, exact].T + shown[:, others] @ seen[2][:, others].T
    numbers = {name: apart(out.double(), written)}
    require(numbers[name], 1e-5, f"{name}: the kernels and float64 (they sum in float32)")
    if device.type == "cuda":
        x, (a, b, c) = x.bfloat16(), (w.t() for w in dense)
        ours, theirs = in_graph(lambda: ffn(x)), in_graph(lambda: (silu(x @ a) * (x @ b)) @ c)
        require(float((ours[0] - ffn(x)).abs().max()), 0.0, f"{name}: in a CUDA graph and outside")
        numbers |= {f"{name} microseconds": ours[1], f"{name} read": ffn.bytes_read / whole}
        numbers[f"{name} microseconds, no graph"] = microseconds(lambda: ffn(x))
        numbers[f"{name} speedup"] = theirs[1] / ours[1]
    return numbers


def ffn_of(
    packed: Sequence[Packed], values: Sequence[Tensor], seen: Sequence[Tensor], whole: int
) -> tuple[graded_triton.GradedFFN, list[Tensor], Tensor, int]:
    """An FFN that reads 30 % of its bytes; the doubts, the norms of columns, and the neurons it reads exactly.

    packed: gate, up and down. values: theirs. seen: what their first four bits say. whole: bytes of dense.
    """
    gate, up, down = packed
    doubts = [(v - s).square().mean(1).sqrt() for v, s in zip(values[:2], seen[:2], strict=True)]
    columns = values[2].square().sum(0)
    ffn = graded_triton.GradedFFN(gate, up, down, doubts, columns, 1, 1)
    one = ffn.bytes_read
    ffn.grade(0, 0)
    count = min(len(columns) // 2, max(1, int(((1 - SPARSITY) * whole - ffn.bytes_read) / (one - ffn.bytes_read))))
    ffn.grade(count, count)
    return ffn, doubts, columns, count


def in_graph(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a CUDA graph of a call gives, and its microseconds: of small layers, with weights in the card's cache."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return out, microseconds(graph.replay)


def microseconds(run: Callable[[], object]) -> float:
    """Of one call among many, after one that warms up."""
    run()
    return 1e6 * seconds(run, torch.device("cuda"), 200)
