"""Results beside a baseline: a row fails if it lost too much and noise does not explain it."""

from __future__ import annotations

import dataclasses
import functools
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import BaseModel, Field, TypeAdapter

from dart_eval.results import show, stats, sums
from dart_eval.results.baseline import rounded
from dart_eval.results.compare import Comparison, names
from dart_eval.results.documents import Compared
from dart_eval.results.format import FOUR, chance, interval, number, signed
from dart_eval.results.frame import Cell, Unpaired, counterparts, dense_of, differing, paired
from dart_eval.results.inputs import model_of
from dart_eval.results.metrics import DISTANCE, GOLD, kind_of
from dart_eval.results.record import read
from dart_eval.results.show import Columns, Table
from dart_eval.results.store import UnreadSamples
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json, printable
from dart_eval.util.yamls import read_mapping

CHANGED = 1e-3  # a document has changed if its value moved by more; less is arithmetic
OK, FELL, MISSING = "ok", "FELL", "missing"
NOT_HELD = "of_dense not checked: dense has no quality above guessing, or above 0, to hold it against"
COLUMNS: Columns = {
    "cell": ("cell", str), "task": ("task", str), "metric": ("metric", str), "verdict": ("verdict", str),
    "then": ("then", number), "now": ("now", number), "recovery": ("recovery", FOUR),
    "p worse (Holm)": ("p_holm", chance), "of dense": ("of_dense", FOUR), "now - then": ("difference", signed),
    "95 % interval": ("ends", str), "changed": ("changed", str), "n": ("n", str), "why": ("why", str),
}  # fmt: skip


class Limits(BaseModel, extra="forbid"):
    """Least shares of the baseline's quality (`recovery`) and of dense's (`of_dense`; None: any)."""

    recovery: Annotated[float, Field(gt=0, le=1)] = 0.98
    of_dense: Annotated[float, Field(gt=0, le=1)] | None = None


class Thresholds(Limits):
    """Limits, other ones for some `tasks`, and the level `alpha` of the tests over all rows."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    tasks: dict[str, Limits] = Field(default_factory=dict)

    def limits_of(self, task: str) -> Limits:
        """Return the limits of a task: its own in place of the common ones."""
        return self.model_copy(update=self.tasks[task].model_dump(exclude_unset=True)) if task in self.tasks else self


def thresholds_from(file: Path | None) -> Thresholds:
    """Read the thresholds of a YAML file; the defaults without one."""
    if file is None:
        return Thresholds()
    data = read_mapping(file, "thresholds", "recovery: 0.98", empty=True)
    try:
        return read(json.dumps(data, default=repr), TypeAdapter(Thresholds), str(file))
    except ValueError as error:
        raise UserError(f"thresholds: {error}", "keys are recovery, of_dense, alpha and tasks") from None


def check(now: Sequence[Cell], then: Sequence[Cell], thresholds: Thresholds, baseline: str) -> Comparison:
    """Compare results with the cells of a baseline.

    Returns:
        Rows with `cell` in words, `task`, `metric`, `recovery` (share of the earlier quality above guessing; None if
        nothing could be lost), `of_dense` (share of dense's quality in the same results), `changed` (documents whose
        value moved), `p_holm` (one-sided: now is worse; over all rows), `verdict`, `why`, and of the test `now`, `then`
        and the rest of `stats.Paired`.

    Raises:
        UserError: other documents or prompts, thresholds for missing tasks, or results of several models of one name.
    """
    notes: list[str] = []
    models = [{model_of(c.inputs["model"]): c.inputs["model"]["name"] for c in side} for side in (then, now)]
    for name in Counter(models[0].values()):
        here = sorted(model for model, its_name in models[1].items() if its_name == name)
        if len(here) > 1 == [*models[0].values()].count(name):  # an older one must not stand in for the last
            several = f"the results have several models named {name}, of which {baseline} has one: {', '.join(here)}"
            raise UserError(several, "keep each checkpoint's results in a folder of its own")
    then = [_rounded(cell) for cell in then]
    partners, dense = counterparts(then, now), dense_of(now)
    known, as_then = names(then), functools.cache(_rounded)  # one dense cell stands beside many
    rows, pairs = [], []
    for old in then:
        asked, cell = frozenset(old.answers.measures), partners.get(old.key)
        both: dict[tuple[str, str], Compared] = {}
        shares: dict[tuple[str, str], float | None] = {}
        if not asked:
            notes.append(f"Not checked: {known[old.key]} on {old.inputs['task']}, which has no per-document metric.")
        elif cell is None:
            why = "not in the results"
        else:
            why = "the results lack this metric"
            try:
                both = {one.a.name: one for one in paired(as_then(cell, asked), old)}
                pairs.append((cell, old))
            except UnreadSamples as error:
                why = error.problem
            except Unpaired as error:
                raise UserError(error.problem, "if the change is meant, write a new baseline with --update") from None
            if both:
                needed = any(thresholds.limits_of(task).of_dense is not None for task, _ in asked)
                reference = dense.get(cell.key)
                shares = _of_dense(as_then(cell, asked), reference and as_then(reference, asked), needed)
        for name in old.answers.measures:
            row: Json = {"cell": known[old.key], "task": name[0], "metric": name[1], "recovery": None}
            row |= {"of_dense": shares.get(name), "changed": None, "p_holm": None, "verdict": MISSING, "why": why}
            rows.append((row, both.get(name)))
    if not rows:
        raise UserError(f"{baseline} has no metric that can be checked", "add a task with a value for each document")
    if unknown := sorted(set(thresholds.tasks) - {row["task"] for row, _ in rows}):
        remedy = "name tasks of the baseline, or take these results in with --update"
        raise UserError(f"thresholds name {unknown[0]!r}, of which {baseline} has no metric", remedy)
    _judge([(row, one) for row, one in rows if one is not None], thresholds)
    notes += differing(pairs, "{}: {}.", "{1} then, {0} now")
    if unheld := sum(NOT_HELD in row["why"] for row, _ in rows):
        notes.append(f"Not held against dense: {unheld} of {len(rows)} rows (--all says why).")
    if new := len({c.key for c in now} - {c.key for c in partners.values()}):
        notes.append(f"Not in the baseline, so not checked: {new} of the results' cells (--update takes them in).")
    verdicts = Counter(row["verdict"] for row, _ in rows)
    failed = verdicts[OK] < len(rows)
    headline = f"of {len(rows)} rows of {baseline} {verdicts[FELL]} fell, {verdicts[MISSING]} missing"
    headline = f"FAILED: {headline}" if failed else f"ok: {headline}"
    about: Json = {"verdict": FELL if failed else OK, "headline": headline, "baseline": baseline}
    return Comparison(headline, [row for row, _ in rows], notes, about | {"thresholds": thresholds.model_dump()})


def _rounded(cell: Cell, named: Collection[tuple[str, str]] = ()) -> Cell:
    """Return a cell with the answers that a check compares. named: metrics of the baseline."""
    return dataclasses.replace(cell, read=lambda: rounded(cell.answers, named))


def _of_dense(cell: Cell, dense: Cell | None, needed: bool) -> dict[tuple[str, str], float | None]:
    """Return the share of dense's quality by metric; empty if dense is missing, cannot be read or cannot be paired.

    Raises:
        UserError: it is empty, and a threshold needs it.
    """
    try:
        if dense is None:
            plain = " --ffn-bits 16" if cell.inputs.get("ffn_bits") else ""  # dense's weights are unrounded
            lacks = f"the results hold no dense cell for {cell.inputs['task']}"
            raise UserError(lacks, f"run with --method dense{plain} too, or leave of_dense out")
        both = paired(cell, dense)
    except UserError as error:
        if needed:
            raise UserError(f"thresholds set of_dense, and {error.problem}", error.remedy) from None
        return {}
    # Sums of log-likelihoods over long answers say little as a share of dense's.
    return {one.a.name: recovery(one, one.test.p is not None) for one in both if one.metric.metric != GOLD}


def _judge(rows: Sequence[tuple[Json, Compared]], thresholds: Thresholds) -> None:
    """Add tests and verdicts: a row falls if too much is lost, and beyond noise if it could be tested."""
    level = thresholds.alpha / max(1, sum(one.test.p_worse is not None for _, one in rows))
    tests = [_testable(one, level) for _, one in rows]
    for (row, one), test, p in zip(rows, tests, stats.holm([test.p_worse for test in tests]), strict=True):
        limits, few = thresholds.limits_of(row["task"]), one.test.p_worse is not None and test.p_worse is None
        share, of_dense = recovery(one, one.test.p is not None and not few), row["of_dense"]
        moved = ~(abs(one.a.x - one.b.x) <= CHANGED) | ~(abs(one.a.w - one.b.w) <= CHANGED)
        lost = share is not None and not share >= limits.recovery  # NaN is lost, too
        beyond_noise = p is not None and p < thresholds.alpha
        fell = beyond_noise if share is None else lost and (beyond_noise or p is None)
        why = [f"recovery below {limits.recovery:g}{'' if fell else ', within noise'}"] if lost else []
        if p is None:
            why.append(f"not tested: {test.reason}")
        if limits.of_dense is not None and of_dense is None and row["metric"] != GOLD:
            why.append(NOT_HELD)
        elif limits.of_dense is not None and of_dense is not None and not of_dense >= limits.of_dense:
            fell = True
            why.append(f"of dense {of_dense:.4f} below {limits.of_dense:g}")
        row |= {"recovery": share, "changed": int(moved.sum()), "p_holm": p, "verdict": FELL if fell else OK}
        row |= {"why": "; ".join(why), "now": test.value_a, "then": test.value_b}
        row |= {name: value for name, value in vars(test).items() if name not in ("value_a", "value_b")}


def _testable(one: Compared, level: float) -> stats.Paired:
    """Return the test, with a one-sided p that Holm's correction over many rows leaves a chance to pass.

    There is none where the worst fall of so few units is more likely by chance than Holm's level. Where no resample is
    as bad, which many rows together would never pass, it is Student's.
    """
    test, student = one.test, one.lost.student
    if test.p_worse is None:
        return test
    if 0.5**test.clusters >= level:
        reason = f"{test.clusters} independent units, too few for so many rows"
        return dataclasses.replace(test, p_worse=None, reason=reason)
    if test.test != stats.BOOTSTRAP or student is None or test.p_worse > 1 / (1 + stats.RESAMPLES):
        return test
    return dataclasses.replace(test, p_worse=min(test.p_worse, student / 2))


def recovery(one: Compared, tested: bool) -> float | None:
    """Return the share of the earlier quality that is left, above guessing where that is known.

    It is now / then, then / now where lower is better, and of mean log-likelihoods exp(now - then). It is None where it
    has no ratio, for distances to dense, and where a test decides since the earlier quality may be noise.

    Args:
        tested: whether a test decides beside it.
    """
    name, now, then = one.metric.metric, one.test.value_a, one.test.value_b
    if kind_of(name).group == DISTANCE:
        return None
    if one.chance:
        known = one.recovery is not None or not tested
        return (now - one.chance) / (then - one.chance) if known and then > one.chance else None
    if name == GOLD:
        return sums.exp(now - then)
    good, reference = (now, then) if one.metric.higher_is_better else (then, now)
    if reference != 0 and not min(good, reference) < 0:
        return 1.0 if good == reference else good / reference
    return None if tested or one.lost.value <= 0 else 1 - one.lost.value / max(abs(now), abs(then))


# -- for people and machines -------------------------------------------------------------------------------------------


def bad(report: Comparison) -> list[Json]:
    """Return the rows that fell or are missing."""
    return [row for row in report.rows if row["verdict"] != OK]


def table(report: Comparison, every: bool = False) -> Table:
    """Return the table of rows that fell or are missing, or of all rows."""
    rows = report.rows if every else bad(report)
    ends = [interval(row.get("low"), row.get("high")) for row in rows]
    limits = report.about["thresholds"]
    same = sum(row["changed"] == 0 for row in report.rows)
    notes = [
        f"{len(report.rows) - len(bad(report))} of {len(report.rows)} rows are ok; in {same} no document changed.",
        f"FELL: recovery below {limits['recovery']:g} (or the task's own) and one-sided p < {limits['alpha']:g} after "
        "Holm over all rows; where nothing can be tested, recovery alone decides.",
        "Perplexities: now - then of logarithms.",
    ]
    frame = pd.DataFrame(rows, dtype=object).assign(ends=ends)
    return show.table(report.title, frame, COLUMNS, [*notes, *report.notes])


def sentence(row: Json) -> str:
    """Return a row in words."""
    values = f": {number(row['then'])} then, {number(row['now'])} now, n {row['n']}" if "now" in row else ""
    share = "" if row["recovery"] is None else f", recovery {row['recovery']:.4f}, p {chance(row['p_holm'])}"
    return printable(f"{row['cell']}, {row['task']} {row['metric']}{values}{share}; {row['why']}")


def junit(report: Comparison) -> str:
    """Return JUnit's XML: a test case per row."""
    counts = {"tests": str(len(report.rows)), "failures": str(len(bad(report))), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "dart-eval check", **counts, "skipped": "0"})
    for row in report.rows:
        name = {"classname": printable(row["cell"]), "name": printable(f"{row['task']} {row['metric']}"), "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", name)
        if row["verdict"] != OK:
            reason = {"message": printable(row["why"]), "type": row["verdict"]}
            ElementTree.SubElement(case, "failure", reason).text = sentence(row)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def workflow_commands(report: Comparison) -> list[str]:
    """Return GitHub's workflow commands, one per row that fell or is missing."""
    lines = []
    for row in bad(report):
        title = printable(f"{row['verdict']} {row['task']} {row['metric']}")
        for raw, escaped in (("%", "%25"), (":", "%3A"), (",", "%2C")):
            title = title.replace(raw, escaped)
        text = sentence(row).replace("%", "%25")
        lines.append(f"::error title={title}::{text}")
    return lines
