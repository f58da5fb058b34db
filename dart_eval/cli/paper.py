"""`dart-eval paper`: the tables of a paper, for any model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_eval.cli import options
from dart_eval.cli.run import finish, hush, load_libraries
from dart_eval.cli.view import TerminalView, say, show
from dart_eval.sweep.config import RAY_OPTIONS

if TYPE_CHECKING:
    from dart_eval.results.paper_tables import Paper
    from dart_eval.results.writers import Table
    from dart_eval.sweep.paper import PaperSpec


SHARED = (
    "model", "revision", "dtype", "device", "device_map", "trust_remote_code", "confirm_run_unsafe_code", "data_dir",
    "batch_size", "seed", "workers", "executor", *RAY_OPTIONS,
)  # fmt: skip


@options.takes(*SHARED)
def paper(
    name: options.PaperName = "smoke", limit: options.PaperLimit = None, output: options.PaperOutput = "paper",
    verbose: options.Verbose = False,
    **given: Any,
) -> None:  # fmt: skip
    """Run the cells that a paper's tables need, and write the tables as md, csv and LaTeX.

    The same command resumes a stopped run. Tasks without available data are left out and listed.

    [bold]Examples[/bold]

    \b
    dart-eval paper smoke --limit 8
    dart-eval paper ten --model meta-llama/Llama-3.1-8B --dtype bfloat16
    dart-eval paper mine.yaml --data-dir DIR --output mine
    dart-eval paper ten --model meta-llama/Llama-3.1-8B --executor ray
    """
    given |= {"limit": limit, "output": output}
    hush(verbose)
    from dart_eval.results.paper_tables import Paper
    from dart_eval.results.store import Store
    from dart_eval.sweep.config import config_from
    from dart_eval.sweep.paper import load
    from dart_eval.sweep.plan import command_line

    base = config_from(None, {**given, "method": "dense", "sparsity": "0"})
    spec = load(name, base)
    with TerminalView() as view:
        load_libraries(view, verbose)
        from dart_eval.cluster.run import run_all

        result = run_all(spec.configs, view, skip_missing=True)
        if result.lost or not result.records:
            finish(result, output)
    no_matter = ("output", "executor", "workers", *RAY_OPTIONS)  # to the numbers
    line = command_line(["dart-eval", "paper", name], {k: v for k, v in given.items() if k not in no_matter})
    filled = Paper(Store(output), result.records, result.missing, line)
    folder = Path(output) / "tables"
    for table in _write(spec, filled, folder):
        show(table)
    say(f"wrote {folder} (all.md, and each table as md, csv and tex)")
    finish(result, output)


def _write(spec: PaperSpec, filled: Paper, folder: Path) -> list[Table]:
    """Write the tables, each in three forms and all in one file; returns them."""
    from dart_eval.results.paper_tables import to_csv
    from dart_eval.results.writers import latex, markdown
    from dart_eval.util.files import write

    made = [(layout, *filled.table(layout)) for layout in spec.layouts]
    remedy = "free disk space or choose another --output; finished cells remain"
    for layout, table, numbers in made:
        for ending, text in (("md", markdown(table)), ("csv", to_csv(numbers)), ("tex", latex(table))):
            write(folder / f"{layout.name}.{ending}", text, remedy)
    parts = [*([spec.about.strip() + "\n"] if spec.about else []), *(markdown(t) for _, t, _ in made)]
    write(folder / "all.md", "\n".join(parts), remedy)
    return [table for _, table, _ in made]
