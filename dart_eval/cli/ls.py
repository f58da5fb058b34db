"""`dart-eval ls`: what there is."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from dart_eval.cli.view import say
from dart_eval.errors import UserError, nearest

app = typer.Typer(help="List methods or tasks.", no_args_is_help=True)


@app.command("methods")
def methods(
    method: Annotated[
        str, typer.Argument(help="Show this one whole: its parts, their fields, values and help.", metavar="[METHOD]")
    ] = "",
) -> None:
    """Every method in a line; with a name (or a whole spelling, `griffin:remask=drift`) the tree of its parts."""
    from dart_eval.cli.describe import alternatives, tree
    from dart_eval.pruning.registry import make, parse
    from dart_eval.pruning.registry import methods as known

    if not method:
        for name, made in known().items():
            say(f"{name:<12}  {made.summary}")
        say("\nThe parts of one, and all that can be set: dart-eval ls methods griffin")
        return
    made = make(*parse(method))
    say(f"{made.spec}: {made.summary}\n")
    for left, text in (rows := tree(made)):
        say(_aligned(left, text, rows))
    say("\nOther parts that these slots take (their fields: dart-eval ls parts remask):")
    for slot, names in alternatives(made).items():
        say(f"  {slot:<13} {', '.join(names)}")


@app.command("parts")
def parts(slot: Annotated[str, typer.Argument(help="Only parts for this slot: score, mask, remask ...")] = "") -> None:
    """Every part that a method can be made of, slot by slot, with its fields."""
    from dart_eval.cli.describe import part_rows
    from dart_eval.pruning.registry import parts as known

    found = known()
    if slot and slot not in found:
        raise UserError(f"there is no slot {slot!r}", nearest(slot, found))
    for name, listed in found.items():
        if slot in ("", name):
            for cls in listed.values():
                for left, text in (rows := part_rows(cls)):
                    say(_aligned(left, text, rows))
            say("")


def _aligned(left: str, text: str, rows: list[tuple[str, str]]) -> str:
    """Two columns of a list; the first as wide as its widest entry."""
    width = max(len(first) for first, _ in rows)
    return f"{left:<{width}}  {text}".rstrip()


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
