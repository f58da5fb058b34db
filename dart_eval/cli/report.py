"""`dart-eval report`: one HTML page of a folder of results."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import Force
from dart_eval.cli.view import console, put
from dart_eval.results.store import Store
from dart_eval.util.files import check_target


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")] = Path("out"),
    output: Annotated[
        Path | None, typer.Option(help="Write the page to this file.", show_default="report.html in the folder")
    ] = None,
    samples: Annotated[int, typer.Option(help="Documents of each task to show; 0 shows none.", min=0)] = 50,
    browse: Annotated[bool, typer.Option("--open", metavar="", help="Open the page in a browser.")] = False,
    force: Force = False,
) -> None:
    """Write one HTML page: the verdict, the board, its charts, and the answers of dense and all methods side by side.

    The page is one file that opens in any browser without a network.

    \b
    [bold]Examples[/bold]
    dart-eval report out --open
    dart-eval report out --output report.html --samples 20
    """
    path = output or folder / "report.html"
    check_target(path, "choose another --output")
    from dart_eval.results.report.build import build

    with console(stderr=True).status("comparing answers with dense's"):
        page = build(Store(folder), samples)
    put(page, path, force)
    if browse:
        webbrowser.open(path.absolute().as_uri())
