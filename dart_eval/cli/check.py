"""`dart-eval check`: have results fallen behind a baseline?"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import FORMATS, one_of, own
from dart_eval.cli.view import for_terminal, output, put, say
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_name, check_own, check_target, write

OWN = re.compile(rb'^\s*\{\s*"schema":\s*\d+,\s*"cells":')  # the beginning of a baseline
RESULTS_HELP = "Folder that `dart-eval run --output` wrote."
BASELINE_HELP = "Compare the results with this baseline, or with a folder of earlier results."
THRESHOLDS_HELP = "Read the thresholds from this YAML file: recovery, of_dense, alpha, tasks."
UPDATE_HELP = "Write the baseline from the results, and check nothing."
FORCE_HELP = "With --update, replace a file that is not a baseline."
GITHUB_HELP = "Write annotations and a job summary for GitHub Actions."
FORMAT_HELP = "Output format. By default a terminal gets a table, and a pipe md."


def check(
    results: Annotated[Path, typer.Argument(metavar="DIR", help=RESULTS_HELP)],
    baseline: Annotated[Path, own(BASELINE_HELP, None, "FILE")],
    thresholds: Annotated[Path | None, own(THRESHOLDS_HELP, None, "FILE")] = None,
    update: Annotated[bool, own(UPDATE_HELP, None, "", "--update")] = False,
    force: Annotated[bool, own(FORCE_HELP, None, "", "--force")] = False,
    every: Annotated[bool, own("Also show the rows that are ok.", None, "", "--all")] = False,
    github: Annotated[bool, own(GITHUB_HELP, None, "", "--github")] = False,
    junit: Annotated[Path | None, own("Write a JUnit report to this file.", None, "FILE")] = None,
    format: Annotated[str | None, one_of(FORMATS, "format", FORMAT_HELP)] = None,
) -> None:
    """Check results against a baseline: exit status 0 if no row fell, 1 if a row fell or is missing.

    A row falls if its recovery is below the threshold and a test paired by document rules out noise, or if it is
    below a threshold of `of_dense`, which no test guards.

    \b
    [bold]Examples[/bold]
    dart-eval check out --baseline results/regression-baseline.json --update
    dart-eval check out --baseline results/regression-baseline.json
    dart-eval check out --baseline out-old --junit report.xml
    """
    if update:
        if thresholds or every or github or junit or format:
            raise UserError("--update only writes the baseline", "leave out the options of a check")
        _update(baseline, results, force)
        return
    if force:
        raise UserError("--force needs --update", "leave it out: a check writes no baseline")
    check_name(baseline, "--baseline")
    if junit is not None:
        check_target(junit)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if github and not summary:
        raise UserError("--github needs the variable GITHUB_STEP_SUMMARY", "leave --github out outside GitHub Actions")
    from dart_eval.results import check as checking
    from dart_eval.results.baseline import load_baseline
    from dart_eval.results.frame import cells
    from dart_eval.results.show import render

    limits, then = checking.thresholds_from(thresholds), load_baseline(baseline)
    report = checking.check(cells(results, strict=True), then, limits, str(baseline))
    table = checking.table(report, every)
    if junit is not None:
        write(junit, checking.junit(report))
    if github and summary:
        try:
            with open(summary, "a", encoding="utf-8") as stream:
                stream.write(render([table], "md"))
        except OSError as error:
            raise UserError(f"GITHUB_STEP_SUMMARY {summary} cannot be written ({error.strerror})") from None
        for line in checking.workflow_commands(report):
            say(line, err=format in ("json", "csv", "tex"))  # GitHub reads both streams; data stay data
    if for_terminal(format):
        why = [checking.sentence(row) for row in checking.bad(report)]  # too long for a column
        table = dataclasses.replace(table.without("why") if table.body else table, notes=[*why, *table.notes])
    if format == "json":
        put(report.to_json())
    else:
        output([table], format)
    if checking.bad(report):
        raise typer.Exit(1)


def _update(baseline: Path, results: Path, force: bool) -> None:
    """Write the baseline from a folder of results; `force` replaces a file that is none."""
    check_target(baseline)
    if not force:
        check_own(baseline, OWN, "baseline")
    from dart_eval.results.baseline import write as write_baseline
    from dart_eval.results.frame import cells

    now = cells(results, strict=True)
    documents = write_baseline(baseline, now)
    say(f"wrote {baseline}: {len(now)} cells, {documents} documents")
