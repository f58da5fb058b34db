"""Results beside a baseline: a row falls if it lost too much and noise does not explain it.

A baseline is a folder of results, or one JSON file of a repository with a line per document, in an order that depends
only on the results, so that its diffs are readable.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os.path
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.results import show, stats, sums
from dart_eval.results.compare import Comparison, names
from dart_eval.results.documents import HASHES, INDEX, Answers, Compared, documents, measured
from dart_eval.results.frame import Cell, cells, counterparts, differing, paired
from dart_eval.results.inputs import HASH_DIGITS, CellInputs, identity, model_of
from dart_eval.results.metrics import DISTANCE, GOLD, chance, interval, kind_of, main, number, signed
from dart_eval.results.record import Metric, described, holds, read
from dart_eval.results.show import Columns, Table
from dart_eval.results.store import UnreadSamples
from dart_eval.util import files
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json, printable
from dart_eval.util.yamls import read_mapping

CHANGED = 1e-3  # a document has changed if its value moved by more; less is arithmetic
DIGITS = 6  # decimals of a document's value, so that another machine's arithmetic changes none
OK, FELL, MISSING = "ok", "FELL", "missing"
COLUMNS: Columns = {
    "cell": ("cell", str), "task": ("task", str), "metric": ("metric", str), "verdict": ("verdict", str),
    "then": ("then", number), "now": ("now", number), "recovery": ("recovery", number),
    "p worse (Holm)": ("p_holm", chance), "now - then": ("difference", signed), "95 % interval": ("ends", str),
    "changed": ("changed", str), "n": ("n", str), "why": ("why", str),
}  # fmt: skip


class Limits(BaseModel, extra="forbid"):
    """The least share of the baseline's quality."""

    recovery: Annotated[float, Field(gt=0, le=1)] = 0.98


class Thresholds(Limits):
    """The least share, other ones for some `tasks`, and the level `alpha` of the tests over all rows."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    tasks: dict[str, Limits] = Field(default_factory=dict)


def thresholds_from(file: Path | None) -> Thresholds:
    """Read the thresholds of a YAML file; the defaults without one."""
    data = read_mapping(file, "thresholds", "recovery: 0.98", empty=True) if file else {}
    try:
        return read(json.dumps(data, default=repr), TypeAdapter(Thresholds), str(file))
    except ValueError as error:
        raise UserError(f"thresholds: {error}", "keys are recovery, alpha and tasks") from None


# -- the baseline ------------------------------------------------------------------------------------------------------


class _Part(TypedDict):
    """A cell of a baseline file; measures and documents are rows, as `write_baseline` orders them."""

    inputs: Annotated[Json, holds(CellInputs)]
    method: NotRequired[str]
    measures: list[tuple[str, str, bool | None, tuple[str, ...], bool]]
    documents: list[tuple[str, int, str, str, str, str | None, dict[str, object]]]


class _Baseline(TypedDict):
    schema: Literal[1]
    cells: Annotated[list[_Part], Field(min_length=1)]


_BASELINE, _METRIC = TypeAdapter(_Baseline), TypeAdapter(Metric)
_DOCUMENT = (*INDEX, *HASHES, "cluster")  # of a document's line, before its values


def rounded(cell: Cell, named: Collection[tuple[str, str]] = ()) -> Cell:
    """Return a cell with what a check compares, rounded as in a baseline file, so that equal results stay equal.

    Args:
        named: (task, metric) of a baseline, in place of the main metrics of their tasks.
    """

    def select() -> Answers:
        of = cell.answers.measures
        chosen = [of[m.task, m.label] for m in main((one.metric for one in of.values()), named, gold=True)]
        places = {key for one in chosen for key in one.index}
        frame = cell.answers.documents[[key in places for key in cell.answers.documents.index]]
        measures = (dataclasses.replace(one, x=one.x.round(DIGITS), w=one.w.round(DIGITS)) for one in chosen)
        return Answers(frame, {one.name: one for one in measures})

    return dataclasses.replace(cell, read=select)


def write_baseline(path: Path, results: Sequence[Cell]) -> int:
    """Write the baseline of these cells; return its number of documents.

    Raises:
        UserError: values that are not finite, or the file cannot be written.
    """
    parts, count = [], 0
    for cell in sorted(map(rounded, results), key=lambda c: identity(c.inputs)):
        measures: list[object] = []
        values: dict[tuple[Any, ...], Json] = {}
        for (task, label), one in sorted(cell.answers.measures.items()):
            measures.append([task, label, one.metric.higher_is_better, one.members, one.metric.weights == "tasks"])
            for key, *pair in zip(one.index, one.x.tolist(), one.w.tolist(), strict=True):
                x, w = (int(value) if value.is_integer() else value for value in pair)
                values.setdefault(key, {})[one.metric.metric] = x if one.metric.aggregation == "mean" else [x, w]
        lines = [
            [*key, document[:HASH_DIGITS], prompt[:HASH_DIGITS], cluster, values[tuple(key)]]
            for *key, document, prompt, cluster in cell.answers.documents[[*_DOCUMENT]].itertuples(index=False)
        ]
        count += len(lines)
        typed = cell.settings.get("method", cell.inputs["method"])
        part = {"method": _line(typed)} if typed != cell.inputs["method"] else {}
        try:
            part["inputs"] = json.dumps(cell.inputs, sort_keys=True, indent=1, allow_nan=False)
            for name, rows in (("measures", measures), ("documents", lines)):
                part[name] = "[\n" + ",\n".join(map(_line, rows)) + "\n]"
        except ValueError:
            problem = f"{described(cell)} has values that are not finite"
            raise UserError(problem, "a baseline of them could never be met: find out why first") from None
        parts.append("{\n" + ",\n".join(f'"{name}": {text}' for name, text in part.items()) + "\n}")
    files.write(path, '{\n"schema": 1,\n"cells": [\n' + ",\n".join(parts) + "\n]\n}\n", "choose another --baseline")
    return count


def _line(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, sort_keys=True)


def load_baseline(path: Path) -> list[Cell]:
    """Return the cells of a baseline file, or of a results folder.

    Raises:
        UserError: it cannot be read, is not a baseline, or is empty.
    """
    if os.path.isdir(path):
        return cells(path, strict=True)
    remedy = f"make it from good results: dart-eval check RESULTS --baseline {path} --update"
    try:
        data = read(files.read_text(path, "baseline", remedy), _BASELINE, "baseline")
        return [_cell(part, str(path)) for part in data["cells"]]
    except ValueError as error:
        raise UserError(f"baseline {path} cannot be read ({error})", remedy) from None


def _cell(part: _Part, source: str) -> Cell:
    """Return a part of a baseline file as a cell.

    Raises:
        ValueError: a metric does not follow from the values of its documents.
    """
    lines = (dict(zip((*_DOCUMENT, "metrics"), line, strict=True)) for line in part["documents"])
    frame = documents({**line, "choices": 0} for line in lines)
    measures = {}
    for task, label, up, members, by_task in part["measures"]:
        fields = {"task": task, "metric": label, "value": math.nan, "stderr": None, "n": 0, "higher_is_better": up}
        metric = _METRIC.validate_python({**fields, "weights": "tasks" if by_task else "documents"})
        if (measure := measured(metric, members, frame)) is not None:
            measures[measure.name] = measure
        elif metric.aggregation:  # all but BLEU, which earlier versions compared
            raise ValueError(f"its documents do not give {task} {label}")
    settings = {"method": part["method"]} if "method" in part else {}
    return Cell(identity(part["inputs"]), part["inputs"], source, "", lambda: Answers(frame, measures), settings)


# -- the verdicts ------------------------------------------------------------------------------------------------------


def check(now: Sequence[Cell], then: Sequence[Cell], thresholds: Thresholds, baseline: str) -> Comparison:
    """Compare results with the cells of a baseline.

    Returns:
        Rows with `cell` in words, `task`, `metric`, `recovery` (share of the earlier quality above guessing; None if
        nothing could be lost), `changed` (documents whose value moved), `p_holm` (one-sided: now is worse; over all
        rows), `verdict`, `why`, and of the test `now`, `then` and the rest of `stats.Paired`.

    Raises:
        UserError: other documents or prompts, thresholds for missing tasks, or results of several models of one name.
    """
    ours, theirs = ({model_of(c.inputs["model"]): c.inputs["model"]["name"] for c in side} for side in (now, then))
    for name, count in Counter(theirs.values()).items():
        here = sorted(model for model, its_name in ours.items() if its_name == name)
        if len(here) > 1 == count:  # an older one must not stand in for the last
            several = f"the results have several models named {name}, of which {baseline} has one: {', '.join(here)}"
            raise UserError(several, "keep each checkpoint's results in a folder of its own")
    then = [rounded(cell) for cell in then]
    partners, known = counterparts(then, now), names(then)
    rows: list[Json] = []
    tested: list[tuple[Json, Compared]] = []
    pairs, notes = [], []
    for old in then:
        asked, both = old.answers.measures, {}
        why = "the results lack this metric" if old.key in partners else "not in the results"
        if not asked:
            notes.append(f"Not checked: {known[old.key]} on {old.inputs['task']}, which has no per-document metric.")
        elif cell := partners.get(old.key):
            try:
                both = {one.a.name: one for one in paired(rounded(cell, asked), old)}
                pairs.append((cell, old))
            except UnreadSamples as error:
                why = error.problem
        for name in asked:
            row: Json = {"cell": known[old.key], "task": name[0], "metric": name[1], "recovery": None, "changed": None}
            rows.append(row | {"p_holm": None, "verdict": MISSING, "why": why})
            tested += [(rows[-1], both[name])] if name in both else []
    if not rows:
        raise UserError(f"{baseline} has no metric that can be checked", "add a task with a value for each document")
    if unknown := sorted(thresholds.tasks.keys() - {row["task"] for row in rows}):
        remedy = "name tasks of the baseline, or take these results in with --update"
        raise UserError(f"thresholds name {unknown[0]!r}, of which {baseline} has no metric", remedy)
    _judge(tested, thresholds)
    notes += differing(pairs, "{}: {}.", "{1} then, {0} now")
    if new := len({c.key for c in now} - {c.key for c in partners.values()}):
        notes.append(f"Not in the baseline, so not checked: {new} of the results' cells (--update takes them in).")
    verdicts = Counter(row["verdict"] for row in rows)
    verdict, word = (OK, "ok") if verdicts[OK] == len(rows) else (FELL, "FAILED")
    headline = f"{word}: of {len(rows)} rows of {baseline} {verdicts[FELL]} fell, {verdicts[MISSING]} missing"
    about = {"verdict": verdict, "headline": headline, "baseline": baseline, "thresholds": thresholds.model_dump()}
    return Comparison(headline, rows, notes, about)


def _judge(rows: Sequence[tuple[Json, Compared]], thresholds: Thresholds) -> None:
    """Add tests and verdicts: a row falls if too much is lost, and beyond noise if it could be tested."""
    level = thresholds.alpha / max(1, sum(one.test.p_worse is not None for _, one in rows))
    tests = [_testable(one, level) for _, one in rows]
    for (row, one), test, p in zip(rows, tests, stats.holm([test.p_worse for test in tests]), strict=True):
        least, share = thresholds.tasks.get(row["task"], thresholds).recovery, recovery(one, p is not None)
        moved = ~(abs(one.a.x - one.b.x) <= CHANGED) | ~(abs(one.a.w - one.b.w) <= CHANGED)
        lost = share is not None and not share >= least  # NaN is lost, too
        beyond_noise = p is not None and p < thresholds.alpha
        fell = beyond_noise if share is None else lost and (beyond_noise or p is None)
        why = [f"recovery below {least:g}{'' if fell else ', within noise'}"] if lost else []
        why += [f"not tested: {test.reason}"] if p is None else []
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


def table(report: Comparison, every: bool = False, terminal: bool = False) -> Table:
    """Return the table of rows that fell or are missing.

    Args:
        every: of all rows.
        terminal: with the reasons as sentences, which are too long for its columns.
    """
    rows, limits = report.rows if every else bad(report), report.about["thresholds"]
    same = sum(row["changed"] == 0 for row in report.rows)
    notes = [
        *(map(sentence, bad(report)) if terminal else ()),
        f"{len(report.rows) - len(bad(report))} of {len(report.rows)} rows are ok; in {same} no document changed.",
        f"FELL: recovery below {limits['recovery']:g} (or the task's own) and one-sided p < {limits['alpha']:g} after "
        "Holm over all rows; where nothing can be tested, recovery alone decides.",
        "Perplexities: now - then of logarithms.",
        *least_falls(report),
        *report.notes,
    ]
    frame = pd.DataFrame(rows, dtype=object)
    frame = frame.assign(ends=[interval(row.get("low"), row.get("high")) for row in rows])
    return show.table(report.title, frame, {h: c for h, c in COLUMNS.items() if not terminal or h != "why"}, notes)


def least_falls(report: Comparison) -> list[str]:
    """Return the least falls in right answers that these tests could have noticed; none where there were none."""
    sizes = sorted({row["n"] for row in report.rows if row.get("kind") == "proportion" and row["p_holm"] is not None})
    tested = sum(row["p_holm"] is not None for row in report.rows)
    wrong = math.floor(math.log2(tested / report.about["thresholds"]["alpha"])) + 1 if sizes else 0  # .5**wrong < level
    falls = [f"{100 * wrong / n:.1f} points at n = {n}" for n in sizes if n >= wrong]
    seen = f"a fall of accuracy from {', '.join(falls)} ({wrong} answers turn wrong and none right)"
    return [f"Tests notice {seen}; one of log-likelihoods much earlier (docs/recipes.md)."] if falls else []


def sentence(row: Json) -> str:
    """Return a row in words."""
    values = f": {number(row['then'])} then, {number(row['now'])} now, n {row['n']}" if "now" in row else ""
    share = "" if row["recovery"] is None else f", recovery {row['recovery']:.4f}, p {chance(row['p_holm'])}"
    return printable(f"{row['cell']}, {row['task']} {row['metric']}{values}{share}; {row['why']}")


def junit(report: Comparison) -> str:
    """Return JUnit's XML: a test case per row."""
    counts = {"tests": str(len(report.rows)), "failures": str(len(bad(report)))}
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", {"name": "dart-eval check", **counts})
    for row in report.rows:
        name = {"classname": printable(row["cell"]), "name": printable(f"{row['task']} {row['metric']}")}
        case = ElementTree.SubElement(suite, "testcase", name)
        if row["verdict"] != OK:
            reason = {"message": printable(row["why"]), "type": row["verdict"]}
            ElementTree.SubElement(case, "failure", reason).text = sentence(row)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def workflow_commands(report: Comparison) -> list[str]:
    """Return GitHub's workflow commands, one per row that fell or is missing."""
    lines = []
    for row in bad(report):
        title = printable(f"{row['verdict']} {row['task']} {row['metric']}").replace("%", "%25")
        title, text = title.replace(":", "%3A").replace(",", "%2C"), sentence(row).replace("%", "%25")
        lines.append(f"::error title={title}::{text}")
    return lines
