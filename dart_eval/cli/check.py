"""`dart-eval check`: have results fallen behind a baseline?"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import FORMATS, one_of, own
from dart_eval.cli.view import for_terminal, output, put, say
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_target, read_text, telling, write

RESULTS_HELP = "Folder that `dart-eval run --output` wrote."
BASELINE_HELP = "Compare the results with this baseline, or with a folder of earlier results."
THRESHOLDS_HELP = "Read the thresholds from this YAML file: recovery, alpha, tasks."
UPDATE_HELP = "Write the baseline from the results, and check nothing."
GITHUB_HELP = "Write annotations and a job summary for GitHub Actions."
FORMAT_HELP = "Output format. By default a terminal gets a table, and a pipe md."


def check(
    results: Annotated[Path, typer.Argument(metavar="DIR", help=RESULTS_HELP)],
    baseline: Annotated[Path, own(BASELINE_HELP, None, "FILE")],
    thresholds: Annotated[Path | None, own(THRESHOLDS_HELP, None, "FILE")] = None,
    update: Annotated[bool, own(UPDATE_HELP, None, "", "--update")] = False,
    every: Annotated[bool, own("Also show the rows that are ok.", None, "", "--all")] = False,
    github: Annotated[bool, own(GITHUB_HELP, None, "", "--github")] = False,
    junit: Annotated[Path | None, own("Write a JUnit report to this file.", None, "FILE")] = None,
    format: Annotated[str | None, one_of(FORMATS, "format", FORMAT_HELP)] = None,
) -> None:
    """Check results against a baseline: exit status 0 if no row fell, 1 if a row fell or is missing.

    A row falls if its recovery is below the threshold and a test paired by document rules out noise.

    \b
    [bold]Examples[/bold]
    dart-eval check out --baseline results/regression-baseline.json --update
    dart-eval check out --baseline results/regression-baseline.json
    dart-eval check out --baseline out-old --junit report.xml
    """
    if update and (thresholds or every or github or junit or format):
        raise UserError("--update only writes the baseline", "leave out the options of a check")
    summary = os.environ.get("GITHUB_STEP_SUMMARY", "")
    if github and not summary:
        raise UserError("--github needs the variable GITHUB_STEP_SUMMARY", "leave --github out outside GitHub Actions")
    if target := baseline if update else junit:
        check_target(target)
    from dart_eval.results import check as checking
    from dart_eval.results.frame import cells
    from dart_eval.results.show import render

    now = cells(results, strict=True)
    if update:
        remedy = "choose another file"
        if baseline.is_file() and not re.match(r'\{\s*"schema": 1,|$', read_text(baseline, "baseline", remedy)):
            raise UserError(f"{baseline} is not a baseline, and would be overwritten", remedy)
        say(f"wrote {baseline}: {len(now)} cells, {checking.write_baseline(baseline, now)} documents")
        return
    limits = checking.thresholds_from(thresholds)
    report = checking.check(now, checking.load_baseline(baseline), limits, str(baseline))
    if junit is not None:
        write(junit, checking.junit(report))
    if github:
        with telling(f"GITHUB_STEP_SUMMARY {summary} cannot be written", ""), open(summary, "a", encoding="utf-8") as f:
            f.write(render([checking.table(report, every)], "md"))
        for line in checking.workflow_commands(report):
            say(line, err=format in ("json", "csv", "tex"))  # GitHub reads both streams; data stay data
    if format == "json":
        put(report.to_json())
    else:
        output([checking.table(report, every, for_terminal(format))], format)
    if checking.bad(report):
        raise typer.Exit(1)
