"""`dart-eval bench decode`: how fast methods decode, as a table and as files beside results."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dart_eval.cli import bench_options, complete, options
from dart_eval.cli.run import hush, quieten
from dart_eval.cli.view import output as show
from dart_eval.cli.view import print_note, say
from dart_eval.errors import UserError, nearest
from dart_eval.files import check_target, write
from dart_eval.results.format import sparsity as said
from dart_eval.results.writers import Table

if TYPE_CHECKING:
    from dart_eval.bench.decode import DecodeSpeed
    from dart_eval.bench.kept import Speed
    from dart_eval.bench.ratio import Ratio
    from dart_eval.models import ModelSpec
    from dart_eval.pruning.method import Pruner

COMPILE = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
FIELDS = ("method", "sparsity", "weights_read", "speedup", "control", "ceiling")  # that a kept speed has by itself

Shape = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Time random weights of this shape in place of a model: llama-3.1-8b, llama-3.2-1b or qwen2.5-1.5b.",
        rich_help_panel=options.MODEL,
        autocompletion=complete.words(bench_options.SHAPES),
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(
        metavar="N", help=r"Give the shape so many layers.  \[default: its own]", rich_help_panel=options.MODEL
    ),
]
Prompt = Annotated[
    int,
    typer.Option(
        metavar="N", help="Begin with a prompt of so many random tokens.", rich_help_panel=bench_options.TIMING
    ),
]
Steps = Annotated[
    int, typer.Option(metavar="N", help="Decode so many tokens in a round.", rich_help_panel=bench_options.TIMING)
]
Compile = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="Decode through torch.compile in this mode, the dense model too: default, reduce-overhead (CUDA graphs), "
        "max-autotune or max-autotune-no-cudagraphs.",
        rich_help_panel=bench_options.TIMING,
        autocompletion=complete.words(COMPILE),
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write a trace of torch's profiler over three pruned steps of the last method.",
        rich_help_panel=options.OUTPUT,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Keep what was measured beside the results of `dart-eval run` in this folder, one file for each method.",
        rich_help_panel=options.OUTPUT,
    ),
]


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        model: the loaded model.
        tokenizer: its tokenizer; None where the weights are random.
        identity: what tells the model from others, as in the inputs of a cell.
        dtype: of its weights.
        title: the model, for people.
    """

    model: Any
    tokenizer: Any
    identity: dict[str, Any]
    dtype: str
    title: str

    @property
    def hardware(self) -> str:
        """The GPU's name, or the number of threads."""
        import torch

        cuda = self.model.device.type == "cuda"
        threads = torch.get_num_threads()
        return torch.cuda.get_device_name(self.model.device) if cuda else f"{threads} thread{'s' * (threads > 1)}"


def decode(
    method: bench_options.Methods = bench_options.DECODED,
    sparsity: options.OneSparsity = 0.7,
    model: options.Model = None,
    shape: Shape = None,
    layers: Layers = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = None,
    prompt: Prompt = 128,
    steps: Steps = 30,
    rounds: bench_options.Rounds = 3,
    compile: Compile = None,
    output: Output = None,
    profile: Profile = None,
    format: bench_options.Format = "table",
) -> None:
    """Measure how fast methods decode one sequence, beside the dense model.

    The dense model, the dense model once more (a control) and the method
    take turns, token by token. Each speed-up is a median with its quartiles,
    and stands beside its ceiling, the most that the model's bytes allow.

    \b
    [bold]Examples[/bold]
    dart-eval bench decode --method griffin,dart
    dart-eval bench decode --method griffin --sparsity 0.5 --output out
    dart-eval bench decode --shape llama-3.2-1b --layers 4 --dtype bfloat16
    dart-eval bench decode --method dart --compile default --format json
    """
    hush(False)
    _check({"--prompt": prompt, "--steps": steps, "--rounds": rounds}, compile, format)
    from dart_eval.bench import kept

    if profile is not None:
        check_target(profile)
    if output is not None:
        kept.check(output)
    methods = bench_options.chosen(method, sparsity)
    chosen = options.chosen_model(model=model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    quieten(False)  # it imports torch, and all before it does not
    from dart_eval.bench import decode as bench

    for one in methods:
        bench.check(one)
    subject = _subject(chosen.model_spec, shape, layers)
    sizes = {"prompt_tokens": prompt, "steps": steps, "rounds": rounds}
    found, files = _measure(methods, sparsity, subject, compile, sizes, output)
    if profile is not None:
        _profile(profile, methods[-1], sparsity, subject, prompt)
    where = f"{subject.title}, {subject.hardware}" + (f", torch.compile ({compile})" if compile else "")
    _show(found, where, format)
    for file in files:
        say(f"wrote {file}", err=format != "table")


def _measure(
    methods: list[Pruner], sparsity: float, subject: Subject, compiled: str | None, sizes: dict[str, int],
    output: str | None,
) -> tuple[list[DecodeSpeed], list[Path]]:  # fmt: skip
    """Time every method, and keep each as soon as it is timed.

    Args:
        methods: those to time.
        sparsity: of all of them.
        subject: the model.
        compiled: the mode of `torch.compile`.
        sizes: tokens of the prompt, steps and rounds.
        output: the folder of results; None keeps nothing.

    Returns:
        What was measured, and the files in which it is kept.
    """
    from dart_eval.bench import decode, kept

    found, files = [], []
    for method in methods:
        found.append(
            decode.measure(subject.model, method, sparsity, tokenizer=subject.tokenizer, compiled=compiled, **sizes)
        )
        if output is not None:
            files.append(kept.keep(output, _speed(found[-1], method, subject, compiled, sizes)))
    return found, files


def _show(found: list[DecodeSpeed], where: str, format: str) -> None:
    """Print what was measured."""
    from dart_eval.bench.decode import row

    data = [row(f) for f in found]
    show(data, speeds(found, where), format)
    if format != "json":
        print()
        show(data, costs(found), format)


def _check(counts: dict[str, int], compiled: str | None, format: str) -> None:
    """Raise UserError where a number, a mode or a form cannot be used.

    Args:
        counts: option -> what it was given; each must be at least 1.
        compiled: the mode of `torch.compile`.
        format: the form of what is printed.
    """
    bench_options.check_format(format)
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if compiled is not None and compiled not in COMPILE:
        raise UserError(f"unknown compile mode {compiled!r}", nearest(compiled, COMPILE))


def _subject(spec: ModelSpec, shape: str | None, layers: int | None) -> Subject:
    """The model that is timed, loaded or made of random weights.

    Raises:
        UserError: there is none, or a name or number is wrong.
    """
    import torch

    from dart_eval import shapes
    from dart_eval.models import DTYPES, choose_device, resolve

    if shape is not None and spec.name is not None:
        raise UserError("--shape and --model are both given", "leave one of them out")
    if shape is None:
        if layers is not None:
            raise UserError("--layers is for a shape", "give --shape, or leave it out")
        resolved = resolve(spec)
        model, tokenizer = resolved.load(print_note)
        identity = resolved.identity
        return Subject(model, tokenizer, identity.to_json(), resolved.dtype, f"{identity.name}, {resolved.dtype}")
    kind: Any = torch.bfloat16 if spec.dtype == "auto" else DTYPES[spec.dtype]
    made = shapes.with_random_weights(shape, layers, kind, choose_device(spec.device))
    depth = made.config.get_text_config().num_hidden_layers
    dtype = str(kind).removeprefix("torch.")
    identity_of_shape = {"name": f"{shape}, {depth} layers, random weights", "revision": None, "weights": None}
    return Subject(made, None, identity_of_shape, dtype, f"{shape} (random weights), {depth} layers, {dtype}")


def _speed(found: DecodeSpeed, method: Pruner, subject: Subject, compiled: str | None, sizes: dict[str, int]) -> Speed:
    """What is kept of a measurement."""
    from dart_eval.bench.kept import Speed
    from dart_eval.plan import environment

    more = {name: value for name, value in dataclasses.asdict(found).items() if name not in FIELDS}
    return Speed(
        method=method.spec, params=method.params(), sparsity=found.sparsity if method.sized else 0.0,
        model=subject.identity, dtype=subject.dtype, device=subject.model.device.type, hardware=subject.hardware,
        compiled=compiled, prompt_tokens=sizes["prompt_tokens"],
        read=found.weights_read, speedup=found.speedup, control=found.control, ceiling=found.ceiling,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        more={"steps": sizes["steps"], "rounds": sizes["rounds"], **more}, environment=environment(),
    )  # fmt: skip


def _profile(path: Path, method: Pruner, sparsity: float, subject: Subject, prompt: int) -> None:
    """Write the trace of torch's profiler."""
    from dart_eval.bench.decode import profile

    with tempfile.TemporaryDirectory() as folder:  # torch writes to a name; its ending says whether to pack
        made = Path(folder) / f"trace{path.suffix}"
        profile(subject.model, method, sparsity, str(made), tokenizer=subject.tokenizer, prompt_tokens=prompt)
        write(path, made.read_bytes())


def speeds(found: list[DecodeSpeed], where: str) -> Table:
    """How fast the methods decode, for people."""
    body = [
        [
            f.method,
            f"{f.weights_read:.2f}" + (f" ({f.weights_executed:.2f})" if f.weights_executed != f.weights_read else ""),
            _ratio(f.speedup), f"{f.ceiling:.2f}x", f"{f.achieved_over_ceiling:.2f}", _ratio(f.control),
        ]
        for f in found
    ]  # fmt: skip
    foreign = [f.foreign_cores for f in found if f.foreign_cores is not None]
    busy = f" Other processes kept {max(foreign):.2f} cores busy at most." if foreign else ""
    note = (
        f"{where}; sparsity {said(found[0].sparsity)}, one sequence, {found[0].speedup.n} steps a method. Read: share "
        "of the FFN weights that a token reads; in brackets the share that is multiplied, where each token chooses "
        "neurons of its mask. Speed-up: over dense, the median [quartiles] of neighbouring steps. Dense is a model of "
        "the same weights that prune() never touched, so that the FFN weights are there twice "
        f"({found[0].twin_bytes / 10**6:.0f} MB that no column counts). Ceiling: the most that the bytes of this model "
        f"allow at that read; share: speed-up / ceiling. Control: dense over dense.{busy}"
    )
    return Table("Decoding", ["method", "read", "speed-up", "ceiling", "share", "control"], body, note)


def costs(found: list[DecodeSpeed]) -> Table:
    """What the methods take beside a decoded token's own work, for people."""
    columns = ["method", "tokens/s", "prompt", "masks", "moves", "attach", "detach", "overhead", "extra MB"]
    body = [
        [
            f.method,
            f"{f.tokens_per_second:.1f} ({f.dense_tokens_per_second:.1f})",
            f"{f.first_token.median:.2f}x",
            f"{f.remask_masks_dense_steps.median:.2f}" if f.remask_masks_dense_steps else "-",
            f"{f.remask_moves_dense_steps.median:.2f}",
            f"{f.begin_dense_steps.median:.1f}",
            f"{f.end_dense_steps.median:.1f}",
            f"{100 * f.overhead.median:.1f} %",
            f"{(f.extra_weight_bytes + f.state_bytes + f.order_bytes) / 10**6:.2f}",
        ]
        for f in found
    ]
    note = (
        "Tokens/s are for orientation, those of dense in brackets. Prompt: with its scores, masks and the first moves "
        "of neurons, over a dense prompt. The next four columns are in dense steps. A re-mask makes new masks from "
        "recent tokens (- where the method keeps none), and moves neurons in memory, here a fifth of those that are "
        "kept. Once per prune() the weights are taken over (attach), and at its end every neuron is put back "
        "(detach). Overhead: what the method's hooks add to a pruned step. Extra: copies of weights, the method's "
        "state and the order of the neurons."
    )
    return Table("What a method takes beside", columns, body, note)


def _ratio(ratio: Ratio) -> str:
    """A median with its quartiles."""
    return f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
