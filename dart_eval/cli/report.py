"""`dart-eval report`: one HTML page of a folder of results."""

from __future__ import annotations

import contextlib
import re
import signal
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.view import say
from dart_eval.results.progress import progress
from dart_eval.results.store import Store
from dart_eval.util.files import check_own, check_target, is_stream, write

# In the head of every page, older ones too.
OWN = re.compile(rb'<meta name="generator" content="dart-eval">|<link rel="icon" href="data:,">')

POLL = 2.0  # seconds between looks at a folder that is followed
REST = 4  # times as long as a page took: the run may need the processor


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")] = Path("out"),
    output: Annotated[
        Path | None, typer.Option(help="Write the page to this file.", show_default="report.html in the folder")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.", show_default="the models' names")] = None,
    samples: Annotated[int, typer.Option(help="Documents of each task to show; 0 shows none.", min=0)] = 50,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace a file that is not a report.")] = False,
    browse: Annotated[
        bool, typer.Option("--open", metavar="", help="Open the page in a browser, and follow a run in progress.")
    ] = False,
) -> None:
    """Write one HTML page: the board, charts, speed, drift, the answers of all methods side by side, and all numbers.

    The page is one file that opens in any browser without a network. During
    a run, `--open` rewrites the page after every cell, and it reloads itself.

    \b
    [bold]Examples[/bold]
    dart-eval report out --open
    dart-eval report out --output report.html --title "DART" --samples 20
    """
    path = output or folder / "report.html"
    check_target(path, "choose another --output")
    if not force:
        check_own(path, OWN, "report")
    stream = is_stream(path)

    def make(follow: bool) -> str:
        from dart_eval.results.report import build

        made = build(Store(folder), title, samples, follow)
        write(path, made.html, "choose another --output")
        return f"wrote {path} ({made.cells} cells, {made.samples} samples, {len(made.html.encode()) / 1e6:.1f} MB)"

    browse = browse and not stream
    opened = browse and _follow(folder, path, make)
    said = make(False)
    if not stream:
        say(said)
    if browse and not opened:
        webbrowser.open(path.absolute().as_uri())


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt: it is to end the following alone, and not the command."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _follow(folder: Path, path: Path, make: Callable[[bool], str]) -> bool:
    """Make the page as often as a record is added, while a run is at work and until Ctrl-C; return whether any was."""
    cells, seen, opened = folder / "cells", None, False
    with contextlib.suppress(KeyboardInterrupt), _interrupts():
        while (run := progress(folder)) is not None and run.running:
            now = run, cells.stat().st_mtime_ns if cells.is_dir() else 0
            begun = time.monotonic()
            if now != seen:
                say(f"following {folder}: {run.done} of {run.planned} cells; Ctrl-C stops this, not the run", err=True)
                if any(cells.glob("*.json")):
                    make(True)
                    opened = opened or webbrowser.open(path.absolute().as_uri()) or True
                seen = now
            time.sleep(max(POLL, REST * (time.monotonic() - begun)))
    return opened
