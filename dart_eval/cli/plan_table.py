"""`dart-eval run --plan`: what a sweep will take, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dart_eval.cli.run import load_libraries
from dart_eval.cli.view import TerminalView, show
from dart_eval.results.writers import Table

if TYPE_CHECKING:
    from dart_eval.config import RunConfig
    from dart_eval.executors.sizing import CellSize


def run(config: RunConfig, verbose: bool = False) -> None:
    """Try a few units of every task, and print what all will take.

    Args:
        verbose: let the libraries speak.

    Raises:
        UserError: the input is wrong.
    """
    with TerminalView() as view:
        load_libraries(view, verbose)
        from dart_eval.executors import estimate_all
        from dart_eval.executors.sizing import keep

        sizes, workers = estimate_all([config], view)
    show(table(sizes, workers))
    keep(config.output, sizes, workers)


def table(sizes: list[CellSize], workers: int) -> Table:
    """Cells, and their sum."""
    from dart_eval.executors.sizing import duration

    body = [
        [
            s.title, f"{s.requests}", f"{s.tokens}", f"{s.flops / 1e12:.1f}", f"{s.memory / 10**9:.2f}",
            "finished" if s.finished else duration(s.seconds),
        ]
        for s in sizes
    ]  # fmt: skip
    todo = [s for s in sizes if not s.finished]
    work = sum(s.seconds for s in todo)
    wall = work / workers
    body.append([
        f"{len(todo)} to run", f"{sum(s.requests for s in todo)}", f"{sum(s.tokens for s in todo)}",
        f"{sum(s.flops for s in todo) / 1e12:.1f}", f"{max((s.memory for s in sizes), default=0) / 10**9:.2f}",
        duration(work),
    ])  # fmt: skip
    spread = f", about {duration(wall)} on {workers} workers, and their start" if workers > 1 else ""
    note = (
        "Tokens: to compute; generated ones at their most, so texts that end early take less. TFLOPs: products with "
        "the weights (masks save none). GB: the most that a few batches needed, the largest among them, on one worker. "
        f"Time: from a few batches of every task, on one worker; in all {duration(work)}{spread}. The run says how far "
        "off this was."
    )
    columns = ["cell", "requests", "tokens", "TFLOPs", "GB", "time"]
    return Table("Plan", columns, body, note, rules=frozenset({len(body) - 1}))
