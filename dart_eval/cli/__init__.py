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
from dart_eval.util.errors import UserError, nearest, out_of_memory
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
RESUMES = "; the same command resumes the run"


class _Stopped(BaseException):
    """One of `STOPS`. Not KeyboardInterrupt: typer would swallow it."""

    def __init__(self, number: int) -> None:
        self.number = number


_STOPPED: list[int] = []  # the signal that came; compiled code (Ray's, pydantic's) may turn its exception into another


def _stop(number: int, _frame: object) -> None:
    _STOPPED[:] = [number]
    raise _Stopped(number)


def main() -> None:
    """Entry point: wrong input becomes one line and status 2, a signal status 128 plus its number."""
    view.settle_streams()
    _STOPPED.clear()
    numbers = [number for name in STOPS if (number := getattr(signal, name, None)) is not None]  # Windows has no SIGHUP
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
    for number in heeded:
        signal.signal(number, _stop)
    try:
        _run()
    finally:
        for number in heeded:  # while Python shuts down, nothing would catch an exception
            signal.signal(number, signal.SIG_DFL)


def _run() -> None:
    try:
        words = sys.argv[1:]
        app = application(words[0] if words and words[0] in VERBS else None)
        status = app(words, prog_name="dart-eval", standalone_mode=False)
    except UserError as error:
        view.problem(str(error))
        sys.exit(2)
    except (_Stopped, SystemError, OSError) as error:
        _end_stopped()
        if isinstance(error, BrokenPipeError):
            _leave(0)  # `dart-eval tables out | head`
        _end_without_memory(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                view.problem(f"{error.filename or 'the output'} cannot be written ({error.strerror}); make room")
            _leave(2)
        raise
    except Exception as error:
        _end_stopped()
        _end_without_memory(error)
        if not hasattr(error, "format_message"):  # what typer's errors have, whichever version
            raise
        if type(error).__name__ != "NoArgsIsHelpError":  # the help has been shown
            view.problem(str(_misused(error)))
        sys.exit(2)
    else:
        sys.exit(status if isinstance(status, int) else 0)


def _end_stopped() -> None:
    """Exit with one line if a signal came, whatever its exception became."""
    for number in _STOPPED:
        with contextlib.suppress(OSError):
            resumes = sys.argv[1:2] in (["run"], ["paper"])
            anew = "; with --force the same command begins anew" if "--force" in sys.argv else RESUMES
            view.print_note(STOPS[signal.Signals(number).name] + (anew if resumes else ""))
        _leave(128 + number)


def _end_without_memory(error: BaseException) -> None:
    """Exit with one line if memory has run out."""
    if out_of_memory(error):
        view.problem("memory ran out; free memory, or use a smaller model or --batch-size")
        _leave(2)


def _misused(error: Any) -> UserError:
    """Return an error of typer's parser as one line."""
    context = getattr(error, "ctx", None)
    command, known = (context.command_path, context.command.params) if context else ("dart-eval", [])
    remedy = f"see {command} -h"
    if name := getattr(error, "option_name", None) if type(error).__name__ == "NoSuchOption" else None:
        if left := retired("option", name.lstrip("-").removeprefix("no-")):
            return left
        if command == "dart-eval" and _spelled(name.lstrip("-")).replace("-", "_") in DEFAULTS:
            return UserError(f"{command} needs a command before {name}", f"did you mean dart-eval run {name}?")
        there = [o for p in known if not p.hidden for o in p.opts if o.startswith("-")]
        return UserError(f"{command} has no option {name}", (there and nearest(name, there)) or remedy)
    said = error.format_message().rstrip(".")
    if "unexpected extra argument" in said and command.endswith("run"):
        remedy = "give the model with --model, and tasks with commas: --tasks arc,hellaswag"
    return UserError(said[:1].lower() + said[1:], "" if said.endswith("?") else remedy)


def _leave(status: int) -> None:
    """Exit. Output that nobody reads any more is dropped."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
