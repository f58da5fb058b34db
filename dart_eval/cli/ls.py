"""`dart-eval ls`: what there is."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Annotated

import typer

from dart_eval.errors import UserError, nearest

app = typer.Typer(help="List methods or tasks.", no_args_is_help=True)


@app.command("methods")
def methods() -> None:
    """Every method with its parameters and their defaults."""
    from dart_eval.pruning.registry import methods as known

    for name, cls in known().items():
        typer.echo(f"{name:<12} {cls.summary}")
        notes = dict(re.findall(r"^ +(\w+): (.+)$", cls.__doc__ or "", flags=re.M))
        for f in dataclasses.fields(cls):
            default = str(f.default).lower() if isinstance(f.default, bool) else f.default
            typer.echo(f"{'':<13}{f'{f.name}={default}':<18}{notes.get(f.name, '')}".rstrip())


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
            typer.echo(f"{name:<16} {', '.join(members)}")
    for name, text in COMMON.items():
        if pattern in name:
            typer.echo(f"{name:<16} {text}")
    if every or pattern:
        names = Tasks().names()
        if pattern and not any(pattern in name for name in (*names, *ALIASES)):
            raise UserError(f"no task has {pattern!r} in its name", nearest(pattern, names))
        shown = set(ALIASES) | set(COMMON)
        for name in names:
            if pattern in name and name not in shown:
                typer.echo(name)
