"""`dart-eval bench`: the benchmark of decoding, and its table."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_eval.cli.view import output, print_note
from dart_eval.errors import UserError
from dart_eval.files import check_target, write
from dart_eval.results.writers import Table

if TYPE_CHECKING:
    from dart_eval.models import ModelSpec

COMPILE = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def run(
    methods: list[Any], sparsity: float, shape: str | None, layers: int | None, spec: ModelSpec, prompt: int,
    steps: int, rounds: int, compiled: str | None, profile: Path | None, format: str,
) -> None:  # fmt: skip
    """Time every method, and print the table.

    Raises:
        UserError: a name or number is wrong.
    """
    import torch

    from dart_eval import shapes
    from dart_eval.bench import decode
    from dart_eval.models import DTYPES, choose_device, resolve

    for name, value in (("--prompt", prompt), ("--steps", steps), ("--rounds", rounds)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if profile is not None:
        check_target(profile)
    if compiled is not None and compiled not in COMPILE:
        raise UserError(f"unknown compile mode {compiled!r}", f"one of {', '.join(COMPILE)}")
    if shape is not None and spec.name is not None:
        raise UserError("--shape and --model are both given", "leave one of them out")
    if shape is None:
        if layers is not None:
            raise UserError("--layers is for a shape", "give --shape, or leave it out")
        resolved = resolve(spec)
        loaded, tokenizer = resolved.load(print_note)
        named = f"{resolved.identity.name}, {resolved.dtype}"
    else:
        if spec.dtype not in DTYPES:
            raise UserError(f"unknown dtype {spec.dtype!r}", f"one of {', '.join(DTYPES)}")
        kind: Any = torch.bfloat16 if spec.dtype == "auto" else DTYPES[spec.dtype]
        loaded, tokenizer = shapes.with_random_weights(shape, layers, kind, choose_device(spec.device)), None
        named = f"{shape} (random weights), {len(decode.find_ffns(loaded))} layers, {str(kind).removeprefix('torch.')}"
    found = [
        decode.measure(
            loaded, m, sparsity, tokenizer=tokenizer, prompt_tokens=prompt, steps=steps, rounds=rounds,
            compiled=compiled,
        )
        for m in methods
    ]  # fmt: skip
    if profile is not None:
        with tempfile.TemporaryDirectory() as folder:  # torch writes to a name; its ending says whether to pack
            made = Path(folder) / f"trace{profile.suffix}"
            decode.profile(loaded, methods[-1], sparsity, str(made), tokenizer=tokenizer, prompt_tokens=prompt)
            write(profile, made.read_bytes())
    cuda = loaded.device.type == "cuda"
    where = torch.cuda.get_device_name(loaded.device) if cuda else f"{torch.get_num_threads()} threads"
    if compiled is not None:
        where += f", torch.compile ({compiled})"
    output([decode.row(f) for f in found], table(found, f"{named}, {where}"), format)


def table(found: list[Any], where: str) -> Table:
    """Decoding speed of several methods, for people."""
    columns = [
        "method", "FFN read", "speed-up", "ceiling", "of ceiling", "control", "first token", "re-mask: masks",
        "re-mask: moves", "begin, end", "overhead", "tokens/s", "extra weights", "state MB",
    ]  # fmt: skip
    body = [
        [
            f.method,
            f"{f.weights_read:.2f}" + (f" ({f.weights_executed:.2f})" if f.weights_executed != f.weights_read else ""),
            _ratio(f.speedup, 2, "x"), f"{f.ceiling:.2f}x", f"{f.achieved_over_ceiling:.2f}", _ratio(f.control, 2, "x"),
            f"{f.first_token.median:.2f}x",
            f"{f.remask_masks_dense_steps.median:.2f}" if f.remask_masks_dense_steps else "-",
            f"{f.remask_moves_dense_steps.median:.2f}",
            f"{f.begin_dense_steps.median:.1f}, {f.end_dense_steps.median:.1f}",
            f"{100 * f.overhead.median:.1f} %", f"{f.tokens_per_second:.1f} ({f.dense_tokens_per_second:.1f})",
            f"{f.extra_weight_bytes / 10**6:.0f} MB", f"{(f.state_bytes + f.order_bytes) / 10**6:.2f}",
        ]
        for f in found
    ]  # fmt: skip
    foreign = [f.foreign_cores for f in found if f.foreign_cores is not None]
    busy = f" Other processes kept {max(foreign):.2f} cores busy at most." if foreign else ""
    note = (
        f"{where}; sparsity {found[0].sparsity:g}, one sequence, {found[0].speedup.n} steps a method. Speed-up: over "
        "dense, the median [quartiles] of neighbouring steps. Dense is a model of the same weights that prune() never "
        f"touched, so that the FFN weights are there twice ({found[0].twin_bytes / 10**6:.0f} MB that no column "
        "counts). Control: dense over dense. Ceiling: what the bytes of this model allow at the FFN weights read; in "
        "brackets stand those that are multiplied, where each token chooses neurons of its mask. Of ceiling: speed-up "
        "over ceiling. First token: the prompt with its scores, masks and the first moves of neurons, over a dense "
        "prompt. These are in dense steps: re-mask, masks: new scores and masks are made from recent tokens; re-mask, "
        "moves: a fifth of the kept neurons is moved in memory; begin and end, once per prune(): the weights are taken "
        "over, and every neuron is put back. Overhead: what the method's hooks add to a pruned step. Tokens/s: to "
        f"orient, dense in brackets. State: what the method keeps, and the neurons' order.{busy}"
    )
    return Table("Decoding", columns, body, note)


def _ratio(ratio: Any, digits: int, unit: str) -> str:
    return f"{ratio.median:.{digits}f}{unit} [{ratio.low:.{digits}f}, {ratio.high:.{digits}f}]"
