"""`dart-eval paper`: the tables of a paper and what becomes of its claims, for any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_eval.cli import options
from dart_eval.cli.run import finish, hush, load_libraries, show_plan
from dart_eval.cli.view import TerminalView, say, show
from dart_eval.sweep.events import Event
from dart_eval.util.errors import StoreError, UserError, naming
from dart_eval.util.text import items_of

if TYPE_CHECKING:
    from dart_eval.results.claims import Claim
    from dart_eval.results.paper_tables import Paper
    from dart_eval.results.record import Record
    from dart_eval.results.writers import Table
    from dart_eval.sweep.paper import PaperSpec
    from dart_eval.sweep.run import RunResult


SHARED = (
    "model", "revision", "dtype", "device", "device_map", "trust_remote_code", "confirm_run_unsafe_code", "data_dir",
    "chat_template", "batch_size", "seed", "workers", "ray", "gpus_per_cell",
)  # fmt: skip
NO_MATTER = ("output", "workers", "ray", "gpus_per_cell")  # to the numbers
REMEDY = "free disk space or choose another --output; finished cells remain"


@options.takes(*SHARED)
def paper(
    name: options.PaperName = "smoke", limit: options.PaperLimit = None, output: options.PaperOutput = "paper",
    tables: options.PaperTables = None, plan: options.Plan = False, verbose: options.Verbose = False,
    **given: Any,
) -> None:  # fmt: skip
    """Run the cells that a paper's tables need, write the tables, and give a verdict on its claims.

    The same command resumes a stopped run. Tasks without available data are left out and listed.

    [bold]Examples[/bold]

    \b
    dart-eval paper smoke --limit 8
    dart-eval paper dart --plan
    dart-eval paper dart --model meta-llama/Llama-3.1-8B --dtype bfloat16
    dart-eval paper mine.yaml --data-dir DIR --output mine
    dart-eval paper dart --model meta-llama/Llama-3.1-8B --ray auto
    """
    given |= {"limit": limit, "output": output}
    hush(verbose)
    from dart_eval.evaluation import task_names
    from dart_eval.sweep.options import config_from
    from dart_eval.sweep.paper import load
    from dart_eval.sweep.plan import command_line

    spec = load(name, config_from(None, {**given, "method": "dense", "sparsity": "0"}))
    if tables is not None:
        spec = spec.only(items_of(tables))
        given["tables"] = ",".join(spec.sweeps)
    if spec.configs:  # a task of the last sweep would be looked up after days
        tasks = dict.fromkeys(task for config in spec.configs for task in config.tasks)
        with TerminalView() as tell:
            tell(Event("wait", "looking up tasks"))
            task_names.check_names(tasks)
    if plan:
        show_plan(spec.runs, verbose, skip_missing=True)
        return
    result, records, refused = _run(spec, verbose)
    if result.lost or (result.failed and not result.records):
        finish(result, output)
    if not result.records:
        reasons = "; ".join(result.missing.values())[:300]
        raise UserError(f"none of the tasks could be loaded: {reasons}", "see --data-dir")
    from dart_eval.results.paper_tables import Paper
    from dart_eval.results.store import Store

    line = command_line(["dart-eval", "paper", name], {k: v for k, v in given.items() if k not in NO_MATTER})
    texts = any(c.metric.startswith("dense_") for layout in spec.layouts for c in layout.columns)
    filled = Paper(Store(output), records, result.missing, line, texts)
    folder = Path(output) / "tables"
    for table in _write(spec, filled, folder):
        show(table)
    if unmeasured := filled.unmeasured(spec.layouts):
        say(f"{unmeasured}{' Data of your own: --data-dir.' if result.missing else ''}")
    say(f"wrote {folder} (all.md, and each table as md, csv and tex)")
    finish(result, output)
    if refused:
        raise refused[0]


def _run(spec: PaperSpec, verbose: bool) -> tuple[RunResult, dict[str | None, list[Record]], list[UserError]]:
    """Run all sweeps of a paper.

    Returns:
        The outcome of them together, records by the model as it was named, and why sweeps after the first are lacking.
    """
    from dart_eval.sweep.run import RunResult

    records: dict[str | None, list[Record]] = {}
    whole, refused = RunResult([], [], {}), list[UserError]()
    with TerminalView() as tell:
        load_libraries(tell, verbose)
        from dart_eval.cluster.run import run_all

        for claim in spec.claims:
            if claim.shape:  # what cannot be counted would take the tables with it after the last sweep
                with naming(f"claim {claim.text!r}: "):
                    _of_shape(replace(claim, prompt=1))
        for configs in spec.runs:
            try:
                result = run_all(configs, tell, skip_missing=True)
            except StoreError:
                raise
            except UserError as error:
                if not whole.records:
                    raise
                tell(Event("note", f"left out: {error}"))
                refused.append(error)
                continue
            records.setdefault(configs[0].model, []).extend(result.records)
            whole.records.extend(result.records)
            whole.failed.extend(result.failed)
            whole.missing.update(result.missing)
            whole.lost.extend(result.lost)
    return whole, records, refused


def _write(spec: PaperSpec, filled: Paper, folder: Path) -> list[Table]:
    """Write the tables with numbers, each in three forms and all in one file; returns them, the verdicts last."""
    from dart_eval.results.claims import table as verdicts
    from dart_eval.results.paper_picture import picture
    from dart_eval.results.paper_tables import to_csv
    from dart_eval.results.writers import csv_text, latex, markdown
    from dart_eval.util.files import write

    made = [(layout, *filled.table(layout)) for layout in spec.layouts if filled.measured(layout)]
    files: dict[str, str | bytes] = {f"{layout.name}.csv": to_csv(numbers) for layout, _, numbers in made}
    tables = {layout.name: table for layout, table, _ in made}
    if spec.claims:
        tables["claims"] = verdicts(spec.claims, filled, {layout.name: layout for layout in spec.layouts}, _of_shape)
        files["claims.csv"] = csv_text([tables["claims"].columns, *tables["claims"].body])
    for name, table in tables.items():
        files |= {f"{name}.md": markdown(table), f"{name}.tex": latex(table)}
    for layout, _, numbers in made:
        if layout.picture and (drawn := picture(layout, numbers)) is not None:
            files[f"{layout.name}.svg"] = drawn
    before, after = ([f"{text.strip()}\n"] if text else [] for text in (spec.about, filled.unmeasured(spec.layouts)))
    files["all.md"] = "\n".join([*before, *map(markdown, tables.values()), *after])
    for file, text in files.items():
        write(folder / file, text, REMEDY)
    return [*tables.values()]


def _of_shape(claim: Claim) -> float:
    """The cost that a claim about a shape names, in its unit."""
    from dart_eval.bench.overhead import measure
    from dart_eval.pruning.registry import make, parse
    from dart_eval.results.claims import SHAPED

    found = measure(make(*parse(claim.method)), claim.shape, claim.sparsity, prompts=(claim.prompt,))
    work = max(found.decode_share, found.scoring_share)
    cost = found.state_bytes[claim.prompt] if claim.column == "state MB" else work
    return cost / SHAPED[claim.column]
