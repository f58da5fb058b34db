"""From a configuration to cells, each with a key that tells its numbers apart from all others."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from dart_eval.evaluation.task_names import tasks_dir
from dart_eval.pruning.registry import make, parse
from dart_eval.results.inputs import DENSE
from dart_eval.results.metrics import asked
from dart_eval.sweep.hashes import digest, method_files, shared_hash
from dart_eval.sweep.options import DECIDES, DEFAULTS, GIVEN, KEY, RunConfig, of_role, option_of
from dart_eval.util.bits import Rounding
from dart_eval.util.bits import parse as parse_bits
from dart_eval.util.text import Json

if TYPE_CHECKING:
    from dart_eval.evaluation.tasks import Tasks
    from dart_eval.models.loading import Resolved
    from dart_eval.pruning.method import Method


@dataclass(frozen=True)
class Cell:
    """One (model, method, sparsity, task ...) combination: the unit of running and skipping.

    `inputs` is everything that can change a number, as recorded; `key` its hash, whatever the method was called: two
    spellings of one composition are one cell. `rounding` is of the FFN weights, None: as they are. `config` and
    `tasks` are what it runs with. `dense` is the cell of the model itself, None if this is it. `name` is for people.
    """

    method: Method
    sparsity: float
    task: str
    inputs: Json = field(compare=False)
    rounding: Rounding | None = None
    config: RunConfig = field(default=RunConfig(), compare=False, repr=False)
    tasks: Tasks | None = field(default=None, compare=False, repr=False)
    dense: Cell | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        asked = {name: value for name, value in self.inputs.items() if name != "method"}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def title(self) -> str:
        """For people: task, method with the parameters that are not its defaults, asked read, and another scope."""
        read = f" at {asked(self.sparsity)}" if self.method.sized else ""
        bits = f" on {self.rounding.text}{'-bit' if self.rounding.plain else ''} weights" if self.rounding else ""
        scope = self.inputs.get("scope", DEFAULTS["scope"])
        return f"{self.task} {self.method.spec}{read}{bits}" + (f", {scope}" if scope != DEFAULTS["scope"] else "")

    @property
    def text(self) -> str:
        """The calibration text, for people."""
        text = self.config.calibration
        if text is not None:
            return Path(text).name if Path(text).is_file() else text
        both = ["text"] * self.method.calibrates + ["prose"] * bool(self.rounding and self.rounding.by)
        return f"the shipped {' and '.join(both)}"

    @property
    def name(self) -> str:
        sparsity = f"-{self.sparsity:g}" if self.method.sized else ""
        bits = f"-{self.rounding.text.replace(':', '-')}{'bit' if self.rounding.plain else ''}" if self.rounding else ""
        return f"{self.task}-{self.method.name}{sparsity}{bits}"


def methods_of(config: RunConfig) -> list[Method]:
    """Return the methods to run, checked; the run's seed is that of what is drawn without one of its own.

    Raises:
        UserError: unknown method or parameter.
    """
    made: list[Method] = []
    for spec in config.method:
        name, params = parse(spec)
        seeds = {path: config.seed for path in make(name, params).valid_options() if path.endswith(".seed")}
        method = make(name, {**seeds, **params})
        for sparsity in config.sparsity if method.sized else ():
            method.check_sparsity(sparsity)
        if method not in made:
            made.append(method)
    return made


def plan(
    config: RunConfig, model: Resolved, hashes: Mapping[str, str], device: str, drawn: Collection[str] = (),
    shelf: Tasks | None = None,
) -> list[Cell]:  # fmt: skip
    """Return all cells, task by task. A method that does not prune has one cell, whatever the sparsities.

    Args:
        model: found, not loaded. hashes: task -> hash of its configuration and documents.
        device: type of device (cpu, cuda): kernels differ in their last bits.
        drawn: those of the tasks that draw their answers. shelf: has the tasks.
    """
    from dart_eval.evaluation.calibration_text import calibration_text  # imports torch
    from dart_eval.pruning.calibration import DEFAULT_TEXT, ROUNDING_TEXT

    texts = (config.calibration or str(shipped) for shipped in (DEFAULT_TEXT, ROUNDING_TEXT))
    text, longer = (calibration_text(name, config.data_dir).digest for name in texts)
    # What options that are gone would say by default: cells of theirs are found.
    size = config.calibration_size
    drawn_tokens = {} if size is None else {"calibration_tokens": size, "calibration_seed": 0}

    def cell(task: str, method: Method, sparsity: float, rounding: Rounding | None, dense: Cell | None) -> Cell:
        # The shape of a batch moves last digits. They show in half precision, and where a token chooses its neurons
        # or inputs, or a router its experts: near a tie it takes others. A batch also shares its random numbers.
        moves = model.dtype != "float32" or method.by_token or model.routes
        read = [text] * method.calibrates + [longer] * bool(rounding and rounding.by)
        inputs = {
            "model": model.identity.to_json(), "dtype": model.dtype, "device": device,
            "method": method.name, "params": method.params(), "sparsity": sparsity,
            **settings_of(config), **({} if method.prunes else {"scope": DEFAULTS["scope"]}),  # no matter to dense
            "execution": "masked", "task": task, "task_hash": hashes[task],
            "batch_size": config.batch_size if moves or task in drawn else None,
            "share_prefix": True if moves else None,
            "calibration": "+".join(dict.fromkeys(read)) or None, "code": shared_hash(tasks_dir()),
            "method_code": digest(method_files(method)), "versions": versions(),
            "method_files": [hashlib.sha256(content).hexdigest() for content in method.contents()],
            **(drawn_tokens if read else {}),
            **({} if rounding is None else {"ffn_bits": rounding.text}),
        }  # fmt: skip
        return Cell(method, sparsity, task, inputs, rounding, config, shelf, dense)

    cells = []
    for task in hashes:
        plain = cell(task, make(DENSE), 0.0, None, None)
        for method in methods_of(config):
            for sparsity in dict.fromkeys(config.sparsity) if method.sized else (0.0,):
                for rounding in map(parse_bits, config.ffn_bits):
                    one = cell(task, method, sparsity, rounding, plain)
                    cells.append(plain if one.key == plain.key else one)
    return cells


def settings_of(config: RunConfig) -> Json:
    """Return the inputs of cells that the options alone decide, the scope of pruned cells among them."""
    given = {name: value for name in of_role(GIVEN) if (value := getattr(config, name)) is not None}
    return {"scope": config.scope, "cue": None, **{name: getattr(config, name) for name in of_role(KEY)}, **given}


def command(config: RunConfig, cell: Cell) -> str:
    """Return the shell command of this one cell: its method, and the options that differ from their defaults.

    For a model that was handed over in Python it is a line of Python.
    """
    said: Json = {"tasks": cell.task, "method": cell.method.spec}
    if cell.method.sized:
        said["sparsity"] = cell.sparsity
    if cell.rounding is not None:
        said["ffn_bits"] = cell.rounding.text
    said |= {k: v for k in of_role(KEY, GIVEN, DECIDES) if (v := getattr(config, k)) != DEFAULTS[k]}
    if cell.inputs["model"].get("loaded"):  # no command can name it
        said = {"name": cell.inputs["model"]["name"], **said}
        return f"dart_eval.evaluate(model, tokenizer, {', '.join(f'{k}={v!r}' for k, v in said.items())})"
    line = ["dart-eval", "run"]
    for key, value in said.items():
        if isinstance(value, bool):
            line.append(option_of(key) if value else f"--no-{key.replace('_', '-')}")
        elif value is not None:
            line += [option_of(key), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(line)


@functools.cache  # many cells ask the same
def versions() -> dict[str, str]:
    """Return the versions that numbers depend on."""
    return {
        name: version(name)
        for name in ("torch", "transformers", "tokenizers", "lm_eval", "datasets", "rouge-score", "sacrebleu")
    }


def environment() -> dict[str, str]:
    """Return the versions that are recorded beside the numbers."""
    return {**versions(), "dart-eval": version("dart-eval"), "python": platform.python_version()}
