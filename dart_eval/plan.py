"""From a configuration to cells: what will be run, each with a key that tells its numbers apart from all others."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import platform
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dart_eval.errors import UserError, naming, nearest
from dart_eval.evaluation.batching import check_batch_size
from dart_eval.evaluation.evaluate import EvalSettings
from dart_eval.evaluation.lm import PERPLEXITY_CHUNK
from dart_eval.evaluation.scoring import SCOPES
from dart_eval.evaluation.tasks import tasks_dir
from dart_eval.files import check_name
from dart_eval.hashes import PACKAGE, code_hash, source_hash
from dart_eval.models import ModelSpec, Resolved
from dart_eval.pruning.calibration import DEFAULT_TEXT
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.prune import check_sparsity
from dart_eval.pruning.registry import make, parse
from dart_eval.values import checked
from dart_eval.yamls import read_mapping

EXECUTORS = ("local", "ray")
RAY_DEVICES = ("auto", "cpu", "cuda")
PATHS = ("model", "data_dir", "calibration", "output")
RAY_OPTIONS = ("ray_address", "gpus_per_cell", "cpus_per_cell", "shards")
# What `command` says in another way, or has no need to say.
NO_OPTION_OF_A_CELL = (
    "method", "allocation", "sparsity", "tasks", "output", "force", "log", "log_project", "executor", *RAY_OPTIONS,
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Everything `dart-eval run` can be told; the keys of run.yaml are these names.

    Attributes:
        model, revision, dtype, device, device_map, trust_remote_code: which model and how to load it (see `ModelSpec`).
        confirm_run_unsafe_code: tasks may run code that the model writes, and metrics that stand in the working
            directory.
        method: methods as typed, `griffin` or `griffin:remask=drift:remask.window=8`.
        sparsity: shares of the FFN weights that a token does not read, each in [0, 1).
        scope: which positions run pruned when answers are scored: `scored`, or `all` and `last` of other papers.
        allocation: sparsity over layers for the methods that have a choice: uniform, depth or table:FILE; None leaves
            each method's own.
        tasks: task names.
        num_fewshot: examples before each item; None leaves each task's own number.
        limit: first items of each task only.
        batch_size: contexts per forward, or `auto`: as many as their tokens allow. Does not change the numbers in
            float32.
        share_prefix: run a prefix that many contexts have in common (few-shot examples) once. Like `batch_size`.
        seed: of few-shot sampling and of methods that draw.
        max_length: tokens of context and continuation; None is the model's.
        chunk: tokens per perplexity chunk.
        chat_template: wrap prompts in the model's chat template.
        cue: replaces the summarisation tasks' own cue.
        data_dir: local data instead of the hub.
        calibration: text file for static methods instead of the project's own.
        output: folder of results.
        force: run finished cells again.
        executor: `local` (this process) or `ray`. ray_address: of a running cluster; None starts one on this machine.
        gpus_per_cell, cpus_per_cell: what an actor takes; None: a GPU where the cluster has any, and one CPU.
        shards: parts that every cell is split into; None: as many as are worth it.
        log, log_project: also log finished cells with wandb or trackio, under this project.
    """

    model: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    confirm_run_unsafe_code: bool = False
    method: tuple[str, ...] = ("dense", "griffin", "dart")
    sparsity: tuple[float, ...] = (0.5,)
    scope: str = "scored"
    allocation: str | None = None
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | str = 8
    share_prefix: bool = True
    seed: int = 0
    max_length: int | None = None
    chunk: int = PERPLEXITY_CHUNK
    chat_template: bool = False
    cue: str | None = None
    data_dir: str | None = None
    calibration: str | None = None
    output: str = "out"
    force: bool = False
    executor: str = "local"
    ray_address: str | None = None
    gpus_per_cell: float | None = None
    cpus_per_cell: float | None = None
    shards: int | None = None
    log: str | None = None
    log_project: str = "dart-eval"

    @property
    def model_spec(self) -> ModelSpec:
        return ModelSpec(self.model, self.revision, self.dtype, self.device, self.device_map, self.trust_remote_code)

    @property
    def eval_settings(self) -> EvalSettings:
        return EvalSettings(self.num_fewshot, self.limit, self.seed, self.chat_template, self.scope)

    def check(self) -> None:
        """Refuse what no run could use.

        Raises:
            UserError: the first thing that is wrong.
        """
        check_batch_size(self.batch_size)
        for name in ("limit", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} must lie between 0 and 2^32 - 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num-fewshot {self.num_fewshot} must not be negative")
        if self.chunk < 4:
            raise UserError(f"--chunk {self.chunk} is too short for perplexity", "use some hundred tokens or more")
        if self.executor not in EXECUTORS:
            raise UserError(f"--executor {self.executor} is unknown", f"one of {', '.join(EXECUTORS)}")
        given = [n for n in RAY_OPTIONS if getattr(self, n) is not None]
        if given and self.executor != "ray":
            raise UserError(f"--{given[0].replace('_', '-')} is for Ray", "give --executor ray, or leave it out")
        if self.cpus_per_cell is not None and self.cpus_per_cell <= 0:
            raise UserError(f"--cpus-per-cell {self.cpus_per_cell:g} must be more than 0")
        if self.gpus_per_cell is not None and self.gpus_per_cell < 0:
            raise UserError(f"--gpus-per-cell {self.gpus_per_cell:g} must not be negative")
        if self.gpus_per_cell is not None and self.gpus_per_cell > 1 and self.gpus_per_cell % 1:
            raise UserError(f"--gpus-per-cell {self.gpus_per_cell:g} must be whole", "only one GPU can be shared")
        if self.executor == "ray" and self.device not in RAY_DEVICES:
            raise UserError(f"--device {self.device} is not for Ray", "give auto, cpu or cuda: Ray deals out the cards")
        if (self.device == "cpu" and self.gpus_per_cell) or (self.device == "cuda" and self.gpus_per_cell == 0):
            raise UserError(
                f"--device {self.device} and --gpus-per-cell {self.gpus_per_cell:g} contradict each other",
                "leave one of them out",
            )
        if self.shards is not None and self.shards < 1:
            raise UserError(f"--shards {self.shards} must be at least 1")
        if self.scope not in SCOPES:
            raise UserError(f"--scope {self.scope} is unknown", f"one of {', '.join(SCOPES)}")
        if not self.method or not self.sparsity:
            raise UserError("no method or no sparsity given", "for example --method dense,dart --sparsity 0.5,0.7")
        if self.calibration is not None and not Path(self.calibration).is_file():
            raise UserError(f"calibration text {self.calibration} is not a file")
        for sparsity in self.sparsity:
            check_sparsity(sparsity)

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


def config_from(file: str | Path | None, given: Mapping[str, Any]) -> RunConfig:
    """Defaults, then the YAML file, then what was given on the command line (None: not given).

    Raises:
        UserError: the file cannot be read, or a key or value in it is wrong.
    """
    values: dict[str, Any] = {}
    if file is not None:
        for key, value in read_mapping(file, "config", "tasks: [arc, hellaswag]").items():
            name = str(key).replace("-", "_")
            if name in values:
                raise UserError(f"{name} stands twice in {file}", "leave one of them out")
            if value is not None:
                values[name] = value
    values.update({k: v for k, v in given.items() if v is not None})
    known = {f.name: f for f in dataclasses.fields(RunConfig)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown key {key!r}{f' in {file}' if file else ''}", nearest(key, known))
        with naming(f"{file}: " if file and given.get(key) is None else ""):
            values[key] = checked(key, value)
    config = RunConfig(**values)
    for key in PATHS:
        if (path := getattr(config, key)) is not None:
            check_name(path, f"--{key.replace('_', '-')}")
    config.check()
    config.check_output()
    return config


@dataclass(frozen=True)
class Cell:
    """One (model, method, sparsity, task ...) combination: the unit of running and skipping.

    `inputs` is everything that can change a number, as recorded; `key` its hash, whatever the method was called: two
    spellings of one composition are one cell. `name` is for people.
    """

    method: Pruner
    sparsity: float
    task: str
    inputs: dict[str, Any] = field(compare=False)

    @property
    def key(self) -> str:
        asked = {name: value for name, value in self.inputs.items() if name != "method"}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def title(self) -> str:
        """For people: task, method with the parameters that are not its defaults, sparsity."""
        return f"{self.task} {self.method.spec}" + (f" {self.sparsity:g}" if self.method.sized else "")

    @property
    def name(self) -> str:
        sparsity = f"-{self.sparsity:g}" if self.method.sized else ""
        return f"{self.task}-{self.method.name}{sparsity}"


def methods_of(config: RunConfig) -> list[Pruner]:
    """The methods to run, each checked; the run's seed and allocation go to those that have one and were given none.

    Raises:
        UserError: unknown method or parameter.
    """
    made: list[Pruner] = []
    for spec in config.method:
        name, params = parse(spec)
        method = make(name, params)
        given = {path.partition(".")[0] for path in params}
        ours: dict[str, Any] = {}
        if config.allocation is not None and "allocation" not in given and not method.mask.fixed:
            ours["allocation"] = config.allocation
        if "score.seed" in method.params() and not {"seed", "score.seed"} & set(params):
            ours["score.seed"] = config.seed
        if ours:
            method = make(name, {**params, **ours})
        for sparsity in config.sparsity if method.sized else ():
            method.allocation.check(sparsity)
        if method not in made:
            made.append(method)
    return made


def plan(
    config: RunConfig, model: Resolved, tasks: Sequence[str], hashes: Mapping[str, str], device: str,
    drawn: Collection[str] = (),
) -> list[Cell]:  # fmt: skip
    """All cells, task by task; a method that does not prune comes once, whatever the sparsities.

    Args:
        model: found, not loaded. tasks: expanded names. hashes: task -> hash of its configuration and documents.
        device: type of device (cpu, cuda): kernels differ in their last bits.
        drawn: those of the tasks that draw their answers.
    """
    cells = []
    for task in tasks:
        for method in methods_of(config):
            # The shape of a batch moves last digits. They show in half precision, and where a token chooses its
            # neurons: near a tie it takes others. What shares a batch also shares its random numbers.
            moves = model.dtype != "float32" or method.choice.chooses
            for sparsity in dict.fromkeys(config.sparsity) if method.sized else (0.0,):
                inputs = {
                    "model": model.identity.to_json(), "dtype": model.dtype, "device": device,
                    "method": method.name, "params": method.params(), "sparsity": sparsity,
                    "scope": config.scope, "execution": "masked", "task": task, "task_hash": hashes[task],
                    "num_fewshot": config.num_fewshot, "limit": config.limit, "seed": config.seed,
                    "max_length": config.max_length, "chunk": config.chunk,
                    "chat_template": config.chat_template, "cue": config.cue,
                    "batch_size": config.batch_size if moves or task in drawn else None,
                    "share_prefix": config.share_prefix if moves else None,
                    "calibration": _file_hash(config.calibration), "code": code_hash(tasks_dir()),
                    "method_code": _method_code(method),
                    "method_files": [_file_hash(f) for f in method.files()], "versions": versions(),
                }  # fmt: skip
                cells.append(Cell(method, sparsity, task, inputs))
    return cells


def command(config: RunConfig, cell: Cell) -> str:
    """The line that makes this one cell, for a shell: options that differ from their defaults, its own method.

    Of a model that was handed over in Python it is a line of Python.
    """
    words = ["dart-eval", "run", "--tasks", cell.task, "--method", cell.method.spec]
    if cell.method.sized:
        words += ["--sparsity", f"{cell.sparsity:g}"]
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)}
    told = {k: v for k, v in options.items() if k not in NO_OPTION_OF_A_CELL and v != getattr(RunConfig, k)}
    if cell.inputs["model"].get("loaded"):
        return _call(cell, told)
    return command_line(words, told)


def _call(cell: Cell, options: Mapping[str, Any]) -> str:
    """The line of Python that makes a cell of a loaded model, which no command can name."""
    said: dict[str, Any] = {"tasks": cell.task, "method": cell.method.spec}
    if cell.method.sized:
        said["sparsity"] = cell.sparsity
    words = ", ".join(f"{name}={value!r}" for name, value in {**said, **options}.items())
    return f"dart_eval.evaluate(model, tokenizer, {words})"


def command_line(words: Sequence[str], options: Mapping[str, Any]) -> str:
    """A line for a shell: `words`, then the options that are not None, by the names of `RunConfig`."""
    line = [*words]
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            line += [f"--{name}", str(value)]
    return shlex.join(line)


def versions() -> dict[str, str]:
    """Versions that numbers depend on."""
    return {
        name: version(name)
        for name in ("torch", "transformers", "tokenizers", "lm_eval", "datasets", "rouge-score", "sacrebleu")
    }


def environment() -> dict[str, str]:
    """Versions, as recorded beside the numbers."""
    return {**versions(), "dart-eval": version("dart-eval"), "python": platform.python_version()}


def _method_code(method: Pruner) -> str | None:
    """Hash of the modules of parts from other packages; ours are part of `code_hash`."""
    modules = [inspect.getmodule(type(p)) for p in method.parts() if type(p).__module__.split(".")[0] != PACKAGE.name]
    try:
        sources = sorted({source_hash(inspect.getsource(module)) for module in modules if module is not None})
    except OSError:
        return None
    return " ".join(sources) or None


def _file_hash(path: str | None) -> str:
    return hashlib.sha256(Path(path or DEFAULT_TEXT).read_bytes()).hexdigest()
