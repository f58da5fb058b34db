"""The command line: one verb a file.

Exit status 0 all well, 1 a cell failed or a check found a fall, 2 the input is wrong, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

# Before anything imports them: no progress bars and no telemetry of the libraries underneath, only our own view.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console
from rich.markup import escape

from dart_eval.cli import bench, check, compare, ls, paper, report, run, tables, trace
from dart_eval.errors import UserError

app = typer.Typer(
    name="dart-eval",
    help="Evaluate dynamic FFN pruning of language models: DART and its baselines, with an honest protocol.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("tables")(tables.tables)
app.command("compare")(compare.compare)
app.command("check")(check.check)
app.command("report")(report.report)
app.command("paper")(paper.paper)
app.command("trace")(trace.trace)
app.command("bench")(bench.bench)
app.add_typer(ls.app, name="ls")


def _print_version(wanted: bool) -> None:
    if wanted:
        from dart_eval import __version__

        typer.echo(f"dart-eval {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


class _Stopped(BaseException):
    """Ctrl-C, or SIGTERM as schedulers send it before they kill. Not KeyboardInterrupt: typer would swallow it."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, _frame: object) -> None:
    raise _Stopped(number)


def main() -> None:
    """Entry point: wrong input becomes one line and status 2, a signal status 130 or 143."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    try:
        app()
    except UserError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(2)
    except (_Stopped, SystemError) as error:
        stop = error.__cause__ if isinstance(error, SystemError) else error  # Ray's compiled code wraps it so
        if not isinstance(stop, _Stopped):
            raise
        word = "interrupted" if stop.number == signal.SIGINT else "terminated"
        errors.print(f"{word}; the same command goes on from here")
        sys.exit(128 + stop.number)
    except BrokenPipeError:  # `dart-eval tables out | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
