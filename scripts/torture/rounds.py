"""Prune, generate, restore, thousands of times: weights bit for bit, nothing left behind, no growth of memory."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scripts.torture.ledger import MOST, Result, Unit, drawn
from tests.helpers.commands import start
from tests.helpers.sessions import RESTLESS

# Of every kind of method one or two that change their masks or choices while they decode.
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("griffin", {}), ("dart", RESTLESS), ("dart-code", {**RESTLESS, "remask.dense_tokens": 2}), ("grinqh", {}),
    ("dart-choice", {**RESTLESS, "remask.every": 4}), ("pop", {"remask": "drift", **RESTLESS}), ("flap", {}),
    ("griffin", {"draw": "sample", "remask": "drift", **RESTLESS}), ("cats", {}),
    ("teal", {}), ("rounding", {}), ("magnitude", {"choice": "gate-up"}),
)  # fmt: skip
DENSE = ("pop", "flap", "teal", "grinqh", "rounding")  # not made for experts
FAMILIES = ("llama", "gemma3", "gpt2", "opt", "phi3", "mixtral", "qwen3_moe", "falcon_h1")
ROUNDS, EVERY, TOKENS, LENGTH = 250, 7, 8, 12
SLACK, OBJECTS = 8 << 20, 200  # bytes and objects by which a process may grow from its second lap to its last


class Setting(NamedTuple):
    """What a round runs."""

    method: str
    params: dict[str, Any]
    execution: str
    batch: int


def units(folder: Path, seed: int, short: bool) -> Iterator[Unit]:
    """A family each, in a process of its own, so that its memory is its own."""
    for family in FAMILIES[::3] if short else FAMILIES:
        name = f"rounds/{family}"
        yield Unit(name, "rounds", functools.partial(_apart, folder, seed, name, family, 28 if short else ROUNDS))


def _apart(folder: Path, seed: int, name: str, family: str, rounds: int) -> Result:
    answer = folder / "round.json"
    answer.unlink(missing_ok=True)
    process = start(_work, str(answer), seed, name, family, rounds)
    process.join()
    if not answer.exists():
        return Result(fell=[f"{name}: the process died (status {process.exitcode})"])
    return Result(**json.loads(answer.read_text()))


def _work(answer: str, seed: int, name: str, family: str, rounds: int) -> None:
    """In a process: all rounds of a family, lap after lap over all settings."""
    model, result, moments = _model(family), Result(), drawn(seed, name)
    methods = [m for m in METHODS if family not in ("mixtral", "qwen3_moe") or m[0] not in DENSE]
    settings = [
        Setting(m[0], m[1], how, batch) for m, how, batch in itertools.product(methods, ("auto", "masked"), (1, 2))
    ]
    moments.shuffle(settings)
    if rounds < 2 * len(settings):
        settings = settings[: rounds // 4]
    worn, sizes = Worn(model), []
    for number, setting in zip(range(rounds), itertools.cycle(settings), strict=False):
        result.tried += 1
        ended, fell = worn.round(family, setting, moments.randrange(1, 400) if number % EVERY == EVERY - 1 else None)
        result.count(ended)
        result.fell += [f"{name}, round {number}, {setting}: {line}" for line in fell]
        if (number + 1) % len(settings) == 0:
            gc.collect()
            sizes.append((_resident(), len(gc.get_objects())))
    grown = [last - second for second, last in zip(sizes[1], sizes[-1], strict=True)]
    result.count(f"kB grown {MOST}", grown[0] // 1024)
    result.count(f"objects grown {MOST}", grown[1])
    if grown[0] > SLACK or grown[1] > OBJECTS:
        result.fell.append(f"{name}: bytes and objects after each lap: {sizes}")
    Path(answer).write_text(json.dumps(result.__dict__))


def _model(family: str) -> Any:
    import torch

    from tests.helpers.models import CONFIGS, biased, tiny
    from tests.matrix import types

    if family == "phi3":
        return biased(family).float()
    return tiny(family, dtype=torch.float32) if family in CONFIGS else types.tiny(family)


class Worn:
    """A model, and what it was before anything ran on it."""

    def __init__(self, model: Any) -> None:
        import torch

        from tests.helpers import sessions

        self.model, self.sessions = model, sessions
        self.prompts = {batch: sessions.prompts_of(batch, LENGTH) for batch in (1, 2)}
        self.mask = torch.ones(2, LENGTH, dtype=torch.long)
        self.mask[0, :3] = 0  # the first of two is padded
        self.bits, self.hooks = sessions.bits(model), sessions.hooked(model)
        self.texts = {batch: self._text(batch) for batch in (1, 2)}

    def _text(self, batch: int) -> Any:
        given = self.prompts[batch]
        mask = self.mask if batch == 2 else None
        return self.sessions.generate(self.model, given, TOKENS, mask).sequences

    def round(self, family: str, setting: Setting, at: int | None) -> tuple[str, list[str]]:
        """One round, with an interrupt at that torch operation. How it ended, and what is wrong afterwards."""
        import torch

        sessions, ended, fell = self.sessions, "generated", []
        sparsity = sessions.fitting(setting.method, family, 0.5)
        planted: Any = contextlib.nullcontext() if at is None else sessions.Interrupt(at, at % 2 == 0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what runs by masks where it was to be fast
                given = setting.method, sparsity, setting.execution
                with sessions.open_session(self.model, *given, **setting.params), planted:
                    self._text(setting.batch)
        except KeyboardInterrupt:
            ended = "interrupted"
        except Exception as error:
            ended, fell = "failed", [f"{type(error).__name__}: {error}"]
        fell += [] if sessions.same(self.model, self.bits) else ["weights or strides are not what they were"]
        fell += [] if sessions.hooked(self.model) == self.hooks else [f"hooks are left: {sessions.hooked(self.model)}"]
        left = [name for name, module in self.model.named_modules() if "forward" in vars(module)]
        fell += [f"forwards are left: {left}"] if left else []
        text = self._text(setting.batch)
        return ended, fell + ([] if torch.equal(text, self.texts[setting.batch]) else ["the dense text is another"])


def _resident() -> int:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
