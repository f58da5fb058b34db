"""The command line: one verb a file. Only the module of the verb that is typed is imported.

Exit status 0 all well, 1 a cell failed or a check found a fall, 2 the input is wrong, or memory or disk ran out,
129, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
from typing import Annotated, Any

# Set before anything imports the libraries underneath: no progress bars and no telemetry of theirs.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from dart_eval.cli import view
from dart_eval.sweep.options import DEFAULTS, SECOND_NAMES
from dart_eval.util.errors import UserError, out_of_memory
from dart_eval.util.retired import retired

VERBS = ("run", "tables", "compare", "check", "report", "export", "paper", "trace", "bench", "ls", "lm-eval")


def application(verb: str | None = None) -> typer.Typer:
    """Return the command line.

    Args:
        verb: the only verb that is imported; None: all of them.
    """
    made = typer.Typer(
        name="dart-eval",
        help="Measure quality, speed and memory of language models whose FFN neurons are pruned at run time.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _spelled},
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    made.callback()(_options)
    for name in VERBS if verb is None else (verb,):
        module = importlib.import_module(f"dart_eval.cli.{name.replace('-', '_')}")
        if hasattr(module, "app"):
            made.add_typer(module.app, name=name)
        else:
            taken = getattr(module, "TAKES", None)
            made.command(name, context_settings=taken)(getattr(module, name.replace("-", "_")))
    return made


def _spelled(name: str) -> str:
    """Return our name of an option: lm-eval writes underscores, and has other names for some."""
    field = name.replace("-", "_")
    return SECOND_NAMES.get(field, field).replace("_", "-")


def _print_version(wanted: bool) -> None:
    if wanted:
        from dart_eval import __version__

        typer.echo(f"dart-eval {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


# Ctrl-C; what schedulers send before they kill; what a closed terminal or a lost connection sends.
STOPS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal is gone"}


class _Stopped(BaseException):
    """One of `STOPS`. Not KeyboardInterrupt: typer would swallow it."""


_STOPPED: list[int] = []  # the signal that came; compiled code (Ray's, pydantic's) may turn its exception into another


def _stop(number: int, _frame: object) -> None:
    _STOPPED[:] = [number]
    raise _Stopped


def main() -> None:
    """Entry point: wrong input becomes one line and status 2, a signal status 128 plus its number."""
    view.settle_streams()
    _STOPPED.clear()
    numbers = [number for name in STOPS if (number := getattr(signal, name, None)) is not None]  # Windows has no SIGHUP
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
    for number in heeded:
        signal.signal(number, _stop)
    words = sys.argv[1:]
    try:
        app = application(words[0] if words and words[0] in VERBS else None)
        status = app(words, prog_name="dart-eval", standalone_mode=False)
    except BaseException as error:
        status = _told(error)
        for stream in (sys.stdout, sys.stderr):  # output that nobody reads any more is dropped
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    finally:
        for number in heeded:  # while Python shuts down, nothing would catch an exception
            signal.signal(number, signal.SIG_DFL)
    sys.exit(status if isinstance(status, int) else 0)


def _told(error: BaseException) -> int:
    """Tell in one line what ended the command, and return its status; what nobody has foreseen is raised."""
    for number in _STOPPED:  # whatever its exception became
        with contextlib.suppress(OSError):
            goes_on = sys.argv[1:2] in (["run"], ["paper"]) and "--force" not in sys.argv
            view.print_note(STOPS[signal.Signals(number).name] + "; the same command resumes the run" * goes_on)
        return 128 + number
    if isinstance(error, BrokenPipeError):  # `dart-eval tables out | head`
        return 0
    if isinstance(error, UserError):
        problem = error
    elif out_of_memory(error):
        problem = UserError("memory ran out", "free memory, or use a smaller model or --batch-size")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = UserError(f"{error.filename or 'the output'} cannot be written ({error.strerror})", "make room")
    elif type(error).__name__ == "NoArgsIsHelpError":  # the help has been shown
        return 2
    elif hasattr(error, "format_message"):  # what typer's errors have, whichever version
        problem = _misused(error)
    else:
        raise error
    with contextlib.suppress(OSError):
        view.problem(str(problem))
    return 2


def _misused(error: Any) -> UserError:
    """Return an error of typer's parser as one line."""
    command = error.ctx.command_path if getattr(error, "ctx", None) else "dart-eval"
    name = getattr(error, "option_name", "").lstrip("-") if type(error).__name__ == "NoSuchOption" else ""
    of_verb = f"{command.rpartition(' ')[2]} --{name}"
    if name and (left := retired("option", name.removeprefix("no-")) or retired("option", of_verb)):
        return left
    if name and command == "dart-eval" and _spelled(name).replace("-", "_") in DEFAULTS:
        return UserError(f"{command} needs a command before --{name}", f"did you mean dart-eval run --{name}?")
    problem, remedy = error.format_message().rstrip("."), f"see {command} -h"
    if "unexpected extra argument" in problem and command.endswith("run"):
        remedy = "give the model with --model, and tasks with commas: --tasks arc,hellaswag"
    return UserError(problem[:1].lower() + problem[1:], "" if problem.endswith("?") else remedy)
