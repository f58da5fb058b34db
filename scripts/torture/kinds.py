"""What is fuzzed: texts that a user writes. Those of results and of models stand in `stored` and `loaded`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from random import Random
from typing import Any

import yaml

from scripts.torture.damage import ODD, PIECES, of_text, of_value
from scripts.torture.fuzz import Wrong


class Kind:
    """Cases of one kind of file.

    Attributes:
        limit: seconds that a case may take. slow: whether the command loads a model.
        told: what the last case was, for people.
        words: of a command that reads what the last case did; none where there is no such command.
    """

    limit, slow = 20.0, False

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place, self.told, self.words = folder, place, "", list[str]()

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """What must hold while cases run."""
        return contextlib.nullcontext()

    def case(self, random: Random) -> str:
        """Damage a file and read it; how it ended.

        Raises:
            UserError: it is refused. Wrong: something is not as it must be.
        """
        raise NotImplementedError

    def put(self, name: str, data: bytes) -> Path:
        """Write the case's file."""
        path = self.place / name
        path.write_bytes(data)
        self.told = repr(data[:160])
        return path


class Config(Kind):
    """`run --config`: every key that is understood has a value of its own kind."""

    TEXT = """model: tiny
method:
  - dense
  - dart:allocation=uniform
  - griffin: {remask: {part: drift, window: 8}}
sparsity: [0.5, 0.7]
ffn_bits: [16, "4:64"]
tasks: [smoke_questions, smoke_summary]
limit: 0.5
num_fewshot: 2
batch_size: auto
gen_kwargs: {temperature: 0.5, do_sample: true}
seed: 7
output: out
"""

    def case(self, random: Random) -> str:
        from dart_eval.sweep.config import DEFAULTS, config_from

        if random.random() < 0.6:
            data = yaml.safe_load(self.TEXT)
            odd = data | {random.choice([*DEFAULTS]): random.choice(ODD)}
            file = self.put("case.yaml", _dumped(random.choice([odd, of_value(random, data)])))
        else:
            file = self.put("case.yaml", of_text(random, self.TEXT))
        self.words = ["run", "--config", "case.yaml", "--plan", "--executor", "local", "--output", "out"]
        self.words += ["--model", str(self.folder / "model")]
        config = config_from(file, {})
        for key, default in DEFAULTS.items():
            value = getattr(config, key)
            if value != default and type(value) not in (str, int, float, bool, tuple):
                raise Wrong(f"{key} is {value!r}: {self.told}")
        if not all(type(s) is float and 0 <= s < 1 for s in config.sparsity):
            raise Wrong(f"sparsity is {config.sparsity}: {self.told}")
        return "read"


class Methods(Kind):
    """`--method`: what is understood can be spelled, and is understood as the same again."""

    def __init__(self, folder: Path, place: Path) -> None:
        super().__init__(folder, place)
        from dart_eval.pruning.registry import methods, parts

        self.names = [*methods()]
        self.values = ["1", "0.5", "true", "-1", "nan", "1e400", "2:4", "", "0x5", "9" * 40, "max"]
        self.paths = sorted({path for method in methods().values() for path in method.params()})
        self.values += [name for named in parts().values() for name in named]

    def case(self, random: Random) -> str:
        from dart_eval.pruning.registry import make, parse

        pairs = [f":{random.choice(self.paths)}={random.choice(self.values)}" for _ in range(random.randrange(4))]
        text = random.choice(self.names) + "".join(pairs)
        if random.random() < 0.4:
            pieces = (*":=.,", *self.names, *self.paths, *self.values, *PIECES)
            text = of_text(random, text, pieces).decode(errors="replace")
        self.told = repr(text[:160])
        asked = text.replace("\0", "")  # a shell hands on no NUL
        self.words = ["run", f"--method={asked}", "--plan", "--tasks", "smoke_questions", "--output", "out"]
        self.words += ["--model", str(self.folder / "model")] if len(asked) < 10_000 else []
        made = make(*parse(text))
        if make(*parse(made.spec)) != made:
            raise Wrong(f"{made.spec!r} is another method than {self.told}")
        return "read"


class Thresholds(Kind):
    """`check --thresholds`: a limit that is none would let everything pass."""

    TEXT = """recovery: 0.98
of_dense: 0.9
alpha: 0.05
tasks:
  smoke_questions: {recovery: 0.9}
  other: {of_dense: 0.5}
"""

    def case(self, random: Random) -> str:
        from dart_eval.results.thresholds import thresholds_from

        if random.random() < 0.5:
            file = self.put("case.yaml", _dumped(of_value(random, yaml.safe_load(self.TEXT))))
        else:
            file = self.put("case.yaml", of_text(random, self.TEXT))
        out = self.folder / "whole"
        self.words = ["check", str(out / "out"), "--baseline", str(out / "own.json"), "--thresholds", "case.yaml"]
        found = thresholds_from(file)
        limits = [found.limits, *found.tasks.values()]
        given = [found.alpha, *(x.recovery for x in limits), *(x.of_dense for x in limits if x.of_dense is not None)]
        if not all(type(x) in (int, float) and 0 < x <= 1 for x in given):
            raise Wrong(f"{found}: {self.told}")
        return "read"


def _dumped(data: Any) -> bytes:
    """YAML of any data, aliases and all."""
    try:
        return yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return json.dumps(data).encode()
