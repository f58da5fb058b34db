"""Options and arguments of the verbs, by name: those of a run, then those that other verbs add.

What an option of a run means, and what happens without it, stands in `config.RunConfig`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dart_eval.cli import complete
from dart_eval.sweep.config import RunConfig, choices_of, default_of, help_of, made
from dart_eval.sweep.lm_evals import LM_EVALS
from dart_eval.util.errors import UserError, nearest

# Panels of the help.
MODEL, PRUNING, TASKS, OUTPUT, CLUSTER = "Model", "Pruning", "Tasks", "Output", "Cluster"
PROMPT, TIMING = "Prompt", "Timing"
SHAPES = ("llama-3.1-8b", "llama-3.2-1b", "qwen2.5-1.5b")  # of `dart_eval.models.shapes`, which imports torch
COMPILE = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def _option(name: str, panel: str, metavar: str | None = None, *names: str, offers: Any = (), **more: Any) -> Any:
    """An option of a run.

    Args:
        name: of the field of `RunConfig`.
        panel: of the help that it stands in.
        metavar: what stands for its value, if not the words that it may be.
        names: how it is typed, if not as its field.
        offers: what a shell completes: words, or a function.
    """
    choices = choices_of(name)
    text = f"{help_of(name)}  \\[default: {said}]" if (said := default_of(name)) else help_of(name)
    shown = "|".join(choices) if metavar is None else metavar
    return own(text, panel, shown, *names, offers=offers or choices, show_default=False, **more)


def own(help: str, panel: str | None, metavar: str | None, *names: str, offers: Any = (), **more: Any) -> Any:
    """An option that no run has.

    Args:
        help: what it means.
        panel: of the help that it stands in.
        metavar: what stands for its value; empty for an option without one.
        names: how it is typed, if not as the parameter is called.
        offers: what a shell completes: words, or a function.
    """
    complete_with = offers if callable(offers) else complete.words(offers) if offers else None
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, autocompletion=complete_with, **more)


def _flag(name: str, panel: str, **more: Any) -> Any:
    """An option without a value."""
    return _option(name, panel, "", f"--{name.replace('_', '-')}", **more)


def _off(name: str, panel: str) -> Any:
    """What switches off an option without a value."""
    text = help_of(name)
    return own(f"Do not {text[0].lower()}{text[1:]}", panel, "", f"--no-{name.replace('_', '-')}")


def count(help: str, panel: str) -> Any:
    """An option that takes a whole number from 1 on."""

    def checked(param: typer.CallbackParam, value: int) -> int:
        if value < 1:
            raise UserError(f"{param.opts[0]} {value} must be at least 1")
        return value

    return own(help, panel, "N", callback=checked)


def one_of(known: Sequence[str], what: str, help: str, panel: str | None = None, metavar: str | None = None) -> Any:
    """An option that takes one of a few words.

    Args:
        known: the words.
        what: such a word is, for a message.
        help: what the option means.
        panel: of the help that it stands in.
        metavar: what stands for its value, if not the words.
    """

    def checked(value: str | None) -> str | None:
        if value is not None and value not in known:
            raise UserError(f"unknown {what} {value!r}", nearest(value, known))
        return value

    return own(help, panel, metavar or "|".join(known), offers=known, callback=checked)


def chosen(**given: Any) -> RunConfig:
    """What a verb is told that a run is told too; wrong words are refused before torch is imported."""
    return made({name: value for name, value in given.items() if value is not None})


def spelled(name: str) -> str:
    """The name of an option as we have it: lm-eval writes underscores, and calls some otherwise."""
    field = name.replace("-", "_")
    return LM_EVALS.get(field, field).replace("_", "-")


def number(text: str) -> float | str:
    """A whole number, another one, or the text, which is then refused with its option's name."""
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return text


# -- of a run --------------------------------------------------------------------------------------------------

METHODS = complete.listed(complete.methods)

Several = list[str] | None  # values with commas between them, or the option again: they add up (`text.items_of`)
SPREADS = ("uniform", "depth", "ends", "global", "table:")

Model = Annotated[str | None, _option("model", MODEL, "NAME")]
Revision = Annotated[str | None, _option("revision", MODEL, "NAME")]
Dtype = Annotated[str | None, _option("dtype", MODEL, "TYPE")]
Device = Annotated[str | None, _option("device", MODEL, "DEVICE", offers=("auto", "cpu", "cuda", "mps"))]
DeviceMap = Annotated[str | None, _option("device_map", MODEL, "MAP", offers=("auto",))]
Peft = Annotated[str | None, _option("peft", MODEL, "NAME")]
TrustRemoteCode = Annotated[bool | None, _flag("trust_remote_code", MODEL)]
ModelArgs = Annotated[
    Several,
    own("The model as lm-eval is told of it: pretrained=NAME, peft=ADAPTER, dtype and others.", MODEL, "K=V,..."),
]

Tasks = Annotated[Several, _option("tasks", TASKS, "NAMES", offers=complete.listed(complete.tasks))]
UnsafeCode = Annotated[bool | None, _flag("confirm_run_unsafe_code", TASKS)]
DataDir = Annotated[str | None, _option("data_dir", TASKS, "DIR")]
NumFewshot = Annotated[int | None, _option("num_fewshot", TASKS, "N")]
Limit = Annotated[float | None, _option("limit", TASKS, "N", parser=number)]
IncludePath = Annotated[Several, _option("include_path", TASKS, "DIRS")]
SystemInstruction = Annotated[str | None, _option("system_instruction", TASKS, "TEXT")]
FewshotAsMultiturn = Annotated[bool | None, _flag("fewshot_as_multiturn", TASKS, hidden=True)]  # it is on
NoFewshotAsMultiturn = Annotated[bool, _off("fewshot_as_multiturn", TASKS)]
EnableThinking = Annotated[bool | None, _flag("enable_thinking", TASKS)]
NoEnableThinking = Annotated[bool, _off("enable_thinking", TASKS)]
ThinkEndToken = Annotated[str | None, _option("think_end_token", TASKS, "TEXT|ID")]
GenKwargs = Annotated[Several, _option("gen_kwargs", TASKS, "K=V,...")]
BatchSize = Annotated[str | None, _option("batch_size", TASKS, "N|auto", offers=("auto",))]
SharePrefix = Annotated[bool | None, _flag("share_prefix", TASKS, hidden=True)]  # it is on
NoSharePrefix = Annotated[bool, _off("share_prefix", TASKS)]
Kl = Annotated[bool | None, _flag("kl", TASKS, hidden=True)]  # it is on
NoKl = Annotated[bool, _off("kl", TASKS)]
Seed = Annotated[int | None, _option("seed", TASKS, "N")]
MaxLength = Annotated[int | None, _option("max_length", TASKS, "N")]
Chunk = Annotated[int | None, _option("chunk", TASKS, "N")]
ChatTemplate = Annotated[bool | None, _flag("chat_template", TASKS)]
Cue = Annotated[str | None, _option("cue", TASKS, "TEXT")]

Method = Annotated[Several, _option("method", PRUNING, "NAMES", offers=METHODS)]
Sparsity = Annotated[Several, _option("sparsity", PRUNING, "SHARES")]
FfnBits = Annotated[Several, _option("ffn_bits", PRUNING, "BITS")]
Scope = Annotated[str | None, _option("scope", PRUNING, "SCOPE")]
Allocation = Annotated[str | None, _option("allocation", PRUNING, "NAME", offers=SPREADS)]
Calibration = Annotated[str | None, _option("calibration", PRUNING, "FILE|DATASET")]
CalibrationTokens = Annotated[int | None, _option("calibration_tokens", PRUNING, "N")]
CalibrationSeed = Annotated[int | None, _option("calibration_seed", PRUNING, "N")]

Output = Annotated[str | None, _option("output", OUTPUT, "DIR")]
Config = Annotated[Path | None, own("YAML file with these options; the command line wins.", OUTPUT, "FILE")]
Log = Annotated[str | None, _option("log", OUTPUT, "NAME", offers=("wandb", "trackio"))]
LogProject = Annotated[str | None, _option("log_project", OUTPUT, "NAME")]
Force = Annotated[bool | None, _flag("force", OUTPUT)]
Plan = Annotated[
    bool,
    own(
        "Time a few batches and say what the run will take: tokens, FLOPs, memory and time. Run no cell.",
        OUTPUT,
        "",
        "--plan",
    ),
]
Verbose = Annotated[bool, own("Show the libraries' messages and tracebacks.", OUTPUT, "", "--verbose")]

Workers = Annotated[int | None, _option("workers", CLUSTER, "N")]
Executor = Annotated[str | None, _option("executor", CLUSTER)]
RayAddress = Annotated[str | None, _option("ray_address", CLUSTER, "ADDRESS")]
GpusPerCell = Annotated[float | None, _option("gpus_per_cell", CLUSTER, "N")]
CpusPerCell = Annotated[float | None, _option("cpus_per_cell", CLUSTER, "N")]
Shards = Annotated[int | None, _option("shards", CLUSTER, "N")]

# -- bench -----------------------------------------------------------------------------------------------------

OneSparsity = Annotated[float, own("Share of the FFN weights that a token does not read.", PRUNING, "SHARE")]
Packed = Annotated[
    Several,
    own("Also measure dense and each method on FFN weights rounded to so many bits: 4, 8:row or 4,3.", PRUNING, "BITS"),
]
METHODS_MEASURED = ("griffin", "dart", "dart-code", "dart-choice", "dart-plus")
MEASURED = (
    "Measure these methods, comma-separated, as `dart-eval run --method` takes them.  "
    rf"\[default: {','.join(METHODS_MEASURED)}]"
)
Measured = Annotated[Several, own(MEASURED, PRUNING, "NAMES", offers=METHODS)]
COMPARED = (
    "Time these methods, comma-separated, each beside the first of them.  "
    r"\[default: none; dense is timed beside lm-eval's HFLM]"
)
Compared = Annotated[Several, own(COMPARED, PRUNING, "NAMES", offers=METHODS)]
SHAPED = "Take the shape of this model and not its weights: llama-3.1-8b, llama-3.2-1b or qwen2.5-1.5b."
SHAPE = own(SHAPED, MODEL, "NAME", offers=SHAPES)
Layers = Annotated[int | None, own(r"Give the shape so many layers.  \[default: its own]", MODEL, "N")]
TASKS_SCORED = ("arc", "hellaswag", "mmlu")
SCORED = rf"Score the answers of these tasks, comma-separated.  \[default: {','.join(TASKS_SCORED)}]"
Scored = Annotated[Several, own(SCORED, TASKS, "NAMES", offers=complete.listed(complete.tasks))]
FIRST = "Ask only the first N items of each task."
First = Annotated[int | None, own(FIRST, TASKS, "N")]
AT_ONCE = "Run so many contexts in a forward, on all sides. Without --method, auto is timed too."
AtOnce = Annotated[int, count(AT_ONCE, TIMING)]
PromptTokens = Annotated[int, count("Begin with a prompt of so many random tokens.", TIMING)]
Steps = Annotated[int, count("Decode so many tokens in a round.", TIMING)]
Rounds = Annotated[int, count("Take so many rounds, in each of which all sides have their turn.", TIMING)]
COMPILED = (
    "Decode through torch.compile in this mode, the dense model too: default, reduce-overhead (CUDA graphs), "
    "max-autotune or max-autotune-no-cudagraphs."
)
Compile = Annotated[str | None, one_of(COMPILE, "compile mode", COMPILED, TIMING, "MODE")]
KEPT = "Keep what was measured beside the results of `dart-eval run` in this folder, one file for each method."
Kept = Annotated[str | None, own(KEPT, OUTPUT, "DIR")]
PROFILE = "Also write a trace of torch's profiler over three pruned steps of the last method."
Profile = Annotated[Path | None, own(PROFILE, OUTPUT, "FILE")]
Format = Annotated[str, one_of(("table", "md", "json"), "format", "Print in this form.", OUTPUT)]

# -- paper -----------------------------------------------------------------------------------------------------

PaperName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Make the tables of smoke (shipped data), ten (the paper's ten benchmarks, two summaries), or a file.",
        autocompletion=complete.words(("smoke", "ten")),
    ),
]
PaperLimit = Annotated[int | None, own(rf"{FIRST}  \[default: what the file says]", TASKS, "N")]
PaperOutput = Annotated[str, own("Write results to this folder, and the tables to its folder `tables`.", OUTPUT, "DIR")]

# -- trace -----------------------------------------------------------------------------------------------------

TraceText = Annotated[
    str | None, typer.Argument(metavar="TEXT", help="The prompt. Without it, a shipped two-topic document is.")
]
TraceFile = Annotated[Path | None, own("Take the prompt from this file.", PROMPT, "FILE")]
TraceThen = Annotated[
    Path | None, own("Feed this file's text after the prompt. Without it the model writes on.", PROMPT, "FILE")
]
TraceSmoke = Annotated[int, own("Take the shipped two-topic document of this number.", PROMPT, "N")]
TraceTokens = Annotated[int, count("Stop after so many tokens behind the prompt.", PROMPT)]
TraceMethod = Annotated[
    str,
    own(
        "Run this method: a name, or a name with other parts, such as griffin:remask=drift.",
        PRUNING,
        "NAME",
        offers=complete.words(complete.methods),
    ),
]
TraceOutput = Annotated[Path, own("Write JSON to this file; the picture goes beside it.", OUTPUT, "FILE")]
TracePlot = Annotated[
    Path | None,
    own(r"Draw the picture into this file: png, svg or pdf.  \[default: --output with .png]", OUTPUT, "FILE"),
]
TraceSaveAllocation = Annotated[
    Path | None, own("Save also the densities of this prompt's layers, for allocation=table:FILE.", OUTPUT, "FILE")
]
