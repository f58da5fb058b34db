"""`dart-eval paper`: the tables of a paper and what becomes of its claims, for any model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dart_eval.cli.options import Verbose, own, takes
from dart_eval.cli.run import finish, hush, load_libraries
from dart_eval.cli.view import TerminalView, say
from dart_eval.sweep.events import Event
from dart_eval.sweep.options import OUTPUT, TASKS
from dart_eval.util.errors import UserError, naming

if TYPE_CHECKING:
    from dart_eval.results.paper import Claim

SHARED = (
    "model", "revision", "dtype", "device", "device_map", "trust_remote_code", "confirm_run_unsafe_code", "data_dir",
    "chat_template", "batch_size", "seed", "workers", "ray", "gpus_per_cell",
)  # fmt: skip
NAME_HELP = "Make the tables of smoke (shipped data), dart (its paper's claims), long (long answers) or a YAML file."
LIMIT_HELP = r"Run only the first N items of each task.  \[default: the file's limit]"
POWER_HELP = "Also say how many documents an open claim needs, with this run as a pilot."
OUTPUT_HELP = "Write results to this folder, and tables to its subfolder `tables`."


@takes(*SHARED)
def paper(
    name: Annotated[str, typer.Argument(metavar="NAME", help=NAME_HELP)] = "smoke",
    limit: Annotated[int | None, own(LIMIT_HELP, TASKS, "N")] = None,
    output: Annotated[str, own(OUTPUT_HELP, OUTPUT, "DIR")] = "paper",
    power: Annotated[bool, own(POWER_HELP, OUTPUT, "", "--power")] = False,
    verbose: Verbose = False,
    **given: Any,
) -> None:
    """Run the cells that a paper's tables need, write the tables, and give a verdict on its claims.

    The same command resumes a stopped run. Tasks without available data are left out and listed.

    [bold]Examples[/bold]

    \b
    dart-eval paper smoke --limit 8
    dart-eval paper dart --model meta-llama/Llama-3.1-8B --dtype bfloat16
    dart-eval paper mine.yaml --data-dir DIR --output mine
    """
    hush(verbose)
    from dart_eval.evaluation import task_names
    from dart_eval.sweep.options import config_from
    from dart_eval.sweep.paper import load

    given |= {"limit": limit, "output": output, "method": "dense", "sparsity": "0"}
    spec = load(name, config_from(None, given))
    with TerminalView() as tell:  # a task of the last sweep would be looked up after days
        tell(Event("wait", "looking up tasks"))
        task_names.expand([task for config in spec.sweeps for task in config.tasks])
        load_libraries(tell, verbose)
        from dart_eval.cluster.run import run_all

        tell(Event("wait", "counting the costs of shapes"))
        counted = {claim: _cost(claim) for claim in spec.claims if claim.shape}  # or refused, before the first cell
        result = run_all(spec.sweeps, tell, skip_missing=True)
    if not result.records:
        finish(result)  # ends here if cells failed
        raise UserError(f"no task could be loaded: {'; '.join(result.missing.values())[:300]}", "see --data-dir")
    from dart_eval.results.paper import Paper
    from dart_eval.results.show import render, show
    from dart_eval.results.store import Store
    from dart_eval.util.files import write

    filled = Paper(Store(output), result.records, spec.sheets, result.missing)
    tables = {sheet.name: filled.table(sheet) for sheet in spec.sheets}
    if spec.claims:
        tables["claims"] = filled.verdicts(spec.claims, counted, power)
    files = {
        f"{name}.{form}": render([table], form)
        for name, table in tables.items() if table.body for form in ("md", "csv", "tex")
    }  # fmt: skip
    about = [f"{spec.about.strip()}\n"] if spec.about else []
    files["all.md"] = "\n".join([*about, render([*tables.values()], "md")])
    for file, text in files.items():
        write(Path(output) / "tables" / file, text, "free disk space or choose another --output; finished cells remain")
    show(*tables.values())
    say(f"wrote {output}/tables (all.md, and each table as md, csv and tex)")
    finish(result)


def _cost(claim: Claim) -> float:
    """Return the cost that a claim on a shape names, in its unit."""
    from dart_eval.bench.overhead import measure
    from dart_eval.pruning.registry import make, parse
    from dart_eval.results.paper import SHAPED

    with naming(f"claim {claim.claim!r}: "):
        costs = measure(make(*parse(claim.method)), claim.shape, claim.sparsity, prompts=(claim.prompt,))
    work = max(costs.decode_share, costs.scoring_share)
    return (costs.state_bytes[claim.prompt] if claim.column == "state MB" else work) / SHAPED[claim.column]
