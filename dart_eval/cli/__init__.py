"""The command line: one verb a file. Exit status 0 all well, 1 a cell failed, 2 the input is wrong."""

from __future__ import annotations

import os
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

from dart_eval.cli import ls, run, tables
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


def main() -> None:
    """Entry point: wrong input becomes one line and status 2, an interrupt status 130."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        app()
    except UserError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted; finished cells are kept, the same command goes on from there")
        sys.exit(130)
    except BrokenPipeError:  # `dart-eval tables out | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
