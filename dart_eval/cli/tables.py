"""`dart-eval tables`: the tables of a folder of results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.view import print_tables, put, save_text
from dart_eval.errors import UserError, nearest
from dart_eval.files import check_target, format_of
from dart_eval.results import detector
from dart_eval.results import tables as made
from dart_eval.results.store import Store


def tables(
    folder: Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")] = Path("out"),
    format: Annotated[
        str | None,
        typer.Option(
            help="md, csv, tex or json; without it, that of --save's ending, or tables for the terminal (md in a pipe)."
        ),
    ] = None,
    subtasks: Annotated[
        bool, typer.Option("--subtasks", help="Also the members of groups, e.g. mmlu's subjects.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
) -> None:
    """Print accuracy, summaries, perplexity, FLOPs and memory of finished cells, with standard error and n.

    [bold]Examples[/bold]

      dart-eval tables out

      dart-eval tables out --format json

      dart-eval tables out --format tex --save tables.tex
    """
    if format is not None and format not in made.FORMATS:
        raise UserError(f"unknown format {format!r}", nearest(format, made.FORMATS))
    if save is not None:
        check_target(save)
        format = format_of(save, format, made.FORMATS)
    store = Store(folder)
    records = store.load()
    more = detector.tables(store, records) if format not in ("csv", "json") else []
    if format is None and save is None and sys.stdout.isatty():
        print_tables(records, more)
        return
    text = made.render(records, format or "md", subtasks, more)
    if save is None:
        put(text)
        return
    save_text(save, text)
