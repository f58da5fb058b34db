"""`dart-eval bench`: one verb for each thing that can be measured."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dart_eval.cli import options
from dart_eval.cli.run import hush
from dart_eval.cli.view import output as show
from dart_eval.cli.view import print_note, say
from dart_eval.pruning.registry import make
from dart_eval.sweep.plan import methods_of
from dart_eval.util.bits import parse
from dart_eval.util.errors import UserError
from dart_eval.util.quiet import silence

if TYPE_CHECKING:
    from pathlib import Path

    from dart_eval.bench.bytes_only import BytesOnly
    from dart_eval.bench.decode import DecodeSpeed
    from dart_eval.bench.packed import RoundedSpeed
    from dart_eval.bench.subject import Setting, Subject
    from dart_eval.pruning.method import Method
    from dart_eval.sweep.options import RunConfig

T = TypeVar("T", bound="DecodeSpeed | RoundedSpeed | BytesOnly")


app = typer.Typer(help="Measure the decode speed of methods, or their extra memory and FLOPs.", no_args_is_help=True)


def _methods(asked: RunConfig) -> list[Method]:
    """The methods to measure.

    Raises:
        UserError: a name or a parameter is wrong, or there are none.
    """
    if methods := methods_of(asked):
        return methods
    raise UserError("no method given", "add one, for example --method dart,griffin")


@app.command("decode")
@options.takes("model", "dtype", "device", "trust_remote_code")
def decode(
    method: options.Measured = None,
    sparsity: options.OneSparsity = 0.7,
    ffn_bits: options.Packed = None,
    shape: Annotated[str | None, options.SHAPE] = None,
    layers: options.Layers = None,
    prompt: options.PromptTokens = 128,
    steps: options.Steps = 30,
    rounds: options.Rounds = 3,
    output: options.Kept = None,
    format: options.Format = "table",
    **given: Any,
) -> None:
    """Measure the decode speed of methods on one sequence, relative to dense.

    Dense, dense once more (a control) and the method take turns, token by
    token. Each speed-up is a median with quartiles, next to its ceiling: the
    largest speed-up that the model's bytes allow.

    \b
    [bold]Examples[/bold]
    dart-eval bench decode --method griffin,dart
    dart-eval bench decode --method griffin --sparsity 0.5 --output out
    dart-eval bench decode --shape llama-3.2-1b --layers 4 --ffn-bits 4:128
    """
    hush(False)
    asked = options.chosen(method=method or options.METHODS_MEASURED, sparsity=sparsity, ffn_bits=ffn_bits, **given)
    methods = _methods(asked)
    _check_output(output)
    silence()  # it imports torch, and all before it does not
    from dart_eval.bench import decode as bench
    from dart_eval.bench import tables
    from dart_eval.bench.bytes_only import as_row
    from dart_eval.bench.subject import Setting, subject
    from dart_eval.layers.find import find_ffns
    from dart_eval.weights.rounding import refuse_fixed

    for one in methods:
        bench.check_timeable(one)
    timed = subject(asked, shape, layers, print_note)
    fewer = "give a shorter --prompt, or fewer --steps"
    bench.check_length(timed.model, prompt + steps, "prompt and steps", fewer)
    setting = Setting(prompt, steps, rounds)
    if any(map(parse, asked.ffn_bits)):
        refuse_fixed(find_ffns(timed.model))
    methods = _possible(timed, methods, sparsity)
    found, rounded, files = _measured(timed, setting, methods, sparsity, asked.ffn_bits, output)
    where = f"{timed.title}, {timed.hardware}"
    show([as_row(one) for one in (*found, *rounded)], tables.decoding(found, rounded, where), format)
    for file in files:
        say(f"wrote {file}", err=format != "table")


def _check_output(output: str | None) -> None:
    """Refuse a folder that cannot be written, before a model is loaded."""
    from dart_eval.results import speeds

    if output is not None:
        speeds.check_folder(output)


def _possible(subject: Subject, methods: list[Method], sparsity: float, where: str = "") -> list[Method]:
    """The methods that can run on this model at this sparsity; the others are named in notes.

    Args:
        where: what is said of the weights, if they are rounded; then there may be none.

    Raises:
        UserError: there are none.
    """
    refused = {one.spec: subject.refused(one, sparsity) for one in methods}
    if all(refused.values()) and not where:
        title, reason = next(iter(refused.items()))
        assert reason is not None
        raise UserError(f"{title} at sparsity {sparsity:g}: {reason.problem}", reason.remedy)
    for title, reason in refused.items():
        if reason is not None:
            print_note(f"{title}{where} at sparsity {sparsity:g} is left out: {reason}")
    return [one for one in methods if refused[one.spec] is None]


def _measured(
    subject: Subject, setting: Setting, methods: list[Method], sparsity: float, ffn_bits: tuple[str, ...],
    output: str | None,
) -> tuple[list[DecodeSpeed | BytesOnly], list[RoundedSpeed | BytesOnly], list[Path]]:  # fmt: skip
    """The speeds of methods, those on rounded weights, and the files they are kept in, each as soon as it is there."""
    from dart_eval.results import speeds
    from dart_eval.weights.rounding import Rounded

    files: list[Path] = []

    def keep(one: T, method: Method) -> T:
        if output is not None:
            files.append(speeds.keep(output, subject.speed(one, method, setting)))
        return one

    found = [keep(subject.measure(one, sparsity, setting), one) for one in methods]
    rounded: list[RoundedSpeed | BytesOnly] = []
    for bits in filter(None, map(parse, ffn_bits)):
        rounded.append(keep(subject.measure_rounded(bits, setting), make("dense")))
        with Rounded(subject.model, bits).in_place():
            for one in _possible(subject, methods, sparsity, f" on {bits.text} bits"):
                rounded.append(keep(subject.count(one, sparsity, setting, bits), one))
    return found, rounded, files


@app.command("overhead")
def overhead(
    method: options.Measured = None,
    sparsity: options.OneSparsity = 0.7,
    shape: Annotated[str, options.SHAPE] = "llama-3.1-8b",
    format: options.Format = "table",
) -> None:
    """Count the extra memory and FLOPs of methods on the shape of a large model, without its weights.

    The state of a method is allocated and fed random activations, so its
    bytes are real. FLOPs are counted from the shapes.

    \b
    [bold]Examples[/bold]
    dart-eval bench overhead
    dart-eval bench overhead --shape qwen2.5-1.5b --method dart,grinqh
    dart-eval bench overhead --sparsity 0.5 --format json
    """
    hush(False)
    methods = _methods(options.chosen(method=method or options.METHODS_MEASURED, sparsity=sparsity))
    silence()  # it imports torch, and all before it does not
    from dart_eval.bench import tables
    from dart_eval.bench.overhead import measure

    found = []
    for one in methods:
        print_note(f"counting {one.spec} on the shape of {shape}")
        found.append(measure(one, shape, sparsity))
    show([dataclasses.asdict(f) for f in found], [tables.state(found), tables.work(found)], format)
