"""`dart-eval ls`: what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dart_eval.cli.options import takes
from dart_eval.cli.view import TerminalView, listed, say
from dart_eval.sweep.events import Event
from dart_eval.util.errors import UserError, nearest

if TYPE_CHECKING:  # it imports torch
    from dart_eval.pruning.method import Option

app = typer.Typer(help="List methods or tasks.", no_args_is_help=True)


@app.command("methods")
def methods(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="A name, or a name with options: dart:remask=never.")
    ] = "",
) -> None:
    """List all methods, or show one method with its options.

    \b
    [bold]Examples[/bold]
    dart-eval ls methods
    dart-eval ls methods dart
    dart-eval ls methods dart:remask=never
    """
    from dart_eval.pruning.registry import make, parse
    from dart_eval.pruning.registry import methods as known

    if not method:
        listed([(name, cls.summary) for name, cls in known().items()])
        say("\nOptions of one method: dart-eval ls methods dart")
        return
    chosen = make(*parse(method))
    listed([(f"{chosen.spec}:", chosen.summary)])
    if chosen.paper:
        say(f"Paper: https://arxiv.org/abs/{chosen.paper}")
    if options := chosen.valid_options():
        from dart_eval.pruning.method import text_of  # not before the name is checked: it imports torch

        say("")
        listed([(f"{path}={text_of(getattr(chosen, o.field))}", meaning(o)) for path, o in options.items()])
    say("\nAll methods and their options: docs/methods.md")


def meaning(option: Option) -> str:
    """Return the meaning of a method's option in one line, with its words and bounds; docs/methods.md has it, too."""
    if option.words:
        return f"{option.help} ({', '.join(option.words)})"
    bounds = (("at least", option.least), ("above", option.above), ("at most", option.most))
    words = ", ".join(f"{word} {bound:.10g}" for word, bound in bounds if bound is not None)
    return f"{option.help} ({words})" if words else option.help


@app.command("tasks")
@takes("include_path")
def tasks(
    pattern: Annotated[str, typer.Argument(metavar="TEXT", help="List only names that contain this text.")] = "",
    every: Annotated[bool, typer.Option("--all", metavar="", help="Also list the thousands of lm-eval names.")] = False,
    **given: object,
) -> None:
    """List task names: those of dart-eval, and with --all every task and group of lm-eval.

    \b
    [bold]Examples[/bold]
    dart-eval ls tasks
    dart-eval ls tasks arc
    dart-eval ls tasks mine --include-path DIR
    """
    from dart_eval.evaluation import task_names
    from dart_eval.sweep.options import checked

    listed([(name, ", ".join(t)) for name, t in task_names.ALIASES.items() if pattern in name], least=16)
    names = {*task_names.own()}
    if every or pattern:
        with TerminalView() as tell:
            tell(Event("wait", "looking up tasks"))
            names = task_names.names(checked("include_path", given["include_path"] or ()))
        if not any(pattern in name for name in (*names, *task_names.ALIASES)):
            raise UserError(f"no task name contains {pattern!r}", nearest(pattern, names))
    for name in sorted(names - task_names.ALIASES.keys()):
        if pattern in name:
            say(name)
