"""Options and arguments of the verbs, by name: those that several verbs have, then those of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help=r"Hub id, local folder or gemma-3-270m.  \[default: the demo model]")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Dtype = Annotated[str | None, typer.Option(help=r"auto, float32, bfloat16 or float16.  \[default: auto]")]
Device = Annotated[str | None, typer.Option(help=r"auto, cpu, cuda, cuda:1, mps.  \[default: auto]")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread the model over GPUs, e.g. auto.")]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", metavar="", help="Run Python code that comes with the model (default: none)."),
]
UnsafeCode = Annotated[
    bool | None,
    typer.Option(
        "--confirm-run-unsafe-code", metavar="", help="Let tasks run what the model writes, or code in this folder."
    ),
]
DataDir = Annotated[str | None, typer.Option(help="Local data instead of the hub.")]
Verbose = Annotated[bool, typer.Option("--verbose", metavar="", help="Show the libraries' messages and tracebacks.")]

Executor = Annotated[
    str | None, typer.Option(help=r"local, or ray: many processes, GPUs or machines.  \[default: local]")
]
RayAddress = Annotated[
    str | None, typer.Option(help=r"A running Ray cluster, e.g. auto.  \[default: one on this machine]")
]
GpusPerCell = Annotated[float | None, typer.Option(help=r"GPUs of a Ray worker.  \[default: 1 if there are any]")]
CpusPerCell = Annotated[float | None, typer.Option(help=r"CPUs of a Ray worker.  \[default: 1]")]
Shards = Annotated[
    int | None,
    typer.Option(
        help="Shards that Ray splits every cell into, one for a worker at a time.  "
        r"\[default: as many as there are workers, if each gets 512 requests]"
    ),
]

# -- bench and trace: one value each ---------------------------------------------------------------------------

OneDtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
OneDevice = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
OneSparsity = Annotated[float, typer.Option(help="Share of the FFN weights that a token does not read.")]

# -- run -------------------------------------------------------------------------------------------------------

Tasks = Annotated[str | None, typer.Option(help="Tasks, comma-separated: arc, hellaswag, mmlu, xsum, smoke ...")]
Method = Annotated[
    str | None,
    typer.Option(
        help="Methods, comma-separated: a name, or a name with other parts, such as griffin:remask=drift "
        r"(`dart-eval ls methods` shows all).  \[default: dense,griffin,dart]"
    ),
]
Sparsity = Annotated[
    str | None,
    typer.Option(
        help="Shares of the FFN weights that a token does not read, from 0 to below 1, comma-separated.  "
        r"\[default: 0.5]"
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        help="Which tokens run pruned when an answer is scored. scored: the last prompt token and the answer; the mask "
        "never sees the answer. all: prompt and answer; the mask is made from both, so it looks ahead (the public DART "
        r"code). last: the last input token alone (GRIFFIN).  \[default: scored]"
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        help="How the sparsity is spread over layers, in methods that make masks from the prompt: uniform, depth or "
        r"table:FILE.  \[default: each method's own]"
    ),
]
NumFewshot = Annotated[int | None, typer.Option(help=r"Examples before each item.  \[default: the task's own]")]
Limit = Annotated[int | None, typer.Option(help="Only the first N items of each task (of each member of a group).")]
BatchSize = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help=r"Contexts per forward; auto: as many as fit.  \[default: 8]",
    ),
]
SharePrefix = Annotated[
    bool | None,
    typer.Option(
        "--share-prefix/--no-share-prefix",
        help=r"Run once what many contexts begin with, such as few-shot examples.  \[default: share]",
    ),
]
Seed = Annotated[int | None, typer.Option(help=r"Seed for few-shot sampling and for random masks.  \[default: 0]")]
MaxLength = Annotated[
    int | None,
    typer.Option(help=r"Longest sequence in tokens, context and answer together.  \[default: the model's]"),
]
Chunk = Annotated[int | None, typer.Option(help=r"Tokens per perplexity chunk.  \[default: 2048]")]
ChatTemplate = Annotated[
    bool | None, typer.Option("--chat-template", metavar="", help="Use the model's chat template.")
]
Cue = Annotated[
    str | None,
    typer.Option(help=r"What follows the document in summarisation prompts.  \[default: TL;DR:]"),
]
Calibration = Annotated[
    str | None, typer.Option(help=r"Text file that wanda-sp calibrates on.  \[default: the project's own]")
]
Output = Annotated[str | None, typer.Option(help=r"Folder of results.  \[default: out]")]
Config = Annotated[Path | None, typer.Option(help="YAML file with these options; the command line wins.")]
Log = Annotated[str | None, typer.Option(help="Also log finished cells: wandb or trackio.")]
LogProject = Annotated[str | None, typer.Option(help=r"Project to log under.  \[default: dart-eval]")]
Force = Annotated[bool | None, typer.Option("--force", metavar="", help="Run finished cells again.")]
Plan = Annotated[
    bool, typer.Option("--plan", metavar="", help="Only say what the run will take: tokens, FLOPs, memory, time.")
]

# -- paper -----------------------------------------------------------------------------------------------------

PaperName = Annotated[
    str, typer.Argument(help="smoke (shipped data), ten (the paper's ten benchmarks and two summaries), or a file.")
]
PaperLimit = Annotated[int | None, typer.Option(help=r"First items of each task.  \[default: what the file says]")]
PaperBatchSize = Annotated[
    str | None, typer.Option(metavar="N|auto", help=r"Contexts per forward, or auto.  \[default: 8]")
]
PaperSeed = Annotated[int | None, typer.Option(help=r"Seed for few-shot sampling and for random masks.  \[default: 0]")]
PaperOutput = Annotated[str, typer.Option(help="Folder of results; the tables come into its folder `tables`.")]

# -- trace -----------------------------------------------------------------------------------------------------

TraceText = Annotated[str | None, typer.Argument(help="The prompt; without it, a shipped two-topic document.")]
TraceFile = Annotated[Path | None, typer.Option(help="The prompt is the text of this file.")]
TraceThen = Annotated[
    Path | None, typer.Option(help="Feed this file's text after the prompt; without it the model writes on.")
]
TraceSmoke = Annotated[int, typer.Option(help="Number of the shipped two-topic document.")]
TraceMethod = Annotated[str, typer.Option(help="A method, or one with other parts: griffin:remask=drift.")]
TraceTokens = Annotated[int, typer.Option(help="Tokens after the prompt, at most.")]
TraceOutput = Annotated[Path, typer.Option(help="JSON file to write; the picture goes beside it.")]
TracePlot = Annotated[
    Path | None, typer.Option(help=r"Picture to write: png, svg or pdf.  \[default: --output with .png]")
]
TraceSaveAllocation = Annotated[
    Path | None, typer.Option(help="Also save the densities of this prompt's layers, for allocation=table:FILE.")
]

# -- check -----------------------------------------------------------------------------------------------------

CheckResults = Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")]
CheckBaseline = Annotated[Path, typer.Option(help="Baseline file, or a folder of earlier results.")]
CheckThresholds = Annotated[Path | None, typer.Option(help="YAML: recovery, of_dense, alpha, tasks.")]
CheckUpdate = Annotated[
    bool, typer.Option("--update", metavar="", help="Write the baseline file from the results; checks nothing.")
]
CheckEvery = Annotated[bool, typer.Option("--all", metavar="", help="Show also the rows that are ok.")]
CheckGithub = Annotated[
    bool, typer.Option("--github", metavar="", help="Annotations and job summary for GitHub Actions.")
]
CheckJunit = Annotated[Path | None, typer.Option(help="Write a JUnit report to this file.")]
CheckFormat = Annotated[
    str | None, typer.Option(help="md or json; without it, a table for the terminal (md in a pipe).")
]
