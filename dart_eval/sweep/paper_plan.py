"""The time that a paper's runs would take on a GPU, from shapes of models and sizes of tasks: no data, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dart_eval.results.writers import Table
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.paper import PaperSpec
from dart_eval.sweep.plan import methods_of
from dart_eval.sweep.values import pairs
from dart_eval.util.errors import UserError
from dart_eval.util.text import LENGTHS, Json

SHAPES = {"8B": "llama-3.1-8b", "3B": "llama-3.2-3b"}
FLOPS, BANDWIDTH = 989e12, 3.35e12  # H100 SXM, dense bfloat16 and HBM3, by its data sheet
SHARE = 0.3  # of these that a step reaches; guessed, since nothing has been timed on a GPU
ROWS = 16  # texts that are generated together
NOTE = (
    "GPU hours of one H100 for the shapes of Llama-3.1-8B and Llama-3.2-3B, bfloat16. Each cell counts once, in the "
    "first table that needs it. Prompts: {share:.0f} % of {flops:.0f} TFLOPS. New tokens, {rows} texts at a time: "
    "{share:.0f} % of {bandwidth:.2f} TB/s, at full length. These shares are guesses: nothing has been timed on a GPU. "
    "--limit scales it."
)


@dataclass(frozen=True)
class Work:
    """Tokens to compute: of prompts and given answers, and steps of generation by all texts together."""

    tokens: float = 0.0
    generated: float = 0.0

    def seconds(self, weights: float, weight_bytes: float) -> float:
        """Return the time for a model of so many weights and bytes."""
        step = max(weight_bytes / BANDWIDTH, ROWS * 2 * weights / FLOPS)
        return (self.tokens * 2 * weights / FLOPS + self.generated / ROWS * step) / SHARE


def hours(spec: PaperSpec) -> Table:
    """Return the GPU hours of each table of a paper.

    Raises:
        UserError: the file gives no sizes of a task.
    """
    from dart_eval.layers.find import describe
    from dart_eval.layers.shape import shape_of
    from dart_eval.models.shapes import without_weights

    models = []
    for name in SHAPES.values():
        model = without_weights(name)
        shape = shape_of(model, describe(model))
        models.append((shape.ffn_weights + shape.other_weights + shape.head_weights, shape.weight_bytes))
    seen: set[tuple[object, ...]] = set()
    body, sums = [], [0.0] * (len(models) + 2)
    for layout, configs in spec.sweeps.items():
        works = [w for config in configs for w in _works(config, spec.sizes, seen)]
        tokens, texts = sum(w.tokens for w in works), sum(w.generated for w in works)
        times = [sum(w.seconds(*model) for w in works) / 3600 for model in models]
        sums = [a + b for a, b in zip(sums, (tokens, texts, *times), strict=True)]
        body.append([layout, str(len(works)), *_texts(tokens, texts, times)])
    body.append(["all", str(len(seen)), *_texts(sums[0], sums[1], sums[2:])])
    note = NOTE.format(share=100 * SHARE, flops=FLOPS / 1e12, rows=ROWS, bandwidth=BANDWIDTH / 1e12)
    heads = ["table", "cells", "prompt tokens", "new tokens", *(f"{name} hours" for name in SHAPES)]
    return Table("Plan", heads, body, note, rules=frozenset({len(body) - 1}))


def _texts(tokens: float, generated: float, times: Sequence[float]) -> list[str]:
    return [f"{tokens / 1e6:.1f} M", f"{generated / 1e6:.1f} M", *(f"{t:.1f}" for t in times)]


def _works(config: RunConfig, sizes: Mapping[str, Json], seen: set[tuple[object, ...]]) -> list[Work]:
    """Return the work of each cell of a sweep that is not yet among the seen ones."""
    made = []
    for task in config.tasks:
        if task not in sizes:
            raise UserError(f"the paper's file gives no size of task {task}", "add it under `sizes`")
        for method in methods_of(config):
            scope = config.scope if method.prunes else None
            for sparsity in config.sparsity if method.sized else (0.0,):
                settings = (config.num_fewshot, config.limit, config.max_length, config.gen_kwargs, config.cue)
                asked = (config.model, config.chat_template, *settings)
                cell = (task, method.spec, sparsity, config.ffn_bits, scope, *asked)
                if cell not in seen:
                    seen.add(cell)
                    made.append(_work(config, sizes[task]))
    return made


def _work(config: RunConfig, size: Json) -> Work:
    items, limit = float(size["items"]), config.limit
    if limit is not None:
        items = min(items, limit) if limit >= 1 else items * limit
    items *= size.get("members", 1)
    told = pairs("gen_kwargs", config.gen_kwargs or "")
    asked = [told[name] for name in LENGTHS if told.get(name) is not None]
    new = int((asked or [size["new"]])[0]) if "new" in size else 0
    prompt = int(size["prompt"])
    if config.max_length is not None:
        prompt = min(prompt, config.max_length - new)
    return Work(items * (prompt + size.get("answers", 0) * size.get("answer", 0)), items * new)
