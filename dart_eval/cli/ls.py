"""`dart-eval ls`: what there is."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Annotated

import typer

from dart_eval.cli.view import say
from dart_eval.errors import UserError, nearest

app = typer.Typer(help="List methods or tasks.", no_args_is_help=True)


@app.command("methods")
def methods() -> None:
    """Every method with its parameters and their defaults."""
    from dart_eval.pruning.registry import methods as known

    listed = known()
    for name, cls in listed.items():
        say(f"{name:<12} {cls.summary}")
        base = next((c for c in listed.values() if c is not cls and issubclass(cls, c)), None)  # cls: other defaults
        usual = {f.name: f.default for f in dataclasses.fields(base)} if base is not None else {}
        notes = _notes(cls)
        if base is not None:
            say(f"{'':<13}{base.name}, but")
        for f in dataclasses.fields(cls):
            if usual.get(f.name, ...) == f.default:
                continue
            default = str(f.default).lower() if isinstance(f.default, bool) else f.default
            say(f"{'':<13}{f'{f.name}={default}':<23} {notes.get(f.name, '')}".rstrip())


def _notes(cls: type) -> dict[str, str]:
    """What each parameter means, from the docstrings of the class and its bases."""
    found: dict[str, str] = {}
    for c in reversed(cls.__mro__):
        for key, text in re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", c.__doc__ or "", flags=re.M):
            found[key] = " ".join(text.split())
    return found


@app.command("tasks")
def tasks(
    pattern: Annotated[str, typer.Argument(help="Only names that contain this text.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Also the thousands of lm-eval's own names.")] = False,
) -> None:
    """Task names: this project's, the common ones, and with --all every lm-eval task and group."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from dart_eval.evaluation.tasks import ALIASES, COMMON, Tasks

    for name, members in ALIASES.items():
        if pattern in name:
            say(f"{name:<16} {', '.join(members)}")
    for name, text in COMMON.items():
        if pattern in name:
            say(f"{name:<16} {text}")
    if every or pattern:
        names = Tasks().names()
        if pattern and not any(pattern in name for name in (*names, *ALIASES)):
            raise UserError(f"no task has {pattern!r} in its name", nearest(pattern, names))
        shown = set(ALIASES) | set(COMMON)
        for name in names:
            if pattern in name and name not in shown:
                say(name)
