"""What `dart-eval run` can be told: every option once, with its help, its default and what it may be.

The command line, run.yaml, `dart_eval.evaluate` and docs/options.md all take them from here. pydantic checks the
values; `config_from` says in one line what it refuses. Nothing here imports torch: wrong input is refused at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

from dart_eval.sweep import scope_names, thinking, values
from dart_eval.sweep.lm_evals import translate
from dart_eval.sweep.scope_names import Scope
from dart_eval.sweep.values import MOST, Refused, short_repr
from dart_eval.util.errors import UserError, naming, nearest
from dart_eval.util.files import check_name
from dart_eval.util.yamls import read_mapping

if TYPE_CHECKING:
    from dart_eval.evaluation.evaluate import EvalSettings
    from dart_eval.models.loading import ModelSpec

RAY_DEVICES = ("auto", "cpu", "cuda")
PATHS = ("model", "peft", "data_dir", "calibration", "output")
RAY_OPTIONS = ("ray_address", "gpus_per_cell", "cpus_per_cell", "shards")
TYPES = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false"}


def _help(help: str, none: str = "", **bounds: Any) -> Any:
    """What an option means.

    Args:
        help: in a sentence. none: what happens where it is not given, if the default does not say it.
        bounds: as pydantic has them (ge, gt).
    """
    return Field(description=help, json_schema_extra={"none": none}, **bounds)


Text = Annotated[str, BeforeValidator(values.text)]
Whole = Annotated[int, Strict(), Field(lt=MOST)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RunConfig:
    """Everything `dart-eval run` can be told; the keys of run.yaml are these names."""

    model: Annotated[
        Text | None, _help("Prune this model: a hub id, a local folder, or gemma-3-270m.", "the demo model")
    ] = None
    revision: Annotated[Text | None, _help("Take this branch, tag or commit of the model on the hub.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _help("Load the weights in this number format; auto is the checkpoint's own."),
    ] = "auto"
    device: Annotated[
        Text, AfterValidator(values.device), _help("Run the model here: auto, cpu, cuda, cuda:1 or mps.")
    ] = "auto"
    device_map: Annotated[Text | None, _help("Spread the model over several GPUs, for example auto.")] = None
    peft: Annotated[
        Text | None,
        _help("Merge this adapter of PEFT (LoRA and its like) into the model: a local folder or a hub id."),
    ] = None
    trust_remote_code: Annotated[
        Flag, _help("Run Python code that comes with the model. Without this option none is run.")
    ] = False
    confirm_run_unsafe_code: Annotated[
        Flag,
        _help(
            "Let tasks run code: what the model writes (humaneval, mbpp), Python files that tasks of --include-path "
            "name, and metrics that stand in the working directory."
        ),
    ] = False
    method: Annotated[
        tuple[str, ...], BeforeValidator(values.methods),
        _help(
            "Run these methods, comma-separated: a name, or a name with other parts, such as griffin:remask=drift. "
            "`dart-eval ls methods` shows all of them."
        ),
    ] = ("dense", "griffin", "dart", "dart-plus")  # fmt: skip
    sparsity: Annotated[
        tuple[float, ...], BeforeValidator(values.sparsities),
        _help(
            "Run at these sparsities, comma-separated, from 0 to below 1: shares of the FFN weights that a token does "
            "not read. 0.5:0.9:0.1 is 0.5 to 0.9 in steps of 0.1, both ends included."
        ),
    ] = (0.5,)  # fmt: skip
    ffn_bits: Annotated[
        tuple[str, ...], BeforeValidator(values.ffn_bits),
        _help(
            "Round the FFN weights to so many bits first, comma-separated: 4, or 4:64 for groups of 64 weights (32 if "
            "not given); q3_k, q4_k and q5_k are llama.cpp's formats; 16 leaves them as they are."
        ),
    ] = ("16",)  # fmt: skip
    scope: Annotated[Scope, _help(scope_names.HELP)] = "scored"
    allocation: Annotated[
        Text | None,
        _help(
            "Spread the sparsity over layers in this way, in methods that make masks from the prompt: uniform, depth, "
            "ends, global or table:FILE.",
            "each method's own",
        ),
    ] = None
    tasks: Annotated[
        tuple[str, ...], BeforeValidator(values.texts),
        _help("Run these tasks, comma-separated: arc, hellaswag, mmlu, xsum, smoke, or any of lm-eval's names."),
    ] = ()  # fmt: skip
    num_fewshot: Annotated[Whole | None, _help("Put so many examples before each item.", "the task's own", ge=0)] = None
    limit: Annotated[
        int | float | None,
        BeforeValidator(values.limit),
        _help(
            "Ask only the first N items of each task (of each member of a group); below 1 a share of them, such as "
            "0.1.",
            "all",
        ),
    ] = None
    include_path: Annotated[
        tuple[str, ...],
        BeforeValidator(values.texts),
        _help(
            "Also know the tasks of these folders, comma-separated: YAML files as lm-eval has them. "
            "Python code that they name is not run unless --confirm-run-unsafe-code is given."
        ),
    ] = ()
    batch_size: Annotated[
        int | str, BeforeValidator(values.batch_size),
        _help(
            "Run so many contexts in a forward, or with auto as many as fit. In float32 this moves last digits only, "
            "except where tokens choose what they read (dart-plus, cats, teal, routed experts) or answers are sampled."
        ),
    ] = 8  # fmt: skip
    share_prefix: Annotated[Flag, _help("Run once what many contexts begin with, such as few-shot examples.")] = True
    kl: Annotated[Flag, _help("Measure how far scored tokens are from dense's; scoring then takes longer.")] = True
    seed: Annotated[Whole, _help("Seed few-shot sampling, and methods that draw, with this number.", ge=0)] = 0
    max_length: Annotated[
        Whole | None, _help("Fit context and answer together into so many tokens.", "the model's", ge=1)
    ] = None
    chunk: Annotated[Whole, _help("Cut perplexity texts into chunks of so many tokens; the later halves count.")] = 2048
    chat_template: Annotated[Flag, _help("Wrap prompts in the model's chat template.")] = False
    system_instruction: Annotated[
        Text | None, _help("Put this text before every prompt; in a chat template it is the system's message.")
    ] = None
    fewshot_as_multiturn: Annotated[Flag | None, _help("Make the examples turns of the chat template.")] = None
    enable_thinking: Annotated[
        Flag | None, _help("Tell the chat template to let the model think before it answers, or not to.")
    ] = None
    think_end_token: Annotated[
        Text | None,
        _help("Score what an answer says after this token alone: its text, such as </think>, or its id."),
    ] = None
    gen_kwargs: Annotated[
        str | None,
        BeforeValidator(values.generation),
        _help("Generate with these settings, which stand before each task's own: temperature=0.7,do_sample=true."),
    ] = None
    cue: Annotated[
        Text | None, _help("Put this text after the document in summarisation prompts.", "the task's own, TL;DR:")
    ] = None
    data_dir: Annotated[Text | None, _help("Read local data instead of the hub's, see docs/data.md.")] = None
    calibration: Annotated[
        Text | None,
        _help(
            "Calibrate methods such as flap on this text file, or on the train split of this data set: NAME or "
            "NAME:CONFIGURATION, local or on the hub as those of tasks.",
            "the project's own text",
        ),
    ] = None
    calibration_tokens: Annotated[
        Whole | None,
        _help(
            "Read at most so many tokens of it, in passages of 512 that are drawn.",
            f"all of a text file, {values.DATA_SET_TOKENS} of a data set",
            ge=1,
        ),
    ] = None
    calibration_seed: Annotated[Whole | None, _help("Draw the passages with this seed.", "0", ge=0)] = None
    output: Annotated[Text, _help("Write results to this folder; what is finished in it is not run again.")] = "out"
    force: Annotated[Flag, _help("Run finished cells again.")] = False
    executor: Annotated[
        Literal["local", "ray"], _help("Run cells in this process (local), or in many, on GPUs or machines (ray).")
    ] = "local"
    workers: Annotated[
        Whole,
        _help("Share the cells among so many processes on this machine, one a GPU where there are any.", ge=1),
    ] = 1
    ray_address: Annotated[
        Text | None,
        _help("Use the running Ray cluster at this address, for example auto.", "one is started on this machine"),
    ] = None
    gpus_per_cell: Annotated[Number | None, _help("Give each Ray worker so many GPUs.", "1 if there are any", ge=0)] = (
        None
    )
    cpus_per_cell: Annotated[Number | None, _help("Give each Ray worker so many CPUs.", "1", gt=0)] = None
    shards: Annotated[
        Whole | None,
        _help(
            "Split every cell into so many shards, one for a Ray worker at a time.",
            "as many as there are workers, if each gets 512 requests",
            ge=1,
        ),
    ] = None
    log: Annotated[Text | None, _help("Also log finished cells with wandb or trackio.")] = None
    log_project: Annotated[Text, _help("Log under this project.")] = "dart-eval"

    @property
    def model_spec(self) -> ModelSpec:
        """The model as `models.resolve` takes it."""
        from dart_eval.models.loading import ModelSpec

        return ModelSpec(self.model, **{f.name: getattr(self, f.name) for f in fields(ModelSpec)[1:]})

    @property
    def eval_settings(self) -> EvalSettings:
        """How tasks are asked, as `evaluation` takes it."""
        from dart_eval.evaluation.evaluate import EvalSettings

        return EvalSettings(
            self.num_fewshot, self.limit, self.seed, self.chat_template, self.scope, self.system_instruction,
            self.fewshot_as_multiturn,
        )  # fmt: skip

    @property
    def calibration_size(self) -> int | None:
        """Tokens of the calibration text that are read at most; None: all."""
        whole = self.calibration is None or Path(self.calibration).is_file()
        return self.calibration_tokens or (None if whole else values.DATA_SET_TOKENS)

    def check(self) -> None:
        """Refuse options that contradict each other, and what no run could use.

        Raises:
            UserError: the first thing that is wrong.
        """
        if self.chunk < 4:
            raise UserError(f"--chunk {self.chunk} is too short for perplexity", "use some hundred tokens or more")
        if self.fewshot_as_multiturn and not self.chat_template:
            raise UserError("--fewshot-as-multiturn needs turns", "give --chat-template, or leave it out")
        thinking.check_thinking(self.enable_thinking, self.think_end_token, self.chat_template)
        for folder in self.include_path:
            check_name(folder, "--include-path")
            if not Path(folder).is_dir():
                raise UserError(f"include path {folder} is not a folder", "give one with task YAML files")
        given = [n for n in RAY_OPTIONS if getattr(self, n) is not None]
        if given and self.executor != "ray":
            raise UserError(f"{option_of(given[0])} is for Ray", "give --executor ray, or leave it out")
        if self.workers > 1 and self.executor == "ray":
            raise UserError(f"--workers {self.workers} is for one machine without Ray", "leave --executor ray out")
        if self.workers > 1 and self.device_map is not None:
            raise UserError("--device-map gives one process all GPUs", "leave it out, or --workers")
        if self.gpus_per_cell is not None and self.gpus_per_cell > 1 and self.gpus_per_cell % 1:
            raise UserError(f"--gpus-per-cell {self.gpus_per_cell:g} must be whole", "only one GPU can be shared")
        if self.executor == "ray" and self.device not in RAY_DEVICES:
            raise UserError(f"--device {self.device} is not for Ray", "give auto, cpu or cuda: Ray deals out the cards")
        if (self.device == "cpu" and self.gpus_per_cell) or (self.device == "cuda" and self.gpus_per_cell == 0):
            raise UserError(
                f"--device {self.device} and --gpus-per-cell {self.gpus_per_cell:g} contradict each other",
                "leave one of them out",
            )
        if not self.method or not self.sparsity:
            raise UserError("no method or no sparsity given", "for example --method dense,dart --sparsity 0.5,0.7")
        if self.calibration is not None and not values.may_be_text(self.calibration):
            raise UserError(f"calibration text {self.calibration} is not a file")
        if self.calibration_seed is not None and self.calibration_size is None:
            raise UserError("--calibration-seed draws passages, and all is read", "give --calibration-tokens too")

    def check_output(self) -> None:
        """Refuse an output folder that could not be written, before anything is computed for it.

        Apart from `check`, as workers on other nodes do not see it.

        Raises:
            UserError: with the reason.
        """
        folder = Path(self.output)
        for path in (folder, folder / "cells", folder / "samples"):
            if path.exists() and not path.is_dir():
                raise UserError(f"output {path} exists and is not a folder", "choose another --output")
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"output {folder} cannot be written", "choose another --output")


DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(RunConfig)}


def help_of(name: str) -> str:
    """What an option means, in a sentence."""
    return str(_field(name).description)


def default_of(name: str) -> str:
    """What happens where an option is not given, in words; empty where that goes without saying."""
    default, said = DEFAULTS[name], str(_field(name).json_schema_extra["none"])
    if said or default in (None, ()) or isinstance(default, bool):
        return said
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def choices_of(name: str) -> tuple[str, ...]:
    """The words that an option may be; empty where it may be any."""
    return values.words(_field(name).annotation)


def _field(name: str) -> Any:
    return RunConfig.__pydantic_fields__[name]  # type: ignore[attr-defined]


def config_from(file: str | Path | None, given: Mapping[str, Any]) -> RunConfig:
    """Defaults, then the YAML file, then what was given on the command line (None: not given).

    Raises:
        UserError: the file cannot be read, or a key or value in it is wrong.
    """
    told: dict[str, Any] = {}
    if file is not None:
        for key, value in read_mapping(file, "config", "tasks: [arc, hellaswag]").items():
            name = str(key).replace("-", "_")
            if name in told:
                raise UserError(f"{name} stands twice in {file}", "leave one of them out")
            if value is not None:
                told[name] = value
    of_file = {*told} if file is not None else set()
    for name, value in given.items():
        if value is not None:
            told[name] = value
            of_file.discard(name)
    translate(told)
    config = made(told, dict.fromkeys(of_file, f"{file}: "), f" in {file}" if file is not None else "")
    for key in PATHS:
        if (path := getattr(config, key)) is not None:
            check_name(path, option_of(key))
    config.check()
    config.check_output()
    return config


def made(given: Mapping[str, Any], where: Mapping[str, str] | None = None, place: str = "") -> RunConfig:
    """A configuration of these values and the defaults.

    Args:
        where: name -> what comes before a message about its value. place: what comes after one about an unknown name.

    Raises:
        UserError: a name or a value is wrong.
    """
    for name in given:
        if name not in DEFAULTS:
            raise UserError(f"unknown key {name!r}{place}", nearest(name, DEFAULTS))
    try:
        return RunConfig(**{name: values.plain(value) for name, value in given.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        with naming((where or {}).get(str(first["loc"][0]), "")):
            raise _refused(first) from None


def checked(name: str, value: Any) -> Any:
    """One value as `RunConfig` has it.

    Raises:
        UserError: it is wrong.
    """
    return getattr(made({name: value}), name)


def _refused(error: Mapping[str, Any]) -> UserError:
    """One of pydantic's errors, as a user is told it."""
    name, value, kind, told = str(error["loc"][0]), error["input"], str(error["type"]), error.get("ctx", {})
    if isinstance(refused := told.get("error"), Refused):
        return refused.told
    if kind == "literal_error" and isinstance(value, str):
        return UserError(f"unknown {name} {value!r}", nearest(value, choices_of(name)))
    if kind == "literal_error":
        return values.no_text(name, value)
    if kind == "less_than":
        return UserError(f"{name} is too large", "give a number below 2^32")
    if kind == "greater_than":
        return UserError(f"{option_of(name)} {value:g} must be more than {told['gt']:g}")
    if kind == "greater_than_equal":
        least = f"at least {told['ge']:g}" if told["ge"] else ""
        return UserError(f"{option_of(name)} {short_repr(value)} must {f'be {least}' if least else 'not be negative'}")
    return UserError(f"{name} must be {TYPES.get(kind, 'a number')}, not {short_repr(value)}")


def option_of(name: str) -> str:
    """As it is typed: `batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"
