"""The configuration of a run: options (see `options`) from a YAML file and the command line, checked together.

`config_from` says in one line what it refuses. Nothing here imports torch: wrong input is refused at once.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from dart_eval.evaluation.settings import EvalSettings
from dart_eval.sweep import values
from dart_eval.sweep.options import DEFAULTS, SECOND_NAMES, Options, choices_of, option_of, typed
from dart_eval.sweep.values import Refused, short_repr
from dart_eval.util.bits import rounding_at
from dart_eval.util.errors import UserError, naming, nearest
from dart_eval.util.files import check_name
from dart_eval.util.machine import has_cuda
from dart_eval.util.retired import retired
from dart_eval.util.text import Json

if TYPE_CHECKING:
    from dart_eval.models.loading import ModelSpec

PATTERN = re.compile(r"[*?\[]|::")  # `datasets` looks for all files that match such a name
BACKENDS = ("hf", "huggingface")  # of `--model` in lm-eval, where `model_args` names the model
PATHS = ("model", "peft", "data_dir", "calibration", "output")
TYPES = {"int_type": "a whole number", "bool_type": "true or false"}


@dataclass(frozen=True, config=ConfigDict(defer_build=True, extra="forbid"))
class RunConfig(Options):
    """The options of a run, and what follows from them."""

    @property
    def model_spec(self) -> ModelSpec:
        """The model as `models.resolve` takes it."""
        from dart_eval.models.loading import ModelSpec

        return ModelSpec(self.model, **{f.name: getattr(self, f.name) for f in fields(ModelSpec)[1:]})

    @property
    def eval_settings(self) -> EvalSettings:
        """How tasks are asked, as `evaluation` takes it."""
        return EvalSettings(
            self.num_fewshot, self.limit, self.seed, self.chat_template, self.scope, self.system_instruction,
            self.fewshot_as_multiturn,
        )  # fmt: skip

    @property
    def calibration_size(self) -> int | None:
        """Tokens of the calibration text that are read at most; None: all."""
        whole = self.calibration is None or Path(self.calibration).is_file()
        return None if whole else values.DATA_SET_TOKENS

    def check(self) -> None:
        """Refuse options that contradict each other, and values that no run could use.

        Raises:
            UserError: the first thing that is wrong.
        """
        if self.chunk < 4:
            raise UserError(f"--chunk {self.chunk} is too short for perplexity", "use some hundred tokens or more")
        if self.fewshot_as_multiturn and not self.chat_template:
            raise UserError("--fewshot-as-multiturn needs --chat-template", "give both, or neither")
        if self.enable_thinking is not None and not self.chat_template:
            typed = f"--{'' if self.enable_thinking else 'no-'}enable-thinking"
            raise UserError(f"{typed} needs --chat-template", "add --chat-template")
        if self.enable_thinking and self.think_end_token is None:
            raise UserError(
                "--enable-thinking needs the token that ends thinking", "add --think-end-token, such as </think>"
            )
        for folder in self.include_path:
            check_name(folder, "--include-path")
            if not Path(folder).is_dir():
                raise UserError(f"include path {folder} is not a folder", "give one with task YAML files")
        if self.gpus_per_cell is not None and (self.ray is None or self.device == "cpu"):
            raise UserError("--gpus-per-cell needs --ray and no --device cpu", "leave it out")
        if self.ray is not None and self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {self.device} does not work with --ray", "give auto, cpu or cuda")
        if self.workers > 1 and self.ray is not None:
            raise UserError(f"--workers {self.workers} does not work with --ray", "leave one of them out")
        if self.workers > 1 and self.device.startswith("cuda:"):
            remedy = "name the GPUs in CUDA_VISIBLE_DEVICES, and give --device cuda"
            raise UserError(f"--device {self.device} does not work with --workers", remedy)
        if self.workers > 1 and self.device_map is not None:
            raise UserError("--device-map does not work with --workers", "leave one of them out")
        if not self.method or not self.sparsity:
            raise UserError("no method or no sparsity given", "give --method dense,dart --sparsity 0.5,0.7")
        if self.calibration is not None and not values.may_be_text(self.calibration):
            raise UserError(f"calibration text {self.calibration} is not a file")

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


def config_from(file: str | Path | None, given: Json) -> RunConfig:
    """Return a configuration: the command line (None: not given) over the YAML file over the defaults.

    Raises:
        UserError: the file cannot be read, or a key or value in it is wrong, or there are several seeds.
    """
    config, *more = _configs(file, given)[0]
    if more:
        raise UserError("several seeds are given, and one is allowed", "give one")
    return config


def configs_from(file: str | Path | None, given: Json) -> list[RunConfig]:
    """Return `config_from` for each seed, and where neither methods nor bits are given those of dense in roundings."""
    configs, asked = _configs(file, given)
    if not asked.isdisjoint(("method", "ffn_bits")):
        return configs
    rivals = [rounding_at(1 - sparsity) for sparsity in configs[0].sparsity if sparsity]
    bits = tuple(dict.fromkeys(rounding.text for rounding in rivals if rounding))
    beside = [dataclasses.replace(c, method=("dense",), ffn_bits=bits) for c in configs if bits]
    return [*configs, *beside]


def _configs(file: str | Path | None, given: Json) -> tuple[list[RunConfig], set[str]]:
    """Return a configuration for each seed, and the names of the options that are given."""
    merged: Json = {}
    if file is not None:
        from dart_eval.util.yamls import read_mapping

        for key, value in read_mapping(file, "config", "tasks: [arc, hellaswag]").items():
            name = str(key).replace("-", "_")
            if name in merged:
                raise UserError(f"{name} is given twice in {file}", "leave one of them out")
            if value is not None:
                merged[name] = value
        with naming(f"{file}: "):
            translate(merged)
    said = {name: value for name, value in given.items() if value is not None}
    translate(said)
    of_file = merged.keys() - said.keys()
    merged |= said
    places = dict.fromkeys(of_file, f"{file}: ")
    with naming(places.get("seed", "")):
        seeds = values.seeds(merged.pop("seed", DEFAULTS["seed"]))
    found = [made({**merged, "seed": seed}, places, f" in {file}" if file is not None else "") for seed in seeds]
    for key in PATHS:
        if (path := getattr(found[0], key)) is not None:
            check_name(path, option_of(key))
    try:
        found[0].check()
        found[0].check_output()
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be reached ({error.strerror})", "choose another path") from None
    return found, {*merged}


def translate(given: Json) -> None:
    """Put our names in place of lm-eval's: second names of options, and what its `model_args` hold.

    Raises:
        UserError: one is given twice.
    """
    named = [(name, given.pop(second)) for second, name in SECOND_NAMES.items() if second in given]
    model_args = values.pairs("model_args", given.pop("model_args", {}))
    if model_args and given.get("model") in BACKENDS:
        del given["model"]
    for name, value in model_args.items():
        own = "model" if name == "pretrained" else name
        named.append((own, str(value) if own in DEFAULTS and typed(own) is str else value))
    for name, value in named:
        if given.setdefault(name, value) != value:
            problem = f"{name} is given twice: {short_repr(given[name])} and {short_repr(value)}"
            raise UserError(problem, "leave one of them out")


def made(given: Json, where: Mapping[str, str] | None = None, place: str = "") -> RunConfig:
    """Return a configuration of these values and the defaults.

    Args:
        where: name -> beginning of a message about its value. place: end of a message about an unknown name.

    Raises:
        UserError: a name or a value is wrong.
    """
    for name in given:
        if name not in DEFAULTS:
            left = retired("option", name.replace("_", "-"))
            raise left or UserError(f"unknown key {name!r}{place}", nearest(name, DEFAULTS))
    try:
        return RunConfig(**{name: values.plain(value) for name, value in given.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        with naming((where or {}).get(str(first["loc"][0]), "")):
            raise _refused(first) from None


def checked(name: str, value: object) -> Any:
    """Return one value as `RunConfig` has it.

    Raises:
        UserError: it is wrong.
    """
    return getattr(made({name: value}), name)


def _refused(error: ErrorDetails) -> UserError:
    """Return one of pydantic's errors in our words."""
    name, value, kind, told = str(error["loc"][0]), error["input"], str(error["type"]), error.get("ctx", {})
    if isinstance(refused := told.get("error"), Refused):
        return refused.told
    if kind == "literal_error" and isinstance(value, str):
        return UserError(f"unknown {name} {value!r}", nearest(value, choices_of(name)))
    if kind == "literal_error":
        return values.no_text(name, value)
    if kind == "less_than":
        return UserError(f"{name} is too large", "give a number below 2^32")
    if kind == "greater_than_equal":
        least = f"at least {told['ge']:g}" if told["ge"] else ""
        return UserError(f"{option_of(name)} {short_repr(value)} must {f'be {least}' if least else 'not be negative'}")
    return UserError(f"{name} must be {TYPES.get(kind, 'a number')}, not {short_repr(value)}")
