"""The options of a run: one model for the command line, run.yaml, `dart_eval.evaluate`, keys of cells and the docs.

pydantic checks the values; `checked` says in one line what it refuses. Nothing here imports torch, so that wrong input
is refused at once.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

from dart_eval.evaluation.settings import EvalSettings
from dart_eval.models.spec import ModelSpec
from dart_eval.sweep import values
from dart_eval.util.bits import rounding_at
from dart_eval.util.errors import UserError, naming, nearest
from dart_eval.util.files import check_name
from dart_eval.util.machine import has_cuda
from dart_eval.util.retired import retired
from dart_eval.util.text import Json, short_repr

# Panels of the help.
TASKS, PRUNING, MODEL, OUTPUT, CLUSTER = "Tasks", "Pruning", "Model", "Output", "Cluster"

# The role of an option in a cell. CELL tells cells apart; KEY stands in the key; GIVEN stands there only if given, so
# that cells older than the option are found; DECIDES decides something in the key; RUN concerns the run alone.
CELL, KEY, GIVEN, DECIDES, RUN = "cell", "key", "given", "decides", "run"

MOST = 2**32  # no count of anything is as large
DEVICE = r"^(auto|(cpu|cuda|mps|xpu)(:\d+)?)$"
DATA_SET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")  # as --calibration takes it
DATA_SET_TOKENS = 16384  # that a calibration reads of one
TEXT_FILES = (".txt", ".md", ".json", ".jsonl")  # no data set is called so
PATTERN = re.compile(r"[*?\[]|::")  # `datasets` looks for all files that match such a name
BACKENDS = ("hf", "huggingface")  # of `--model` in lm-eval, where `model_args` names the model
PATHS = ("model", "peft", "data_dir", "calibration", "output")


class Option(NamedTuple):
    """What is known of an option beside its type and default.

    Attributes:
        panel: of the help.
        metavar: placeholder of its value in the help; empty for a flag.
        role: in a cell, see above.
        help: its meaning, in a sentence.
        none: effect of leaving it out, if the default does not say it.
        off: meaning of `--no-` before a flag's name, where that is of use.
        second: its other names, which are those of lm-eval.
    """

    panel: str
    metavar: str
    role: str
    help: str
    none: str = ""
    off: str = ""
    second: tuple[str, ...] = ()


# Which tokens run pruned when answers are scored: `evaluation.scoring` and `evaluation.scopes` say how.
Scope = Literal["scored", "continuation", "all", "last", "decode"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SCOPES: tuple[str, ...] = get_args(Scope)

Text = Annotated[str, BeforeValidator(values.text)]
Place = Annotated[str, BeforeValidator(values.place)]
Whole = Annotated[int, Strict(), Field(ge=0, lt=MOST)]
Count = Annotated[int, Strict(), Field(ge=1, lt=MOST)]
Share = Annotated[float, Strict(), Field(gt=0, lt=1)]
Limit = Annotated[Count | Share, BeforeValidator(values.amount)]
Flag = Annotated[bool, Strict()]
Settings = Annotated[str | None, BeforeValidator(values.generation)]


@dataclass(frozen=True, config=ConfigDict(defer_build=True, extra="forbid"))
class RunConfig(ModelSpec, EvalSettings):
    """All options of `dart-eval run`, which are the keys of run.yaml, and what follows from them."""

    # fmt: off
    model: Annotated[Text | None, Option(MODEL, "NAME", DECIDES,
        "Prune this model: a hub id, a local folder, or gemma-3-270m.", "the demo model", second=("-m", "-M"))] = None
    revision: Annotated[Text | None, Option(MODEL, "NAME", DECIDES,
        "Use this branch, tag or commit of the model on the hub.")] = None
    dtype: Annotated[Dtype, BeforeValidator(values.dtype), Option(MODEL, "TYPE", DECIDES,
        "Load the weights in this dtype; auto is the checkpoint's own.")] = "auto"
    device: Annotated[Text, Field(pattern=DEVICE), Option(MODEL, "DEVICE", DECIDES,
        "Run the model here: auto, cpu, cuda, cuda:1 or mps.")] = "auto"
    device_map: Annotated[Text | None, Option(MODEL, "MAP", DECIDES,
        "Spread the model over several GPUs by this device map, for example auto.")] = None
    peft: Annotated[Text | None, Option(MODEL, "NAME", DECIDES,
        "Merge this PEFT adapter (such as LoRA) into the model: a local folder or a hub id.")] = None
    load_in: Annotated[Literal["4bit", "8bit"] | None, Option(MODEL, "4bit|8bit", DECIDES,
        "Quantise the linear layers with bitsandbytes while the model is loaded.")] = None
    tokenizer: Annotated[Text | None, Option(MODEL, "NAME", GIVEN,
        "Use the tokenizer of this hub id or folder.", "the model's")] = None
    attn_implementation: Annotated[Text | None, Option(MODEL, "NAME", GIVEN,
        "Use this attention implementation of transformers: eager, sdpa or flash_attention_2.", "the model's")] = None
    add_bos_token: Annotated[Flag | None, Option(MODEL, "", GIVEN,
        "Start every prompt with the tokenizer's BOS token.", "as the tokenizer does",
        off="Do not start prompts with the tokenizer's BOS token.")] = None
    trust_remote_code: Annotated[Flag, Option(MODEL, "", DECIDES,
        "Allow the model's own Python code to run. Without this option it is refused.")] = False
    method: Annotated[tuple[str, ...], BeforeValidator(values.methods), Option(PRUNING, "NAMES", CELL,
        "Run these methods, comma-separated: a name, or a name with options, such as dart:remask.window=8. "
        "`dart-eval ls methods` lists them. Without it and --ffn-bits, dense runs in a rounding of each read, too.")
    ] = ("dense", "griffin", "dart", "grinqh")
    sparsity: Annotated[tuple[float, ...], BeforeValidator(values.sparsities), Option(PRUNING, "SHARES", CELL,
        "Run at these sparsities, comma-separated, from 0 to below 1: the share of FFN weight bytes that a decoded "
        "token does not read. 0.5:0.9:0.1 means 0.5 to 0.9 in steps of 0.1, both ends included.")] = (0.5,)
    ffn_bits: Annotated[tuple[str, ...], BeforeValidator(values.ffn_bits), Option(PRUNING, "BITS", CELL,
        "Round the FFN weights to this many bits first, comma-separated: 4, or 4:64 for groups of 64 weights "
        "(default 32). q3_k, q4_k and q5_k are formats of llama.cpp; 16 does not round.")] = ("16",)
    scope: Annotated[Scope, Option(PRUNING, "SCOPE", DECIDES,
        "Choose which tokens run pruned when an answer is scored. scored: the last prompt token and the answer. "
        "continuation, all, last, decode: scopes of papers, see docs/concepts.md.")] = "scored"
    tasks: Annotated[tuple[str, ...], BeforeValidator(values.texts), Option(TASKS, "NAMES", CELL,
        "Run these tasks, comma-separated: arc, hellaswag, mmlu, xsum, smoke, or any name of lm-eval.",
        second=("-t",))] = ()
    num_fewshot: Annotated[Whole | None, Option(TASKS, "N", KEY,
        "Put this many few-shot examples before each item.", "the task's own", second=("-f",))] = None
    limit: Annotated[Limit | None, Option(TASKS, "N", KEY,
        "Run only the first N items of each task (of each member of a group), or below 1 this share of them.",
        "all", second=("-L",))] = None
    include_path: Annotated[tuple[str, ...], BeforeValidator(values.places), Option(TASKS, "DIRS", DECIDES,
        "Add the tasks of these folders, comma-separated: YAML files in lm-eval's format. Python code that they "
        "name runs only with --confirm-run-unsafe-code.")] = ()
    batch_size: Annotated[Count | Literal["auto"], BeforeValidator(values.amount), Option(TASKS, "N|auto", DECIDES,
        "Run this many contexts per forward; auto runs as many as fit. In float32 it changes only last digits, "
        "except where tokens choose what they read (grinqh, cats, teal, routed experts) or answers are sampled.",
        second=("-b",))] = 8
    kl: Annotated[Flag, Option(TASKS, "", DECIDES,
        "Measure KL divergence and top-1 agreement of scored tokens with dense; finished cells need --force.",
        off="Do not measure KL divergence and top-1 agreement with dense: scoring takes less time.")] = True
    seed: Annotated[Whole, Option(TASKS, "N", KEY,
        "Seed few-shot sampling, and methods that draw at random. Several seeds make one cell each.")] = 0
    max_length: Annotated[Count | None, Option(TASKS, "N", KEY,
        "Limit context and answer together to this many tokens.", "the model's")] = None
    chunk: Annotated[int, Strict(), Field(ge=4, lt=MOST), Option(TASKS, "N", KEY,
        "Cut perplexity texts into chunks of this many tokens; the second half of each chunk is scored.")] = 2048
    chat_template: Annotated[Flag, Option(TASKS, "", KEY, "Wrap prompts in the model's chat template.",
        second=("apply_chat_template",))] = False
    system_instruction: Annotated[Text | None, Option(TASKS, "TEXT", GIVEN,
        "Put this text before every prompt; in a chat template it is the system message.")] = None
    fewshot_as_multiturn: Annotated[Flag | None, Option(TASKS, "", GIVEN,
        "Format few-shot examples as turns of the chat template.", "on",
        off="Put few-shot examples into the first turn of the chat template.")] = None
    enable_thinking: Annotated[Flag | None, Option(TASKS, "", GIVEN,
        "Turn thinking on in the chat template. The template decides if neither option is given.",
        off="Turn thinking off in the chat template.")] = None
    think_end_token: Annotated[Text | None, Option(TASKS, "TEXT|ID", GIVEN,
        "Score only the part of an answer after this token, given as its text (</think>) or its id.")] = None
    gen_kwargs: Annotated[Settings | None, Option(TASKS, "K=V,...", GIVEN,
        "Generate with these settings, which override each task's own: temperature=0.7,do_sample=true.")] = None
    confirm_run_unsafe_code: Annotated[Flag, Option(TASKS, "", DECIDES,
        "Allow tasks to run code: programs that the model writes (humaneval, mbpp), Python files that tasks of "
        "--include-path name, and metrics in the working directory.")] = False
    data_dir: Annotated[Place | None, Option(TASKS, "DIR", DECIDES,
        "Read task data from this folder instead of the hub, see docs/data.md.")] = None
    calibration: Annotated[Place | None, Option(PRUNING, "FILE|DATASET", DECIDES,
        "Calibrate methods such as flap on this text file, or on the train split of this data set: NAME or "
        "NAME:CONFIGURATION, in --data-dir or on the hub.", "a shipped text")] = None
    output: Annotated[Place, Option(OUTPUT, "DIR", RUN,
        "Write results to this folder; finished cells in it are not run again.",
        second=("output_path", "-o"))] = "out"
    force: Annotated[Flag, Option(OUTPUT, "", RUN, "Run finished cells again.")] = False
    workers: Annotated[Count, Option(CLUSTER, "N", RUN,
        "Share the cells among this many processes on this machine, one per GPU if it has any.")] = 1
    ray: Annotated[Text | None, Option(CLUSTER, "ADDRESS", RUN,
        "Run each cell as a task of Ray: auto joins a running cluster, local starts one on this machine.")] = None
    gpus_per_cell: Annotated[Count | None, Option(CLUSTER, "N", RUN,
        "Give each cell on Ray this many GPUs; two or more share its model.", "1, or 0 without GPUs")] = None
    # fmt: on

    @property
    def calibration_size(self) -> int | None:
        """Tokens of the calibration text that are read at most; None: all."""
        whole = self.calibration is None or Path(self.calibration).is_file()
        return None if whole else DATA_SET_TOKENS

    def check(self) -> None:
        """Refuse options that contradict each other, and values that no run could use.

        Raises:
            UserError: the first thing that is wrong.
        """
        for folder in self.include_path:
            check_name(folder, "--include-path")
            if not Path(folder).is_dir():
                raise UserError(f"include path {folder} is not a folder", "give one with task YAML files")
        if text := self.calibration:
            named = DATA_SET.fullmatch(text) is not None and Path(text).suffix not in TEXT_FILES
            if not named and not Path(text).is_file():
                raise UserError(f"calibration text {text} is not a file", "give a text file, or a data set's name")
        thinking, several = self.enable_thinking, self.workers > 1
        for wrong, problem, remedy in (
            (not self.method or not self.sparsity, "no method or no sparsity given",
             "give --method dense,dart --sparsity 0.5,0.7"),
            (self.fewshot_as_multiturn and not self.chat_template, "--fewshot-as-multiturn needs --chat-template",
             "give both, or neither"),
            (thinking is not None and not self.chat_template,
             f"--{'' if thinking else 'no-'}enable-thinking needs --chat-template", "add --chat-template"),
            (thinking and self.think_end_token is None, "--enable-thinking needs the token that ends thinking",
             "add --think-end-token, such as </think>"),
            (self.gpus_per_cell is not None and (self.ray is None or self.device == "cpu"),
             "--gpus-per-cell needs --ray and no --device cpu", "leave it out"),
            (self.ray is not None and self.device not in ("auto", "cpu", "cuda"),
             f"--device {self.device} does not work with --ray", "give auto, cpu or cuda"),
            (self.ray is not None and several, f"--workers {self.workers} does not work with --ray",
             "leave one of them out"),
            (several and self.device.startswith("cuda:"), f"--device {self.device} does not work with --workers",
             "name the GPUs in CUDA_VISIBLE_DEVICES, and give --device cuda"),
            (several and self.device_map is not None, "--device-map does not work with --workers",
             "leave one of them out"),
        ):  # fmt: skip
            if wrong:
                raise UserError(problem, remedy)

    def check_output(self) -> None:
        """Refuse an output folder that cannot be written, and missing data, before torch is loaded.

        Apart from `check`, since workers on other nodes do not see these folders.

        Raises:
            UserError: with the reason.
        """
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise UserError(f"data dir {self.data_dir} is not a folder", "give the folder that holds the data sets")
        if self.data_dir is not None and PATTERN.search(place := str(Path(self.data_dir).resolve())):
            raise UserError(f"data dir {place} would be read as a pattern", "rename it: no * ? [ and no ::")
        if self.device.startswith("cuda") and self.ray is None and not has_cuda():
            raise UserError(
                f"device {self.device} is not there: this machine has no CUDA driver", "give --device cpu or auto"
            )
        folder = Path(self.output)
        for path in (folder, folder / "cells", folder / "samples"):
            if path.exists() and not path.is_dir():
                raise UserError(f"output {path} exists and is not a folder", "choose another --output")
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"output {folder} cannot be written", "choose another --output")


DEFAULTS: Json = {name: getattr(RunConfig, name) for name in RunConfig.__annotations__}
HINTS = get_type_hints(RunConfig)
OPTIONS: dict[str, Option] = {
    name: next(note for note in hint.__metadata__ if isinstance(note, Option))
    for name, hint in get_type_hints(RunConfig, include_extras=True).items()
}
SECOND_NAMES = {word: name for name, option in OPTIONS.items() for word in option.second if word[0] != "-"}


def of_role(*roles: str) -> Iterator[str]:
    """Return the names of the options with one of these roles."""
    return (name for name in DEFAULTS if OPTIONS[name].role in roles)


def default_of(name: str) -> str:
    """Return the effect of leaving an option out, in words; empty where it goes without saying."""
    default, none = DEFAULTS[name], OPTIONS[name].none
    if none or default in (None, ()):
        return none
    if isinstance(default, bool):
        return "on" if default else ""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def kinds_of(name: str) -> list[Any]:
    """Return the types that an option's value may have, but None."""
    hint = HINTS[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [kind for kind in kinds if kind is not types.NoneType]


def choices_of(name: str) -> tuple[str, ...]:
    """Return the words that an option may be; empty if it may be anything else."""
    kinds = kinds_of(name)
    return get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else ()


def option_of(name: str) -> str:
    """Return an option as it is typed: `batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"


# -- reading -----------------------------------------------------------------------------------------------------


def configs_from(file: str | Path | None, given: Json) -> list[RunConfig]:
    """Return a configuration for each seed: the command line over the YAML file over the defaults.

    Where neither methods nor bits are given, those of dense in roundings follow.

    Args:
        given: on the command line; None: not given.

    Raises:
        UserError: the file cannot be read, or a key or value in it is wrong.
    """
    configs, asked = _read(file, given)
    if {"method", "ffn_bits"} & asked:
        return configs
    rivals = [rounding_at(1 - sparsity) for sparsity in configs[0].sparsity if sparsity]
    bits = tuple(dict.fromkeys(rounding.text for rounding in rivals if rounding))
    return [*configs, *(dataclasses.replace(c, method=("dense",), ffn_bits=bits) for c in configs if bits)]


def config_from(file: str | Path | None, given: Json) -> RunConfig:
    """Return the one configuration that is asked for, see `configs_from`.

    Raises:
        UserError: as there, or there are several seeds.
    """
    config, *more = _read(file, given)[0]
    if more:
        raise UserError("several seeds are given, and one is allowed", "give one")
    return config


def _read(file: str | Path | None, given: Json) -> tuple[list[RunConfig], set[str]]:
    """Return a configuration for each seed, and the names of the options that are given."""
    in_file: Json = {}
    if file is not None:
        from dart_eval.util.yamls import read_mapping

        keys = read_mapping(file, "config", "tasks: [arc, hellaswag]")
        with naming(f"{file}: "):
            in_file = named(keys)
    typed = named(given)
    settings, seeds = dict[str, Any](), [DEFAULTS["seed"]]
    for name, value in {**in_file, **typed}.items():
        with naming("" if name in typed else f"{file}: "):
            if name == "seed":
                seeds = [checked(name, seed) for seed in values.seeds(value)]
            else:
                settings[name] = checked(name, value)
    configs = [RunConfig(**settings, seed=seed) for seed in seeds]
    for name in PATHS:
        if (path := getattr(configs[0], name)) is not None:
            check_name(path, option_of(name))
    try:
        configs[0].check()
        configs[0].check_output()
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be reached ({error.strerror})", "choose another path") from None
    return configs, {*in_file, *typed}


def named(given: Mapping[Any, object]) -> Json:
    """Return the values that are given by our names: lm-eval has others, and puts some into `model_args`.

    Raises:
        UserError: a name is unknown, or one option is given twice.
    """
    pairs = [(str(name).replace("-", "_"), values.plain(value)) for name, value in given.items() if value is not None]
    try:
        arguments = values.pairs("model_args", dict(pairs).get("model_args", {}))
    except ValueError as error:
        raise UserError(f"model_args {error}") from None
    if arguments:
        pairs = [(name, value) for name, value in pairs if (name, value) not in [("model", b) for b in BACKENDS]]
    for name, value in arguments.items():
        name = "model" if name == "pretrained" else name
        pairs.append((name, str(value) if name in DEFAULTS and kinds_of(name) == [str] else value))
    found: Json = {}
    for name, value in pairs:
        name = SECOND_NAMES.get(name, name)
        if name == "model_args":
            continue
        if name not in DEFAULTS:
            raise retired("option", name.replace("_", "-")) or UserError(
                f"unknown key {name!r}", nearest(name, DEFAULTS)
            )
        if name in found and found[name] != value:
            problem = f"{name} is given twice: {short_repr(found[name])} and {short_repr(value)}"
            raise UserError(problem, "leave one of them out")
        found[name] = value
    return found


def config_of(given: Json) -> RunConfig:
    """Return a configuration of these values and the defaults; whether they go together shows later (`check`).

    Raises:
        UserError: a name or a value is wrong.
    """
    return RunConfig(**{name: checked(name, value) for name, value in named(given).items()})


def checked(name: str, value: object) -> Any:
    """Return one value as `RunConfig` has it.

    Raises:
        UserError: it is wrong.
    """
    try:
        return getattr(RunConfig(**{name: values.plain(value)}), name)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        reasons = [re.sub(r"^\w+ should", "must", e["msg"].removeprefix("Value error, ")) for e in errors]
        problem, _, remedy = " or ".join(reasons).partition("; ")
        meaning = OPTIONS[name].help.partition(". ")[0]
        raise UserError(f"{name} {short_repr(errors[0]['input'])} {problem}", remedy or meaning) from None
