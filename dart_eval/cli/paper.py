"""`dart-eval paper`: the tables of a paper and what becomes of its claims, for any model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dart_eval.cli.options import Plan, Verbose, own, takes
from dart_eval.cli.run import finish, hush, load_libraries, show_plan
from dart_eval.cli.view import TerminalView, say
from dart_eval.sweep.events import Event
from dart_eval.sweep.options import OUTPUT, TASKS
from dart_eval.util.errors import StoreError, UserError, naming
from dart_eval.util.text import items_of

if TYPE_CHECKING:
    from dart_eval.results.paper import Claim
    from dart_eval.results.record import Record
    from dart_eval.sweep.paper import PaperSpec
    from dart_eval.sweep.run import RunResult

SHARED = (
    "model", "revision", "dtype", "device", "device_map", "trust_remote_code", "confirm_run_unsafe_code", "data_dir",
    "chat_template", "batch_size", "seed", "workers", "ray", "gpus_per_cell",
)  # fmt: skip
NO_MATTER = ("output", "workers", "ray", "gpus_per_cell")  # to the numbers


NAME_HELP = "Make these tables: smoke (shipped data), dart (all of the DART paper's claims), or a YAML file's."
LIMIT_HELP = r"Run only the first N items of each task.  \[default: the file's limit]"
OUTPUT_HELP = "Write results to this folder, and tables to its subfolder `tables`."
TABLES_HELP = "Make only these tables, comma-separated, and the claims on them."


@takes(*SHARED)
def paper(
    name: Annotated[str, typer.Argument(metavar="NAME", help=NAME_HELP)] = "smoke",
    limit: Annotated[int | None, own(LIMIT_HELP, TASKS, "N")] = None,
    output: Annotated[str, own(OUTPUT_HELP, OUTPUT, "DIR")] = "paper",
    tables: Annotated[list[str] | None, own(TABLES_HELP, OUTPUT, "NAMES")] = None,
    plan: Plan = False,
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
    given |= {"limit": limit, "output": output}
    hush(verbose)
    from dart_eval.evaluation import task_names
    from dart_eval.sweep.options import config_from
    from dart_eval.sweep.paper import load, runs
    from dart_eval.sweep.plan import command_line

    only = None if tables is None else items_of(tables)
    spec = load(name, config_from(None, {**given, "method": "dense", "sparsity": "0"}), only)
    with TerminalView() as tell:  # a task of the last sweep would be looked up after days
        tell(Event("wait", "looking up tasks"))
        task_names.expand([task for config in spec.sweeps for task in config.tasks])
    if plan:
        show_plan(runs(spec), verbose, skip_missing=True)
        return
    result, records, refused, counted = _run(spec, verbose)
    if result.failed and not result.records:
        finish(result, output)
    if not result.records:
        raise UserError(f"no task could be loaded: {'; '.join(result.missing.values())[:300]}", "see --data-dir")
    from dart_eval.results.paper import Paper
    from dart_eval.results.show import render, show
    from dart_eval.results.store import Store
    from dart_eval.util.files import write

    matters = {key: value for key, value in given.items() if key not in NO_MATTER}
    line = command_line(["dart-eval", "paper", name], {**matters, "tables": only and tuple(only)})
    filled = Paper(Store(output), records, spec.sheets, result.missing, line)
    written = {sheet.name: filled.table(sheet) for sheet in spec.sheets}
    if spec.claims:
        written["claims"] = filled.verdicts(spec.claims, counted)
    files: dict[str, str | bytes] = {
        f"{name}.{form}": render([table], form)
        for name, table in written.items() if table.body for form in ("md", "csv", "tex")
    }  # fmt: skip
    files |= {f"{s.name}.svg": image for s in spec.sheets if s.picture and (image := filled.picture(s))}
    about = [f"{spec.about.strip()}\n"] if spec.about else []
    files["all.md"] = "\n".join([*about, render([*written.values()], "md")])
    for file, text in files.items():
        write(Path(output) / "tables" / file, text, "free disk space or choose another --output; finished cells remain")
    show(*written.values())
    say(f"wrote {output}/tables (all.md, and each table as md, csv and tex)")
    finish(result, output)
    if refused:
        raise refused[0]


def _run(
    spec: PaperSpec, verbose: bool
) -> tuple[RunResult, dict[str | None, list[Record]], list[UserError], dict[Claim, float]]:
    """Run all sweeps of a paper.

    Returns:
        The outcome of them together, records by the model as it was named, why later sweeps are lacking, and the costs
        of claims on a shape, which are refused before the first cell.
    """
    from dart_eval.sweep.paper import runs
    from dart_eval.sweep.run import RunResult

    records: dict[str | None, list[Record]] = {}
    whole, refused = RunResult([], [], {}), list[UserError]()
    with TerminalView() as tell:
        load_libraries(tell, verbose)
        from dart_eval.cluster.run import run_all

        tell(Event("wait", "counting the costs of shapes"))
        counted = {claim: _cost(claim) for claim in spec.claims if claim.shape}
        for configs in runs(spec):
            try:
                result = run_all(configs, tell, skip_missing=True)
            except UserError as error:
                if isinstance(error, StoreError) or not whole.records:
                    raise
                tell(Event("note", f"left out: {error}"))
                refused.append(error)
                continue
            records.setdefault(configs[0].model, []).extend(result.records)
            whole.records.extend(result.records)
            whole.failed.extend(result.failed)
            whole.missing.update(result.missing)
    return whole, records, refused, counted


def _cost(claim: Claim) -> float:
    """Return the cost that a claim on a shape names, in its unit."""
    from dart_eval.bench.overhead import measure
    from dart_eval.pruning.registry import make, parse
    from dart_eval.results.paper import SHAPED

    with naming(f"claim {claim.claim!r}: "):
        costs = measure(make(*parse(claim.method)), claim.shape, claim.sparsity, prompts=(claim.prompt,))
    work = max(costs.decode_share, costs.scoring_share)
    return (costs.state_bytes[claim.prompt] if claim.column == "state MB" else work) / SHAPED[claim.column]
