"""`dart-eval check`: have results fallen behind a baseline?"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dart_eval.cli.options import FORMATS, one_of, own
from dart_eval.cli.view import put, say, show
from dart_eval.util.errors import UserError, remark
from dart_eval.util.files import check_name, check_own, check_target, write

if TYPE_CHECKING:
    from dart_eval.results.check import Report

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
    from dart_eval.results import baseline as file
    from dart_eval.results import check as checking
    from dart_eval.results.outcomes import cells
    from dart_eval.results.thresholds import thresholds_from

    limits = thresholds_from(thresholds)
    then = file.load_baseline(baseline)
    report = checking.check(cells(results), then, limits, str(baseline))
    if junit is not None:
        write(junit, checking.junit(report))
    if github and summary:
        _add_to(summary, checking.markdown(report, every))
        for line in checking.workflow_commands(report):
            say(line, err=format in ("json", "csv", "tex"))  # GitHub reads both streams; data stay data
    _print(report, every, format)
    if report.bad:
        raise typer.Exit(1)


def _print(report: Report, every: bool, format: str | None) -> None:
    """Print a report; without a format a terminal gets a table, and a pipe md."""
    from dart_eval.results import check as checking
    from dart_eval.results.writers import csv_text, latex

    table = checking.table(report, every)
    if format == "json":
        put(checking.to_json(report))
    elif format == "table" or (format is None and sys.stdout.isatty()):
        show(table)
    elif format in ("csv", "tex"):
        put(latex(table) if format == "tex" else csv_text([table.columns, *table.body]))
    else:
        put(checking.markdown(report, every))


def _update(baseline: Path, results: Path, force: bool) -> None:
    """Write the baseline from a folder of results; `force` replaces a file that is none."""
    check_target(baseline)
    if not force:
        check_own(baseline, OWN, "baseline")
    from dart_eval.results import baseline as file
    from dart_eval.results.outcomes import cells
    from dart_eval.results.pairing import current

    found = cells(results, strict=True)
    if baseline.is_file():
        with contextlib.suppress(UserError):  # what cannot be read is replaced
            found, notes = current(found, file.load_baseline(baseline))  # as a check chooses
            for note in notes:
                remark(note)
    documents = file.write(baseline, found)
    say(f"wrote {baseline}: {len(found)} cells, {documents} documents")


def _add_to(summary: str, text: str) -> None:
    """Append a text to the file of a job's summary."""
    try:
        with open(summary, "a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"GITHUB_STEP_SUMMARY {summary} cannot be written ({error.strerror})") from None
