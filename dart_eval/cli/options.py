"""Options and arguments of the verbs, by name: those that several verbs have, then those of each.

What an option of a run means, and what happens without it, stands in `config.RunConfig`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from dart_eval.cli import complete
from dart_eval.config import LM_EVALS, RunConfig, choices_of, default_of, help_of, made

MODEL, PRUNING, TASKS, OUTPUT, CLUSTER = "Model", "Pruning", "Tasks", "Output", "Cluster"  # panels of the help


def _option(name: str, panel: str, *names: str, default: bool = True, **more: Any) -> Any:
    """An option of a run.

    Args:
        name: of the field of `RunConfig`. panel: of the help that it stands in.
        names: how it is typed, if not as its field. default: say what happens without it.
    """
    said = default_of(name) if default else ""
    if choices := choices_of(name):
        more = {"metavar": "|".join(choices), "autocompletion": complete.words(choices), **more}
    text = f"{help_of(name)}  \\[default: {said}]" if said else help_of(name)
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=not default, **more)


def _flag(name: str, panel: str, **more: Any) -> Any:
    """An option without a value."""
    return _option(name, panel, f"--{name.replace('_', '-')}", metavar="", **more)


def _off(name: str, panel: str) -> Any:
    """What switches off an option without a value."""
    text = help_of(name)
    told = f"Do not {text[0].lower()}{text[1:]}"
    return typer.Option(f"--no-{name.replace('_', '-')}", metavar="", help=told, rich_help_panel=panel)


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


def chosen_model(**given: Any) -> RunConfig:
    """The model that a verb loads, told as `run` is; wrong words are refused before torch is imported."""
    return made({name: value for name, value in given.items() if value is not None})


def _words(*known: str) -> Any:
    return complete.words(known)


Model = Annotated[str | None, _option("model", MODEL, metavar="NAME")]
Revision = Annotated[str | None, _option("revision", MODEL, metavar="NAME")]
Dtype = Annotated[str | None, _option("dtype", MODEL, metavar="TYPE")]
Device = Annotated[
    str | None, _option("device", MODEL, metavar="DEVICE", autocompletion=_words("auto", "cpu", "cuda", "mps"))
]
DeviceMap = Annotated[str | None, _option("device_map", MODEL, metavar="MAP", autocompletion=_words("auto"))]
TrustRemoteCode = Annotated[bool | None, _flag("trust_remote_code", MODEL)]
UnsafeCode = Annotated[bool | None, _flag("confirm_run_unsafe_code", TASKS)]
DataDir = Annotated[str | None, _option("data_dir", TASKS, metavar="DIR")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", metavar="", help="Show the libraries' messages and tracebacks.", rich_help_panel=OUTPUT),
]

Executor = Annotated[str | None, _option("executor", CLUSTER)]
RayAddress = Annotated[str | None, _option("ray_address", CLUSTER, metavar="ADDRESS")]
GpusPerCell = Annotated[float | None, _option("gpus_per_cell", CLUSTER, metavar="N")]
CpusPerCell = Annotated[float | None, _option("cpus_per_cell", CLUSTER, metavar="N")]
Shards = Annotated[int | None, _option("shards", CLUSTER, metavar="N")]

# -- bench and trace: one value each ---------------------------------------------------------------------------

OneSparsity = Annotated[
    float,
    typer.Option(metavar="SHARE", help="Share of the FFN weights that a token does not read.", rich_help_panel=PRUNING),
]

# -- run -------------------------------------------------------------------------------------------------------

Tasks = Annotated[str | None, _option("tasks", TASKS, metavar="NAMES", autocompletion=complete.listed(complete.tasks))]
Method = Annotated[
    str | None, _option("method", PRUNING, metavar="NAMES", autocompletion=complete.listed(complete.methods))
]
Sparsity = Annotated[str | None, _option("sparsity", PRUNING, metavar="SHARES")]
Scope = Annotated[str | None, _option("scope", PRUNING)]
Allocation = Annotated[
    str | None,
    _option("allocation", PRUNING, metavar="NAME", autocompletion=_words("uniform", "depth", "table:")),
]
NumFewshot = Annotated[int | None, _option("num_fewshot", TASKS, metavar="N")]
Limit = Annotated[float | None, _option("limit", TASKS, metavar="N", parser=number)]
IncludePath = Annotated[str | None, _option("include_path", TASKS, metavar="DIRS")]
SystemInstruction = Annotated[str | None, _option("system_instruction", TASKS, metavar="TEXT")]
FewshotAsMultiturn = Annotated[bool | None, _flag("fewshot_as_multiturn", TASKS, hidden=True)]  # it is on
NoFewshotAsMultiturn = Annotated[bool, _off("fewshot_as_multiturn", TASKS)]
GenKwargs = Annotated[str | None, _option("gen_kwargs", TASKS, metavar="K=V,...")]
ModelArgs = Annotated[
    str | None,
    typer.Option(
        metavar="K=V,...",
        help="The model as lm-eval is told of it: pretrained=NAME, revision, dtype and others.",
        rich_help_panel=MODEL,
    ),
]
BatchSize = Annotated[str | None, _option("batch_size", TASKS, metavar="N|auto", autocompletion=_words("auto"))]
SharePrefix = Annotated[bool | None, _flag("share_prefix", TASKS, hidden=True)]  # it is on
NoSharePrefix = Annotated[bool, _off("share_prefix", TASKS)]
Seed = Annotated[int | None, _option("seed", TASKS, metavar="N")]
MaxLength = Annotated[int | None, _option("max_length", TASKS, metavar="N")]
Chunk = Annotated[int | None, _option("chunk", TASKS, metavar="N")]
ChatTemplate = Annotated[bool | None, _flag("chat_template", TASKS)]
Cue = Annotated[str | None, _option("cue", TASKS, metavar="TEXT")]
Calibration = Annotated[str | None, _option("calibration", PRUNING, metavar="FILE")]
Output = Annotated[str | None, _option("output", OUTPUT, metavar="DIR")]
Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML file with these options; the command line wins.", rich_help_panel=OUTPUT),
]
Log = Annotated[str | None, _option("log", OUTPUT, metavar="NAME", autocompletion=_words("wandb", "trackio"))]
LogProject = Annotated[str | None, _option("log_project", OUTPUT, metavar="NAME")]
Force = Annotated[bool | None, _flag("force", OUTPUT)]
Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        metavar="",
        help="Time a few batches and say what the run will take: tokens, FLOPs, memory and time. Run no cell.",
        rich_help_panel=OUTPUT,
    ),
]

# -- paper -----------------------------------------------------------------------------------------------------

PaperName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Make the tables of smoke (shipped data), ten (the paper's ten benchmarks, two summaries), or a file.",
        autocompletion=_words("smoke", "ten"),
    ),
]
PaperLimit = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help=r"Ask only the first N items of each task.  \[default: what the file says]",
        rich_help_panel=TASKS,
    ),
]
PaperOutput = Annotated[
    str,
    typer.Option(
        metavar="DIR",
        help="Write results to this folder, and the tables to its folder `tables`.",
        rich_help_panel=OUTPUT,
    ),
]

# -- trace -----------------------------------------------------------------------------------------------------

PROMPT = "Prompt"
TraceText = Annotated[
    str | None, typer.Argument(metavar="TEXT", help="The prompt. Without it, a shipped two-topic document is.")
]
TraceFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Take the prompt from this file.", rich_help_panel=PROMPT)
]
TraceThen = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Feed this file's text after the prompt. Without it the model writes on.",
        rich_help_panel=PROMPT,
    ),
]
TraceSmoke = Annotated[
    int,
    typer.Option(metavar="N", help="Take the shipped two-topic document of this number.", rich_help_panel=PROMPT),
]
TraceTokens = Annotated[
    int, typer.Option(metavar="N", help="Stop after so many tokens behind the prompt.", rich_help_panel=PROMPT)
]
TraceMethod = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Run this method: a name, or a name with other parts, such as griffin:remask=drift.",
        rich_help_panel=PRUNING,
        autocompletion=complete.later(lambda: complete.methods("")),
    ),
]
TraceOutput = Annotated[
    Path,
    typer.Option(metavar="FILE", help="Write JSON to this file; the picture goes beside it.", rich_help_panel=OUTPUT),
]
TracePlot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help=r"Draw the picture into this file: png, svg or pdf.  \[default: --output with .png]",
        rich_help_panel=OUTPUT,
    ),
]
TraceSaveAllocation = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Save also the densities of this prompt's layers, for allocation=table:FILE.",
        rich_help_panel=OUTPUT,
    ),
]

# -- check -----------------------------------------------------------------------------------------------------

CheckResults = Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `dart-eval run --output` wrote.")]
CheckBaseline = Annotated[
    Path, typer.Option(metavar="FILE", help="Hold the results against this baseline, or a folder of earlier results.")
]
CheckThresholds = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Read from this YAML file when a row falls: recovery, of_dense, alpha, tasks."),
]
CheckUpdate = Annotated[
    bool, typer.Option("--update", metavar="", help="Write the baseline from the results. Nothing is checked.")
]
CheckEvery = Annotated[bool, typer.Option("--all", metavar="", help="Show also the rows that are ok.")]
CheckGithub = Annotated[
    bool, typer.Option("--github", metavar="", help="Write annotations and a job summary for GitHub Actions.")
]
CheckJunit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a JUnit report to this file.")]
CheckFormat = Annotated[
    str | None,
    typer.Option(
        metavar="md|json",
        help="Print in this format. Without it a terminal gets a table, and a pipe md.",
        autocompletion=_words("md", "json"),
    ),
]
