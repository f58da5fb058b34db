"""Comparison of results with a baseline: a row fails if it lost too much and noise does not explain it."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass

from dart_eval.results import metrics, stats, writers
from dart_eval.results.baseline import rounded
from dart_eval.results.compare import ColumnOf, names, table_of
from dart_eval.results.format import FOUR, chance, number, signed
from dart_eval.results.frame import Compared, compared
from dart_eval.results.metrics import GOLD
from dart_eval.results.outcomes import Cell, Measure, Unpaired, older_note
from dart_eval.results.pairing import Pair, counterparts, current, dense_cells, dense_of, differing, nearest_to, pair
from dart_eval.results.store import UnreadSamples
from dart_eval.results.thresholds import Thresholds
from dart_eval.results.writers import Table, finite
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import json_text, printable

CHANGED = 1e-3  # a document has changed if its value moved by more; less is arithmetic
OK, FELL, MISSING = "ok", "FELL", "missing"
NOT_HELD = "of_dense not checked: dense has no quality above guessing, or above 0, to hold it against"


@dataclass(frozen=True)
class CheckRow:
    """One metric of one baseline cell, then and now.

    Attributes:
        cell: method, parameters and sparsity, in words.
        recovery: share of the earlier quality above guessing; below 1 is worse. None if nothing could be lost.
        of_dense: share of dense's quality in the same results.
        changed: documents whose value moved.
        result: test of now against then; None if the cell is missing.
        p_holm: one-sided (now is worse), adjusted over all rows.
        verdict: `ok`, `FELL` or `missing`.
        why: the reason in words.
        alone: `recovery` if no test decides.
    """

    cell: str
    task: str
    metric: str
    recovery: float | None = None
    of_dense: float | None = None
    changed: int | None = None
    result: stats.Paired | None = None
    p_holm: float | None = None
    verdict: str = MISSING
    why: str = ""
    alone: float | None = None

    def to_json(self) -> dict[str, object]:
        """Return flat data: then, now and the rest of the test beside the row's own fields."""
        data = {k: v for k, v in vars(self).items() if k not in ("result", "alone")}
        if self.result is not None:
            test = dataclasses.asdict(self.result)
            data |= {"now": test.pop("value_a"), "then": test.pop("value_b"), **test}
        return data


@dataclass(frozen=True)
class Report:
    """All rows, the thresholds and baseline, and remarks."""

    rows: list[CheckRow]
    thresholds: Thresholds
    baseline: str
    notes: list[str]

    @property
    def bad(self) -> list[CheckRow]:
        """Rows that fell or are missing."""
        return [r for r in self.rows if r.verdict != OK]

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        fell = sum(r.verdict == FELL for r in self.rows)
        missing = len(self.bad) - fell
        if not self.bad:
            return f"ok: all {len(self.rows)} rows of {self.baseline} hold"
        counts = [*([f"{fell} fell"] if fell else []), *([f"{missing} missing"] if missing else [])]
        return f"FAILED: of {len(self.rows)} rows of {self.baseline} {', '.join(counts)}"


def check(now: Sequence[Cell], then: Sequence[Cell], thresholds: Thresholds, baseline: str) -> Report:
    """Compare results with the cells of a baseline.

    Raises:
        UserError: other documents or prompts, or thresholds for missing tasks.
    """
    now, notes = current(now, then)
    then = [rounded(cell) for cell in then]
    named = frozenset((m.task, m.metric) for cell in then for m in cell.read().measures)
    now = [rounded(cell, named) for cell in now]  # a version may call another metric the main one
    partners = counterparts(then, now)
    # Baselines of earlier versions lack the user's spelling of methods; the results have it.
    typed = [c if c.settings else dataclasses.replace(c, settings=partners[c.key].settings) if c.key in partners else c
             for c in then]  # fmt: skip
    labels, dense = names(typed), dense_cells(now)
    rows: list[CheckRow] = []
    made: list[Pair] = []
    for old in then:
        measures = old.read().measures
        if not measures:
            notes.append(f"Not checked: {labels[old.key]} on {old.inputs['task']}, which has no per-document metric.")
        found = _pair(old, partners.get(old.key), now)
        if isinstance(found, str):
            rows += [CheckRow(labels[old.key], m.task, m.metric, why=found) for m in measures]
            continue
        made.append(found)
        reference = dense_of(found.a, dense)
        needed = any(thresholds.limits_of(m.task).of_dense is not None for m in measures)
        if reference is None and needed:
            plain = " --ffn-bits 16" if old.inputs.get("ffn_bits") else ""  # dense's weights are unrounded
            raise UserError(
                f"thresholds set of_dense, and the results hold no dense cell for {old.inputs['task']}",
                f"run with --method dense{plain} too, or leave of_dense out",
            )
        beside = {one.measure: one for one in _beside(found.a, reference, needed)}
        rows += [_row(labels[old.key], m, found, beside.get(m)) for m in measures]
    if not rows:
        raise UserError(f"{baseline} has no metric that can be checked", "add a task with a value for each document")
    unknown = sorted(set(thresholds.tasks) - {r.task for r in rows})
    if unknown and unknown[0] in {c.inputs["task"] for c in now}:
        raise UserError(
            f"thresholds name {unknown[0]!r}, of which {baseline} has no metric", "take its results in with --update"
        )
    if unknown:
        raise UserError(f"thresholds name the unknown task {unknown[0]!r}", nearest(unknown[0], {r.task for r in rows}))
    level = thresholds.alpha / max(1, sum(r.result is not None and r.result.p_worse is not None for r in rows))
    rows = [_testable(r, level) for r in rows]
    adjusted = stats.holm([r.result.p_worse if r.result else None for r in rows])
    rows = [_judged(dataclasses.replace(r, p_holm=p), thresholds) for r, p in zip(rows, adjusted, strict=True)]
    notes += differing(made, "{}: {}.", "{1} then, {0} now")
    if unheld := sum(NOT_HELD in r.why for r in rows):
        notes.append(f"Not held against dense: {unheld} of {len(rows)} rows (--all says why).")
    notes += older_note([*now, *then])
    new = len({c.key for c in now} - {c.key for c in partners.values()})
    if new:
        notes.append(f"Not in the baseline, so not checked: {new} of the results' cells (--update takes them in).")
    return Report(rows, thresholds, baseline, notes)


def _pair(old: Cell, cell: Cell | None, now: Sequence[Cell]) -> Pair | str:
    """Pair a cell of the baseline with the results' cell, or return why there is none."""
    if cell is None:
        return f"not in the results: {nearest_to(old, now)}"
    if cell.unread_rival:
        return f"{cell.unread_rival} cannot be read, and may be a later run of this cell"
    try:
        return pair(cell, old)
    except UnreadSamples as error:
        return error.problem
    except Unpaired as error:
        raise UserError(error.problem, "if the change is meant, write a new baseline with --update") from None


def _beside(cell: Cell, dense: Cell | None, needed: bool) -> list[Compared]:
    """Compare a cell with its dense one; empty if that cannot be read or paired.

    Raises:
        UserError: it cannot, and a threshold needs it.
    """
    try:
        found = None if dense is None else pair(cell, dense)
    except (UnreadSamples, Unpaired) as error:
        if needed:
            raise UserError(f"thresholds set of_dense, and {error.problem}", error.remedy) from None
        return []
    return [] if found is None else compared(found, found.x.measures)


def _row(name: str, measure: Measure, both: Pair, dense: Compared | None) -> CheckRow:
    """Return a row without its verdict."""
    made = compared(both, [measure])
    if not made:
        return CheckRow(name, measure.task, measure.metric, why="the results lack this metric")
    (one,) = made
    # Sums of log-likelihoods over long answers say little as a share of dense's.
    level = None if dense is None or measure.name == GOLD else _recovery(dense, dense.test.p is not None)
    moved = ~(abs(one.pairs.a - one.pairs.b) <= CHANGED)
    changed = int(moved.reshape(len(moved), -1).any(1).sum())
    shares = _recovery(one, one.test.p is not None), _recovery(one, tested=False)
    test = _beyond_resamples(one)
    return CheckRow(name, measure.task, measure.metric, shares[0], level, changed, test, alone=shares[1])


def _beyond_resamples(one: Compared) -> stats.Paired:
    """Return the test. Where no resample is as bad, which many rows together would never pass, p is Student's."""
    test, student = one.test, one.lost.student
    if test.test != stats.BOOTSTRAP or test.p_worse is None or student is None:
        return test
    if test.p_worse > 1 / (1 + stats.RESAMPLES):
        return test
    return dataclasses.replace(test, p_worse=min(test.p_worse, student / 2))


def _testable(row: CheckRow, level: float) -> CheckRow:
    """Return a row without its p where the worst fall of so few units is more likely by chance than Holm's level."""
    test = row.result
    if test is None or test.p_worse is None or 0.5**test.clusters < level:
        return row
    reason = f"{test.clusters} independent units, too few for so many rows"
    return dataclasses.replace(row, recovery=row.alone, result=dataclasses.replace(test, p_worse=None, reason=reason))


def _recovery(one: Compared, tested: bool) -> float | None:
    """Return the share above guessing for choices, `recovery` for other metrics, None for distances to dense.

    It is None too if the earlier quality was not above guessing by more than noise, and a test decides in its place.
    """
    now, then = one.test.value_a, one.test.value_b
    if metrics.kind_of(one.measure.name).group == metrics.DISTANCE:
        return None
    if not one.chance:
        share = recovery(one.measure, now, then)
        if share is None and not tested and not one.lost.value <= 0:
            share = 1 - one.lost.value / max(abs(now), abs(then))
        return share
    known = one.recovery is not None or not tested
    return (now - one.chance) / (then - one.chance) if known and then > one.chance else None


def _has_share(metric: str) -> bool:
    """Whether a metric is held against dense's: sums of log-likelihoods and distances are not."""
    name = metric.partition(",")[0]
    return name != GOLD and metrics.kind_of(name).group != metrics.DISTANCE


def recovery(measure: Measure, now: float, then: float) -> float | None:
    """Return the remaining share of quality: now / then, or then / now if lower is better; None if it has no ratio.

    Mean log-likelihoods are compared as likelihoods, exp(now - then), like the ratio of two perplexities.
    """
    if measure.name == GOLD:
        return stats.exp(now - then)
    good, reference = (now, then) if measure.higher_is_better else (then, now)
    if reference == 0 or min(good, reference) < 0:
        return None
    return 1.0 if good == reference else good / reference


def _judged(row: CheckRow, thresholds: Thresholds) -> CheckRow:
    """Add the verdict to a row: too much lost, and beyond noise if it was tested."""
    if row.result is None:
        return row
    limits, why = thresholds.limits_of(row.task), []
    tested = row.p_holm is not None
    lost = row.recovery is not None and not row.recovery >= limits.recovery  # NaN is lost, too
    beyond_noise = tested and row.p_holm is not None and row.p_holm < thresholds.alpha
    if row.recovery is None:
        fell = beyond_noise
    else:
        fell = lost and (beyond_noise or not tested)
    if fell:
        amount = "no ratio" if row.recovery is None else f"recovery {row.recovery:.4f} below {limits.recovery:g}"
        why.append(f"{amount}, {f'p {chance(row.p_holm)}' if tested else 'by the threshold alone'}")
    elif lost:
        why.append(f"recovery below {limits.recovery:g}, within noise")
    if not tested:
        why.append(f"not tested: {row.result.reason}")
    if limits.of_dense is not None and row.of_dense is not None and not row.of_dense >= limits.of_dense:
        fell = True
        why.append(f"of dense {row.of_dense:.4f} below {limits.of_dense:g}")
    elif limits.of_dense is not None and row.of_dense is None and _has_share(row.metric):
        why.append(NOT_HELD)
    return dataclasses.replace(row, verdict=FELL if fell else OK, why="; ".join(why))


# -- for people and machines ---------------------------------------------------------------------------------------


def table(report: Report, every: bool = False) -> Table:
    """Return the table of rows that fell or are missing, or of all rows."""
    rows = report.rows if every else report.bad
    dense = any(r.of_dense is not None for r in rows)
    columns: list[ColumnOf] = [
        ("cell", "cell", str), ("task", "task", str), ("metric", "metric", str), ("then", "then", number),
        ("now", "now", number), ("recovery", "recovery", FOUR), *([("of dense", "of_dense", FOUR)] if dense else []),
        ("now - then", "difference", signed), ("95 % interval", "ends", str), ("p worse (Holm)", "p_holm", chance),
        ("changed", "moved", str), ("verdict", "verdict", str), ("why", "why", str),
    ]  # fmt: skip
    lines = [{**r.to_json(), "moved": r.result and f"{r.changed} of {r.result.n}"} for r in rows]
    return table_of(report.headline, lines, columns, note(report, every))


def note(report: Report, every: bool = False) -> str:
    """Return the rest in one line, and the rule of verdicts."""
    fine = [r for r in report.rows if r.verdict == OK]
    parts = []
    if fine and report.bad and not every:
        ratios = [r.recovery for r in fine if r.recovery is not None]
        spread = f", recovery {min(ratios):.4f} to {max(ratios):.4f}" if ratios else ""
        parts.append(f"{len(fine)} rows are ok{spread}.")
    same = sum(r.changed == 0 for r in report.rows)
    parts.append(f"In {same} of {len(report.rows)} rows no document changed.")
    t = report.thresholds
    parts.append(
        f"FELL: recovery below {t.limits.recovery:g} (or the task's own) and one-sided p < {t.alpha:g} after Holm over "
        f"all rows; where nothing can be tested, recovery alone decides. Perplexities: now - then of logarithms."
    )
    return " ".join([*parts, *report.notes])


def markdown(report: Report, every: bool = False) -> str:
    """Return Markdown: the verdict, then the table if it has rows."""
    rows = table(report, every)
    return writers.markdown(rows) if rows.body else f"### {printable(rows.title)}\n\n{printable(rows.note)}\n"


def to_json(report: Report) -> str:
    """Return JSON of everything, in full precision."""
    data = {
        "verdict": FELL if report.bad else OK, "headline": report.headline, "baseline": report.baseline,
        "thresholds": dataclasses.asdict(report.thresholds), "resamples": stats.RESAMPLES, "seed": stats.SEED,
        "rows": [r.to_json() for r in report.rows], "notes": report.notes,
    }  # fmt: skip
    return json_text(finite(data)) + "\n"


def junit(report: Report) -> str:
    """Return JUnit's XML: a test case per row."""
    bad = str(len(report.bad))
    counts = {"tests": str(len(report.rows)), "failures": bad, "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "dart-eval check", **counts, "skipped": "0"})
    for row in report.rows:
        case = ElementTree.SubElement(
            suite, "testcase",
            {"classname": printable(row.cell), "name": printable(f"{row.task} {row.metric}"), "time": "0"},
        )  # fmt: skip
        if row.verdict != OK:
            failure = ElementTree.SubElement(case, "failure", {"message": printable(row.why), "type": row.verdict})
            failure.text = _sentence(row)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _sentence(row: CheckRow) -> str:
    r = row.result
    values = "" if r is None else f": {number(r.value_b)} then, {number(r.value_a)} now, n {r.n}"
    return printable(f"{row.cell}, {row.task} {row.metric}{values}; {row.why}")


def workflow_commands(report: Report) -> list[str]:
    """Return GitHub's workflow commands, one per row that fell or is missing."""
    lines = []
    for row in report.bad:
        title = printable(f"{row.verdict} {row.task} {row.metric}")
        for raw, escaped in (("%", "%25"), (":", "%3A"), (",", "%2C")):
            title = title.replace(raw, escaped)
        text = _sentence(row).replace("%", "%25")
        lines.append(f"::error title={title}::{text}")
    return lines
