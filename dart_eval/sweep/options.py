"""The list of options of a run: name, type, default, meaning, place in the help, and role in a cell.

The command line, run.yaml, `dart_eval.evaluate`, keys of cells and docs/options.md are made from this list.
pydantic checks the values. Nothing here imports torch, so wrong input is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass

from dart_eval.sweep import values
from dart_eval.sweep.values import MOST
from dart_eval.util.text import Json

# Panels of the help.
TASKS, PRUNING, MODEL, OUTPUT, CLUSTER = "Tasks", "Pruning", "Model", "Output", "Cluster"

# The role of an option in a cell. CELL tells cells apart; KEY stands in the key; GIVEN stands there only if given, so
# that cells older than the option are found; DECIDES decides something in the key; RUN concerns the run alone.
CELL, KEY, GIVEN, DECIDES, RUN = "cell", "key", "given", "decides", "run"


class Option(NamedTuple):
    """What is known of an option beside its type and default.

    Attributes:
        panel: of the help.
        metavar: placeholder of its value in the help; empty for a flag.
        role: in a cell, see above.
        none: effect of leaving it out, if the default does not say it.
        off: meaning of `--no-` before a flag's name, where that is of use.
        second: its other names, which are those of lm-eval.
    """

    panel: str
    metavar: str
    role: str
    none: str
    off: str
    second: tuple[str, ...]


def option(
    panel: str, metavar: str, role: str, help: str, none: str = "", off: str = "", second: tuple[str, ...] = (),
    **bounds: Any,
) -> Any:  # fmt: skip
    """Return a field of `Options`: see `Option`; `help` is a sentence, `bounds` are pydantic's (ge, gt)."""
    return Field(description=help, json_schema_extra={"": [panel, metavar, role, none, off, [*second]]}, **bounds)


# Which tokens run pruned when answers are scored: `evaluation.scoring` and `evaluation.scopes` say how.
Scope = Literal["scored", "continuation", "all", "last", "last-50", "last-99", "decode"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SCOPES: tuple[str, ...] = get_args(Scope)

Text = Annotated[str, BeforeValidator(values.text)]
Whole = Annotated[int, Strict(), Field(lt=MOST)]
Flag = Annotated[bool, Strict()]


@dataclass(frozen=True, config=ConfigDict(defer_build=True, extra="forbid"))
class Options:
    """All options of `dart-eval run`; the keys of run.yaml are these names."""

    # fmt: off
    model: Annotated[Text | None, option(MODEL, "NAME", DECIDES,
        "Prune this model: a hub id, a local folder, or gemma-3-270m.", "the demo model", second=("-m", "-M"))] = None
    revision: Annotated[Text | None, option(MODEL, "NAME", DECIDES,
        "Use this branch, tag or commit of the model on the hub.")] = None
    dtype: Annotated[Dtype, BeforeValidator(values.dtype), option(MODEL, "TYPE", DECIDES,
        "Load the weights in this dtype; auto is the checkpoint's own.")] = "auto"
    device: Annotated[Text, AfterValidator(values.device), option(MODEL, "DEVICE", DECIDES,
        "Run the model here: auto, cpu, cuda, cuda:1 or mps.")] = "auto"
    device_map: Annotated[Text | None, option(MODEL, "MAP", DECIDES,
        "Spread the model over several GPUs by this device map, for example auto.")] = None
    peft: Annotated[Text | None, option(MODEL, "NAME", DECIDES,
        "Merge this PEFT adapter (such as LoRA) into the model: a local folder or a hub id.")] = None
    load_in: Annotated[Literal["4bit", "8bit"] | None, option(MODEL, "4bit|8bit", DECIDES,
        "Quantise the linear layers with bitsandbytes while the model is loaded.")] = None
    tokenizer: Annotated[Text | None, option(MODEL, "NAME", GIVEN,
        "Use the tokenizer of this hub id or folder.", "the model's")] = None
    attn_implementation: Annotated[Text | None, option(MODEL, "NAME", GIVEN,
        "Use this attention implementation of transformers: eager, sdpa or flash_attention_2.", "the model's")] = None
    add_bos_token: Annotated[Flag | None, option(MODEL, "", GIVEN,
        "Start every prompt with the tokenizer's BOS token.", "as the tokenizer does",
        off="Do not start prompts with the tokenizer's BOS token.")] = None
    trust_remote_code: Annotated[Flag, option(MODEL, "", DECIDES,
        "Allow the model's own Python code to run. Without this option it is refused.")] = False
    method: Annotated[tuple[str, ...], BeforeValidator(values.methods), option(PRUNING, "NAMES", CELL,
        "Run these methods, comma-separated: a name, or a name with options, such as dart:remask.window=8. "
        "`dart-eval ls methods` lists them. Without it and --ffn-bits, dense runs in a rounding of each read, too.")
    ] = ("dense", "griffin", "dart", "grinqh")
    sparsity: Annotated[tuple[float, ...], BeforeValidator(values.sparsities), option(PRUNING, "SHARES", CELL,
        "Run at these sparsities, comma-separated, from 0 to below 1: the share of FFN weight bytes that a decoded "
        "token does not read. 0.5:0.9:0.1 means 0.5 to 0.9 in steps of 0.1, both ends included.")] = (0.5,)
    ffn_bits: Annotated[tuple[str, ...], BeforeValidator(values.ffn_bits), option(PRUNING, "BITS", CELL,
        "Round the FFN weights to this many bits first, comma-separated: 4, or 4:64 for groups of 64 weights "
        "(default 32). q3_k, q4_k and q5_k are formats of llama.cpp; 16 does not round.")] = ("16",)
    scope: Annotated[Scope, option(PRUNING, "SCOPE", DECIDES,
        "Choose which tokens run pruned when an answer is scored. scored: the last prompt token and the answer. "
        "continuation, all, last, last-50, last-99, decode: scopes of papers, see docs/concepts.md.")] = "scored"
    tasks: Annotated[tuple[str, ...], BeforeValidator(values.texts), option(TASKS, "NAMES", CELL,
        "Run these tasks, comma-separated: arc, hellaswag, mmlu, xsum, smoke, or any name of lm-eval.",
        second=("-t",))] = ()
    num_fewshot: Annotated[Whole | None, option(TASKS, "N", KEY,
        "Put this many few-shot examples before each item.", "the task's own", second=("-f",), ge=0)] = None
    limit: Annotated[int | float | None, BeforeValidator(values.limit), option(TASKS, "N", KEY,
        "Run only the first N items of each task (of each member of a group). A number below 1 is a share of them.",
        "all", second=("-L",))] = None
    include_path: Annotated[tuple[str, ...], BeforeValidator(values.texts), option(TASKS, "DIRS", DECIDES,
        "Add the tasks of these folders, comma-separated: YAML files in lm-eval's format. Python code that they "
        "name runs only with --confirm-run-unsafe-code.")] = ()
    batch_size: Annotated[int | str, BeforeValidator(values.batch_size), option(TASKS, "N|auto", DECIDES,
        "Run this many contexts per forward; auto runs as many as fit. In float32 it changes only last digits, "
        "except where tokens choose what they read (grinqh, cats, teal, routed experts) or answers are sampled.",
        second=("-b",))] = 8
    kl: Annotated[Flag, option(TASKS, "", DECIDES,
        "Measure KL divergence and top-1 agreement of scored tokens with dense; finished cells need --force.",
        off="Do not measure KL divergence and top-1 agreement with dense: scoring takes less time.")] = True
    seed: Annotated[Whole, option(TASKS, "N", KEY,
        "Seed few-shot sampling, and methods that draw at random. Several seeds make one cell each.", ge=0)] = 0
    max_length: Annotated[Whole | None, option(TASKS, "N", KEY,
        "Limit context and answer together to this many tokens.", "the model's", ge=1)] = None
    chunk: Annotated[Whole, option(TASKS, "N", KEY,
        "Cut perplexity texts into chunks of this many tokens; the second half of each chunk is scored.")] = 2048
    chat_template: Annotated[Flag, option(TASKS, "", KEY, "Wrap prompts in the model's chat template.",
        second=("apply_chat_template",))] = False
    system_instruction: Annotated[Text | None, option(TASKS, "TEXT", GIVEN,
        "Put this text before every prompt; in a chat template it is the system message.")] = None
    fewshot_as_multiturn: Annotated[Flag | None, option(TASKS, "", GIVEN,
        "Format few-shot examples as turns of the chat template.", "on",
        off="Put few-shot examples into the first turn of the chat template.")] = None
    enable_thinking: Annotated[Flag | None, option(TASKS, "", GIVEN,
        "Turn thinking on in the chat template. The template decides if neither option is given.",
        off="Turn thinking off in the chat template.")] = None
    think_end_token: Annotated[Text | None, option(TASKS, "TEXT|ID", GIVEN,
        "Score only the part of an answer after this token, given as its text (</think>) or its id.")] = None
    gen_kwargs: Annotated[str | None, BeforeValidator(values.generation), option(TASKS, "K=V,...", GIVEN,
        "Generate with these settings, which override each task's own: temperature=0.7,do_sample=true.")] = None
    confirm_run_unsafe_code: Annotated[Flag, option(TASKS, "", DECIDES,
        "Allow tasks to run code: programs that the model writes (humaneval, mbpp), Python files that tasks of "
        "--include-path name, and metrics in the working directory.")] = False
    data_dir: Annotated[Text | None, option(TASKS, "DIR", DECIDES,
        "Read task data from this folder instead of the hub, see docs/data.md.")] = None
    calibration: Annotated[Text | None, option(PRUNING, "FILE|DATASET", DECIDES,
        "Calibrate methods such as flap on this text file, or on the train split of this data set: NAME or "
        "NAME:CONFIGURATION, in --data-dir or on the hub.", "a shipped text")] = None
    output: Annotated[Text, option(OUTPUT, "DIR", RUN,
        "Write results to this folder; finished cells in it are not run again.",
        second=("output_path", "-o"))] = "out"
    force: Annotated[Flag, option(OUTPUT, "", RUN, "Run finished cells again.")] = False
    workers: Annotated[Whole, option(CLUSTER, "N", RUN,
        "Share the cells among this many processes on this machine, one per GPU if it has any.", ge=1)] = 1
    ray: Annotated[Text | None, option(CLUSTER, "ADDRESS", RUN,
        "Run each cell as a task of Ray: auto joins a running cluster, local starts one on this machine.")] = None
    gpus_per_cell: Annotated[Whole | None, option(CLUSTER, "N", RUN,
        "Give each cell on Ray this many GPUs; two or more share its model.", "1, or 0 without GPUs", ge=1)] = None
    # fmt: on


DEFAULTS: Json = {f.name: f.default for f in fields(Options)}
HINTS = get_type_hints(Options)


def about(name: str) -> Option:
    """Return what is known of an option."""
    return Option(*_field(name).json_schema_extra[""])


def of_role(*roles: str) -> Iterator[str]:
    """Return the names of the options with one of these roles."""
    return (name for name in DEFAULTS if about(name).role in roles)


def help_of(name: str) -> str:
    """Return the meaning of an option, in a sentence."""
    return str(_field(name).description)


def default_of(name: str) -> str:
    """Return the effect of leaving an option out, in words; empty where it goes without saying."""
    default, none = DEFAULTS[name], about(name).none
    if none or default in (None, ()):
        return none
    if isinstance(default, bool):
        return "on" if default else ""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def choices_of(name: str) -> tuple[str, ...]:
    """Return the words that an option may be; empty if it may be any."""
    kinds = (HINTS[name], *get_args(HINTS[name]))  # of `Literal[...] | None`, too
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def typed(name: str) -> type:
    """Return the type of an option's value on the command line."""
    hint = HINTS[name]
    kinds = {get_origin(k) or k for k in (hint, *get_args(hint))}
    if tuple in kinds or name in ("gen_kwargs", "seed"):
        return list
    kind = next((k for k in (bool, str, float, int) if k in kinds), str)
    return str if Literal in kinds else kind


def option_of(name: str) -> str:
    """Return an option as it is typed: `batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def _field(name: str) -> Any:
    return Options.__pydantic_fields__[name]  # type: ignore[attr-defined]


SECOND_NAMES = {word: name for name in DEFAULTS for word in about(name).second if word[0] != "-"}
