"""`dart-eval compare`: is the difference between two sets of results more than noise?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.view import put, save_text, show
from dart_eval.errors import UserError, nearest
from dart_eval.files import check_target, format_of

FORMATS = ("md", "csv", "json")
BY = ("method", "sparsity", "model")


def compare(
    a: Annotated[str, typer.Argument(help="A results folder; with --by a method, a sparsity or a model.")],
    b: Annotated[str, typer.Argument(help="What A is held against.")],
    by: Annotated[
        str | None, typer.Option(help="method, sparsity or model: A and B are two of those in --results.")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help=r"Folder of results for --by; may be given again.  \[default: out]")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Metrics, comma-separated, or all. Without it, the main one of each task.")
    ] = "",
    format: Annotated[
        str | None,
        typer.Option(help="md, csv or json; without it, that of --save's ending, or a table for the terminal."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
) -> None:
    """Compare two sets of cells, paired document by document, with tests and intervals.

    Cells of two folders are matched where they were asked the same; code, versions and weights may differ and are
    named. With --by the cells of one folder are matched that differ in nothing else.

    [bold]Examples[/bold]

      dart-eval compare out-old out-new

      dart-eval compare dart griffin --by method

      dart-eval compare dart:allocation=uniform dart:allocation=depth --by method --metric gold_ll,acc

      dart-eval compare 0 0.5 --by sparsity --results out --format json

      dart-eval compare model@1a2b3c4d model@5e6f7a8b --by model
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"unknown format {format!r}", nearest(format, FORMATS))
    if save is not None:
        check_target(save)
        format = format_of(save, format, FORMATS)
    if by is not None and by not in BY:
        raise UserError(f"unknown --by {by!r}", nearest(by, BY))
    if by is None and results:
        raise UserError("--results goes with --by", "without --by, A and B are the folders")
    from dart_eval.results import compare as comparing  # after the options are settled: scipy takes its time

    metrics = [m.strip() for m in metric.split(",") if m.strip()]
    if by is None:
        comparison = comparing.compare_folders(Path(a), Path(b), metrics)
    else:
        comparison = comparing.compare_within(by, a, b, results or [Path("out")], metrics)
    if format is None and save is None and sys.stdout.isatty():
        show(comparing.table(comparison))
        return
    text = comparing.render(comparison, format or "md")
    if save is None:
        put(text)
        return
    save_text(save, text)
