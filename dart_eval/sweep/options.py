"""The options of a run: one model for the command line, run.yaml, `dart_eval.evaluate`, keys of cells and the docs.

pydantic checks the values; `config_of` says in one line what it refuses. Nothing here imports torch, so that wrong
input is refused at once.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

from dart_eval.evaluation.settings import EvalSettings, check_generation
from dart_eval.models.spec import ModelSpec
from dart_eval.results.inputs import notes
from dart_eval.util.bits import OWN_BITS, rounding_at
from dart_eval.util.bits import parse as parse_bits
from dart_eval.util.errors import UserError, naming, nearest
from dart_eval.util.files import check_name
from dart_eval.util.machine import has_cuda
from dart_eval.util.retired import retired
from dart_eval.util.text import Json, items_of, short_repr

TASKS, PRUNING, MODEL, OUTPUT, CLUSTER = "Tasks", "Pruning", "Model", "Output", "Cluster"  # panels of the help

# The role of an option in a cell. CELL tells cells apart; KEY stands in the key; GIVEN stands there only if given, so
# that cells older than the option are found; DECIDES decides something in the key; RUN concerns the run alone.
CELL, KEY, GIVEN, DECIDES, RUN = "cell", "key", "given", "decides", "run"

MOST = 2**32  # no count of anything is as large
AUTO = "auto"  # as a batch size: as many as fit
DEVICE = r"^(auto|(cpu|cuda|mps|xpu)(:\d+)?)$"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}  # short names
DATA_SET_TOKENS = 16384  # that a calibration reads of a data set
TEXT_FILES = (".txt", ".md", ".json", ".jsonl")  # no data set is called so
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


# -- values ------------------------------------------------------------------------------------------------------


def plain(value: object) -> Any:
    """Return a value of Python: numbers and arrays of numpy become plain, a path its text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return str(value) if isinstance(value, Path) else value


def number(value: Any) -> Any:
    """Return a text as the number that it is; what is none is refused under its option's name."""
    for read in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            return read(value)
    return value


def _items(value: object) -> tuple[Any, ...]:
    return tuple(map(plain, items_of(value)))


def _sparsities(value: object) -> tuple[float, ...]:
    from dart_eval.pruning.registry import check_sparsity  # not for `--help`: it takes a tenth of a second

    return tuple(float(check_sparsity(number(item))) for item in _items(value))


def _ffn_bits(value: object) -> tuple[str, ...]:
    """Return bits of an FFN weight, each written in full: `16`, `4`, `4:64`."""
    roundings = [parse_bits(str(item)) for item in items_of(value)]
    return tuple(dict.fromkeys(rounding.text if rounding else str(OWN_BITS) for rounding in roundings))


def read_settings(value: object) -> Json:
    """Return the settings in `a=1,b=[2, 3]` or JSON, in one text or several, or of a mapping.

    A comma separates settings only where a name and "=" follow. Values have the type that their text looks like.

    Raises:
        ValueError: the text has none.
    """
    if isinstance(value, dict):
        return {str(name): item for name, item in value.items()}
    text = ",".join(str(item) for item in (value if isinstance(value, (list, tuple)) else [value]) if item != "")
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return dict(json.loads(text))
    pairs = [piece.partition("=") for piece in re.split(r",(?=\s*\w+\s*=)", text) if piece.strip()]
    if not all(equals and name.strip() for name, equals, _ in pairs):
        raise ValueError("is not KEY=VALUE; write KEY=VALUE,KEY=VALUE")
    return {name.strip(): _literal(item.strip()) for name, _, item in pairs}


def _literal(text: str) -> Any:
    """Return a value of the type that its text looks like."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def _generation(value: object) -> str | None:
    """Return settings of generation in one spelling, `do_sample=true,temperature=0.5`: it stands in keys of cells."""
    settings = read_settings(value or "")
    check_generation(settings)
    spelled = ",".join(f"{name}={_spelled(settings[name])}" for name in sorted(settings))
    if read_settings(spelled) != settings:
        raise ValueError("has a text that looks like further settings; leave the '=' in it out")
    return spelled or None


def _spelled(value: object) -> str:
    """Return the text of a value that `read_settings` reads as the same value."""
    if isinstance(value, bool):
        return str(value).lower()
    bare = isinstance(value, str) and value and "," not in value and value[0] not in "\"'"
    return str(value) if bare and _literal(str(value).strip()) == value else repr(value)


# -- the options -------------------------------------------------------------------------------------------------

# Which tokens run pruned when answers are scored: `evaluation.scoring` and `evaluation.scopes` say how.
Scope = Literal["scored", "continuation", "all", "last", "decode"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SCOPES: tuple[str, ...] = get_args(Scope)

Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(os.path.expanduser)]
Whole = Annotated[int, BeforeValidator(number), Strict(), Field(ge=0, lt=MOST)]
Count = Annotated[int, BeforeValidator(number), Strict(), Field(ge=1, lt=MOST)]
Share = Annotated[float, BeforeValidator(number), Strict(), Field(gt=0, lt=1)]
Flag = Annotated[bool, Strict()]


@dataclass(frozen=True, config=ConfigDict(defer_build=True, extra="forbid", coerce_numbers_to_str=True))
class RunConfig(ModelSpec, EvalSettings):
    """All options of `dart-eval run`, which are the keys of run.yaml, and what follows from them."""

    # fmt: off
    model: Annotated[Text | None, Option(MODEL, "NAME", DECIDES,
        "Prune this model: a hub id, a local folder, or gemma-3-270m.", "the demo model", second=("-m", "-M"))] = None
    revision: Annotated[Text | None, Option(MODEL, "NAME", DECIDES,
        "Use this branch, tag or commit of the model on the hub.")] = None
    dtype: Annotated[Dtype, BeforeValidator(lambda name: DTYPES.get(str(name), name)), Option(MODEL, "TYPE", DECIDES,
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
    method: Annotated[tuple[Text, ...], BeforeValidator(_items), Field(min_length=1), Option(PRUNING, "NAMES", CELL,
        "Run these methods, comma-separated: a name, or a name with options, such as dart:remask.window=8. "
        "`dart-eval ls methods` lists them. Without it and --ffn-bits, dense runs in a rounding of each read, too.")
    ] = ("dense", "noise", "griffin", "dart", "grinqh")
    sparsity: Annotated[tuple[float, ...], BeforeValidator(_sparsities), Field(min_length=1), Option(PRUNING,
        "SHARES", CELL,
        "Run at these sparsities, comma-separated, from 0 to below 1: the share of FFN weight bytes that a decoded "
        "token does not read.")] = (0.5,)
    ffn_bits: Annotated[tuple[str, ...], BeforeValidator(_ffn_bits), Field(min_length=1), Option(PRUNING, "BITS", CELL,
        "Round the FFN weights to this many bits first, comma-separated: 4, or 4:64 for groups of 64 weights "
        "(default 32). q3_k, q4_k and q5_k are formats of llama.cpp; 16 does not round. By the calibration text: "
        "gptq4:32, gptq4:32+down5:128 (by matrix) and q4_k+imatrix.")] = ("16",)
    scope: Annotated[Scope, Option(PRUNING, "SCOPE", DECIDES,
        "Choose which tokens run pruned when an answer is scored. scored: the last prompt token and the answer. "
        "continuation, all, last, decode: scopes of papers, see docs/concepts.md.")] = "scored"
    tasks: Annotated[tuple[Text, ...], BeforeValidator(_items), Option(TASKS, "NAMES", CELL,
        "Run these tasks, comma-separated: arc, hellaswag, mmlu, xsum, smoke, or any name of lm-eval.",
        second=("-t",))] = ()
    num_fewshot: Annotated[Whole | None, Option(TASKS, "N", KEY,
        "Put this many few-shot examples before each item.", "the task's own", second=("-f",))] = None
    limit: Annotated[Count | Share | None, Option(TASKS, "N", KEY,
        "Run only the first N items of each task (of each member of a group), or below 1 this share of them.",
        "all", second=("-L",))] = None
    include_path: Annotated[tuple[Place, ...], BeforeValidator(_items), Option(TASKS, "DIRS", DECIDES,
        "Add the tasks of these folders, comma-separated: YAML files in lm-eval's format. Python code that they "
        "name runs only with --confirm-run-unsafe-code.")] = ()
    batch_size: Annotated[Count | Literal["auto"], Option(TASKS, "N|auto", DECIDES,
        "Run this many contexts per forward; auto runs as many as fit. In float32 it changes only last digits, "
        "except where tokens choose what they read (grinqh, cats, teal, routed experts) or answers are sampled.",
        second=("-b",))] = 8
    kl: Annotated[Flag, Option(TASKS, "", DECIDES,
        "Measure KL divergence and top-1 agreement of scored tokens with dense; finished cells need --force.",
        off="Do not measure KL divergence and top-1 agreement with dense: scoring takes less time.")] = True
    kl_room: Annotated[float, BeforeValidator(number), Strict(), Field(gt=0, lt=MOST), Option(TASKS, "GB", DECIDES,
        "Keep up to so many gigabytes of dense's hidden states of a task in --output, for the KL divergence of all "
        "rows; a task with more has none.")] = 1.0
    seed: Annotated[Whole, Option(TASKS, "N", KEY,
        "Seed few-shot sampling, and methods that draw at random. Several seeds make one cell each.")] = 0
    max_length: Annotated[Count | None, Option(TASKS, "N", KEY,
        "Limit context and answer together to this many tokens.", "the model's")] = None
    chunk: Annotated[int, BeforeValidator(number), Strict(), Field(ge=4, lt=MOST), Option(TASKS, "N", KEY,
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
    gen_kwargs: Annotated[str | None, BeforeValidator(_generation), Option(TASKS, "K=V,...", GIVEN,
        "Generate with these settings, which override each task's own: temperature=0.7,do_sample=true.")] = None
    confirm_run_unsafe_code: Annotated[Flag, Option(TASKS, "", DECIDES,
        "Allow tasks to run code: programs that the model writes (humaneval, mbpp), Python files that tasks of "
        "--include-path name, and metrics in the working directory.")] = False
    data_dir: Annotated[Place | None, Option(TASKS, "DIR", DECIDES,
        "Read task data from this folder instead of the hub, see docs/data.md.")] = None
    calibration: Annotated[Place | None, Option(PRUNING, "FILE|DATASET", DECIDES,
        "Calibrate methods such as flap, and gptq4:32, on this text file, or the train split of this data set: NAME or "
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
        """Refuse options that contradict each other, values that no run could use, and an output without a place.

        Raises:
            UserError: the first thing that is wrong.
        """
        for folder in self.include_path:
            check_name(folder, "--include-path")
            if not Path(folder).is_dir():
                raise UserError(f"include path {folder} is not a folder", "give one with task YAML files")
        text = self.calibration or ""
        if (Path(text).suffix in TEXT_FILES or text.count("/") > 1) and not Path(text).is_file():
            raise UserError(f"calibration text {text} is not a file", "give a text file, or a data set's name")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise UserError(f"data dir {self.data_dir} is not a folder", "give the folder that holds the data sets")
        cells = Path(self.output).absolute() / "cells"
        there = next(place for place in (cells, *cells.parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"output {self.output} cannot be written", "choose another --output")
        thinking, several = self.enable_thinking, self.workers > 1
        for wrong, problem, remedy in (
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
            (several and self.device.startswith("cuda:"), f"--device {self.device} does not work with --workers",
             "name the GPUs in CUDA_VISIBLE_DEVICES, and give --device cuda"),
            (several and (self.ray or self.device_map) is not None,
             f"--workers {self.workers} does not work with {'--ray' if self.ray else '--device-map'}",
             "leave one of them out"),
            (self.device.startswith("cuda") and self.ray is None and not has_cuda(),
             f"device {self.device} is not there: this machine has no CUDA driver", "give --device cpu or auto"),
        ):  # fmt: skip
            if wrong:
                raise UserError(problem, remedy)


DEFAULTS: Json = {name: getattr(RunConfig, name) for name in RunConfig.__annotations__}
HINTS = get_type_hints(RunConfig)
OPTIONS = notes(RunConfig, Option)
SECOND_NAMES = {word: name for name, option in OPTIONS.items() for word in option.second if word[0] != "-"}


def of_role(*roles: str) -> Iterator[str]:
    """Return the names of the options with one of these roles."""
    return (name for name in DEFAULTS if OPTIONS[name].role in roles)


def default_of(name: str) -> str:
    """Return the effect of leaving an option out, in words; empty where it goes without saying."""
    default, none = DEFAULTS[name], OPTIONS[name].none
    if none or default is None or default is False or default == ():
        return none
    return "on" if default is True else ",".join(map(str, default if isinstance(default, tuple) else [default]))


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
    from dart_eval.util.yamls import read_mapping

    keys = {} if file is None else read_mapping(file, "config", "tasks: [arc, hellaswag]")
    settings: Json = {}
    for place, values in ((f"{file}: ", keys), ("", given)):
        with naming(place):
            settings |= named(values)
            seeds = _items(settings.get("seed", DEFAULTS["seed"])) or [()]
            configs = [config_of({**settings, "seed": seed}) for seed in seeds]
    first = configs[0]
    for name in PATHS:
        if (path := getattr(first, name)) is not None:
            check_name(path, option_of(name))
    first.check()
    if {"method", "ffn_bits"} & settings.keys():
        return configs
    rivals = [rounding_at(1 - sparsity) for sparsity in first.sparsity if sparsity]
    bits = tuple(dict.fromkeys(rounding.text for rounding in rivals if rounding))
    return [*configs, *(dataclasses.replace(c, method=("dense",), ffn_bits=bits) for c in configs if bits)]


def config_from(file: str | Path | None, given: Json) -> RunConfig:
    """Return the configuration of one seed, without the roundings of dense; see `configs_from`."""
    first, *more = configs_from(file, given)
    if any(config.seed != first.seed for config in more):
        raise UserError("several seeds are given, and one is allowed", "give one")
    return first


def named(given: Mapping[Any, object]) -> Json:
    """Return the values that are given by our names: lm-eval has others, and puts some into `model_args`.

    Raises:
        UserError: a name is unknown, or one option is given twice.
    """
    values = {str(name).replace("-", "_"): value for name, value in given.items() if value is not None}
    try:
        arguments = read_settings(values.pop("model_args", ""))
    except ValueError as error:
        raise UserError(f"model_args {error}") from None
    if arguments and values.get("model") in BACKENDS:
        del values["model"]
    found: Json = {}
    for name, value in [*values.items(), *arguments.items()]:
        name = SECOND_NAMES.get(name, "model" if name == "pretrained" else name)
        if name not in DEFAULTS:
            unknown = UserError(f"unknown key {name!r}", nearest(name, DEFAULTS))
            raise retired("option", name.replace("_", "-")) or unknown
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
    try:
        return RunConfig(**{name: plain(value) for name, value in named(given).items()})
    except ValidationError as error:
        errors = error.errors(include_url=False)
        name, got = str(errors[0]["loc"][0]), short_repr(errors[0]["input"])
        reasons = [re.sub(r"^\w+ should match.*", "is not understood", e["msg"]) for e in errors if e["loc"][0] == name]
        reasons = [re.sub(r"^\w+ should", "must", reason.removeprefix("Value error, ")) for reason in reasons]
        problem, _, remedy = " or ".join(reasons).partition("; ")
        text = OPTIONS[name].help.partition(". ")[0].removesuffix(".")
        raise UserError(f"{name} {got} {problem}", remedy or text[0].lower() + text[1:]) from None


def checked(name: str, value: object) -> Any:
    """Return one value as `RunConfig` has it.

    Raises:
        UserError: it is wrong.
    """
    return getattr(config_of({name: value}), name)
