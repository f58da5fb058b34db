"""Options of the verbs: those of a run, made from the list in `sweep.options`, then those that other verbs add."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_origin

import typer
from typer.models import OptionInfo

from dart_eval.sweep.options import (
    CLUSTER,
    MODEL,
    OPTIONS,
    OUTPUT,
    PRUNING,
    TASKS,
    RunConfig,
    config_of,
    default_of,
    kinds_of,
    option_of,
)
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.retired import retired

PROMPT, TIMING = "Prompt", "Timing"  # panels of other verbs
PANELS = (TASKS, PRUNING, MODEL, OUTPUT, CLUSTER)
FORMATS = ("table", "md", "csv", "tex", "json")  # of what a verb prints
BOARD, COSTS = "board", "costs"  # views of `tables`

Several = list[str] | None  # values with commas between them, or the option again: they add up (`text.items_of`)
Verb = TypeVar("Verb", bound=Callable[..., None])


def takes(*names: str) -> Callable[[Verb], Verb]:
    """Give a verb these options of a run. It gets their values by name, None for an option that was not typed.

    Args:
        names: of options in `sweep.options`.
    """
    shared: dict[str, object] = {}
    for name in sorted(names, key=lambda name: PANELS.index(OPTIONS[name].panel)):
        shared |= _of_run(name)

    def wrap(verb: Verb) -> Verb:
        @functools.wraps(verb)
        def called(**given: object) -> None:
            for off in [name for name in given if name.startswith("no_") and name in shared]:
                if given.pop(off):
                    given[off[3:]] = False
            verb(**given)

        own = inspect.signature(verb, eval_str=True)
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in shared.items()
        ]
        parameters += [p.replace(kind=p.KEYWORD_ONLY) for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return cast(Verb, called)

    return wrap


def _of_run(name: str) -> dict[str, object]:
    """Return the annotation of an option of a run. A flag has one more, `--no-`; the less useful one is hidden."""
    kinds, known, default = kinds_of(name), OPTIONS[name], default_of(name)
    text = f"{known.help}  \\[default: {default}]" if default else known.help
    short = [word for word in known.second if word.startswith("-")]  # the long ones are for `token_normalize_func`
    if kinds == [bool]:
        on, off = option_of(name), f"--no-{option_of(name)[2:]}"
        return {
            name: Annotated[bool | None, own(text, known.panel, "", on, hidden=default == "on")],
            f"no_{name}": Annotated[bool | None, own(known.off, known.panel, "", off, hidden=not known.off)],
        }
    kind: Any = int if kinds == [int] else str
    if get_origin(kinds[0]) is tuple or name in ("gen_kwargs", "seed"):
        kind = list[str]
    field = own(text, known.panel, known.metavar, option_of(name), *short, show_default=False)
    return {name: Annotated[kind | None, field]}


def own(help: str, panel: str | None, metavar: str | None, *names: str, **more: Any) -> OptionInfo:
    """Return an option that no run has.

    Args:
        help: its meaning.
        panel: of the help.
        metavar: placeholder of its value in the help; empty for a flag.
        names: as typed, if they differ from the parameter's name.
    """
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, **more)


def count(help: str, panel: str) -> OptionInfo:
    """Return an option that takes a whole number from 1 on."""

    def checked(param: typer.CallbackParam, value: int) -> int:
        if value < 1:
            raise UserError(f"{param.opts[0]} {value} must be at least 1")
        return value

    return own(help, panel, "N", callback=checked)


def one_of(
    known: Sequence[str], what: str, help: str, panel: str | None = None, metavar: str | None = None
) -> OptionInfo:
    """Return an option that takes one of a few words.

    Args:
        known: the words.
        what: a noun for them, in messages.
        help: the option's meaning.
        panel: of the help.
        metavar: placeholder of the value in the help, if not the words.
    """

    def checked(value: str | None) -> str | None:
        if value is not None and value not in known:
            left = retired("view", value) if what == "view" else None
            raise left or UserError(f"unknown {what} {value!r}", nearest(value, known))
        return value

    return own(help, panel, metavar or "|".join(known), callback=checked)


def chosen(**given: object) -> RunConfig:
    """Return the options that a verb shares with a run; wrong values are refused before torch is imported."""
    return config_of(given)


# -- of several verbs --------------------------------------------------------------------------------------------

ModelArgs = Annotated[
    Several,
    own("Give the model as lm-eval does: pretrained=NAME, dtype=TYPE ...", MODEL, "K=V,...", "--model-args", "-a"),
]
Config = Annotated[
    Path | None,
    own("Read options from a YAML file; the command line overrides it.", OUTPUT, "FILE", "--config", "-C"),
]
PLAN = "Print the cells, their documents, and which are finished already. No cell runs."
Plan = Annotated[bool, own(PLAN, OUTPUT, "", "--plan")]
RunFormat = Annotated[str, one_of(("table", "json"), "format", "Print the board, or every number as JSON.", OUTPUT)]
Verbose = Annotated[bool, own("Show the libraries' messages and tracebacks.", OUTPUT, "", "--verbose")]

# -- bench -----------------------------------------------------------------------------------------------------

OneSparsity = Annotated[float, own("Share of FFN weight bytes that a decoded token does not read.", PRUNING, "SHARE")]
Packed = Annotated[
    Several,
    own("Also measure dense and methods on FFN weights rounded to these bits: 4:128 or 8:row,3.", PRUNING, "BITS"),
]
METHODS_MEASURED = ("griffin", "dart", "dart-code", "grinqh")
MEASURED = (
    "Measure these methods, comma-separated, spelled as for `dart-eval run`.  "
    rf"\[default: {','.join(METHODS_MEASURED)}]"
)
Measured = Annotated[Several, own(MEASURED, PRUNING, "NAMES")]
SHAPED = "Use the shape of this model without its weights: llama-3.1-8b, llama-3.2-3b, llama-3.2-1b or qwen2.5-1.5b."
SHAPE = own(SHAPED, MODEL, "NAME")
Layers = Annotated[int | None, own(r"Give the shape this many layers.  \[default: its own]", MODEL, "N")]
PromptTokens = Annotated[int, count("Start with a prompt of this many random tokens.", TIMING)]
Steps = Annotated[int, count("Decode this many tokens per round.", TIMING)]
Rounds = Annotated[int, count("Measure this many rounds; dense, control and method take turns in each.", TIMING)]
KEPT = "Also write the measured speeds to this results folder, one file per method."
Kept = Annotated[str | None, own(KEPT, OUTPUT, "DIR")]
Format = Annotated[str, one_of(FORMATS, "format", "Print in this format.", OUTPUT)]

# -- paper -----------------------------------------------------------------------------------------------------

PaperName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Make these tables: smoke (shipped data), dart (all of the DART paper's claims), or a YAML file's.",
    ),
]
PaperTables = Annotated[
    list[str] | None, own("Make only these tables, comma-separated, and the claims on them.", OUTPUT, "NAMES")
]
PaperLimit = Annotated[
    int | None, own(r"Run only the first N items of each task.  \[default: the file's limit]", TASKS, "N")
]
PaperOutput = Annotated[str, own("Write results to this folder, and tables to its subfolder `tables`.", OUTPUT, "DIR")]

# -- trace -----------------------------------------------------------------------------------------------------

TraceText = Annotated[
    str | None, typer.Argument(metavar="TEXT", help="Prompt; without it, a shipped two-topic document.")
]
TraceFile = Annotated[Path | None, own("Read the prompt from this file.", PROMPT, "FILE")]
TraceTokens = Annotated[int, count("Stop this many tokens after the prompt.", PROMPT)]
RUN = "Run this method: a name, or a name with options, such as dart:remask=never."
TraceMethod = Annotated[str, own(RUN, PRUNING, "NAME")]
TraceOutput = Annotated[Path | None, own("Write the trace to this JSON file.", OUTPUT, "FILE")]
TracePlot = Annotated[Path | None, own("Draw the trace into this file: png, svg or pdf.", OUTPUT, "FILE")]
TraceSaveAllocation = Annotated[
    Path | None, own("Write the layer densities of this prompt, for allocation=table:FILE.", OUTPUT, "FILE")
]
