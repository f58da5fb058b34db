"""The state and the extra computation of a method, on the shapes of a model without its weights.

The state is the real one: allocated, fed with random activations of the right shapes, and measured. FLOPs are counted
from the shapes (`cost`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from dart_eval.bench import shapes
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import describe
from dart_eval.layers.shape import shape_of
from dart_eval.pruning import cost
from dart_eval.pruning.calibration import Calibration, Moments
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.dart import Dart
from dart_eval.pruning.rows import Rows, nbytes
from dart_eval.results.metrics import asked
from dart_eval.results.show import Table
from dart_eval.util.errors import UserError

CHUNK = 64  # prompt tokens fed at a time


class Overhead(NamedTuple):
    """The overhead of one method at one sparsity on one shape.

    Attributes:
        state_bytes: prompt length in tokens -> bytes that each sequence adds.
        parts: of these the bytes by purpose, at the longest prompt.
        shared_bytes: of masks and statistics that all sequences share.
        decode_share: FLOPs per decoded token (the detector, and each token's choice) over those of a dense token.
        scoring_share: FLOPs per prompt token (scores, sensitivity, detector) over those of a dense token.
        remask_tokens: FLOPs of one re-mask of all layers, in dense tokens.
        remask_read: FFN weights that one re-mask reads / those of a dense token (see `cost.Overhead`).
    """

    method: str
    shape: str
    sparsity: float
    state_bytes: dict[int, int]
    parts: dict[str, int]
    shared_bytes: int
    decode_share: float
    scoring_share: float
    remask_tokens: float
    remask_read: float


def measure(
    method: Method, shape: str, sparsity: float, prompts: tuple[int, ...] = (128, 1024), context: int = 1024
) -> Overhead:
    """Measure the state after prompts of these lengths, and count FLOPs at a context of `context` tokens.

    Raises:
        UserError: unknown shape, or a method that does not prune.
    """
    if not method.prunes:
        raise UserError(f"{method.name} keeps and computes nothing", "choose a method that prunes")
    model = shapes.without_weights(shape)
    ffns = describe(model)
    sizes = shape_of(model, ffns)
    dense = sizes.decode(context + 1)
    fitted = copy.copy(method)
    fitted.fit(ffns, sparsity if method.sized else 0.0, Shapes(ffns))
    state: dict[int, int] = {}
    parts: dict[str, int] = {}
    for length in sorted(prompts):
        parts = _state(fitted, ffns, length)
        state[length] = sum(parts.values())
    added = cost.overhead(method, sizes, context, 1 - sparsity)
    return Overhead(
        method.spec, shape, sparsity, state, parts, fitted.nbytes(), added.decode_step / dense,
        added.prefill / context / dense, added.remask / dense, added.remask_read,
    )  # fmt: skip


@torch.no_grad()
def _state(fitted: Method, ffns: list[FFN], tokens: int) -> dict[str, int]:
    """Return the bytes of a sequence's state by part, after a prompt of random activations."""
    rows = Rows(1, ffns, torch.device("cpu"))
    fitted.begin(rows)
    observes = type(fitted).observe is not Method.observe
    watch, change = getattr(rows, "watch", None), getattr(rows, "change", None)
    width, skipped = ffns[0].width, int(isinstance(fitted, Dart) and fitted.remask_skip_first)
    for start in range(0, tokens, CHUNK):
        n = min(CHUNK, tokens - start)
        valid = torch.ones(1, n, dtype=torch.bool)
        stream = torch.randn(1, n, width, dtype=torch.bfloat16)
        h = torch.randn(1, n, ffns[0].size, dtype=torch.bfloat16)
        for ffn in ffns:
            if watch is not None and watch.ring is not None:
                watch.ring.write(ffn.layer, stream, valid)
            if observes:
                rows.sums[ffn.layer] = fitted.add(rows.sums[ffn.layer], ffn, h, valid)
            if change is not None:
                change.observe(ffn.layer, stream, stream.flip(-1), valid)
        if watch is not None and watch.drift is not None:
            watch.drift.observe(stream, valid & (torch.arange(start, start + n) >= skipped))
        rows.seen = rows.seen + n
        fitted.finish(rows, valid)
    parts = {
        "scores": nbytes(rows.sums),
        "masks": nbytes(rows.mask),
        "recent inputs": nbytes(getattr(watch, "ring", None)),
        "detector": nbytes(getattr(watch, "drift", None)),
    }
    return {**parts, "other": rows.nbytes() - sum(parts.values())}


def table(results: list[Overhead]) -> Table:
    """Return the state and the work of methods, for people."""
    body = []
    for f in results:
        sizes = {f"{n} tokens": size for n, size in f.state_bytes.items()} | f.parts | {"shared": f.shared_bytes}
        remask = [f"{x:.2f}" if x else "-" for x in (f.remask_tokens, f.remask_read)]
        work = [f"{100 * share:.4f} %" for share in (f.decode_share, f.scoring_share)]
        body.append([f.method, *(f"{size / 10**6:.2f}" for size in sizes.values()), *work, *remask])
    heads = ["method", *sizes, "decoded token", "prompt token", "re-mask", "re-mask reads"]
    note = (
        f"Shape {results[0].shape}, asked read {asked(results[0].sparsity)}; megabytes (10^6 bytes) of a sequence's "
        "state. docs/concepts.md explains the columns."
    )
    return Table("Overhead", heads, body, [note], data=pd.DataFrame(results, dtype=object))


class Shapes(Calibration):
    """A calibration without numbers: factors of the right shape, for a model without its weights."""

    def __init__(self, ffns: list[FFN]) -> None:
        self._ffns = ffns

    @property
    def ffns(self) -> list[FFN]:
        return self._ffns

    def sums(self, name: str, observe: Any) -> list[Tensor]:
        return [torch.ones(f.size) for f in self.ffns]

    def moments(self) -> list[Moments]:
        return [Moments(*(torch.zeros(f.size) for _ in range(3))) for f in self.ffns]

    def visit(self, see: Any) -> None:
        """There is no text."""

    def once(self, name: str, measure: Callable[[], list[Tensor]]) -> list[Tensor]:
        return measure()
