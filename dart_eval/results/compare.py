"""Comparison of two sets of cells, paired by document: one row per task and metric."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_eval.results import metrics as known_metrics
from dart_eval.results import stats, writers
from dart_eval.results.distance import beside_dense
from dart_eval.results.format import FOUR, chance, interval, number, signed, sparsity
from dart_eval.results.frame import compared
from dart_eval.results.inputs import DENSE, PRUNING, UNLIKE_DENSE, UNSAID, identity, model_of
from dart_eval.results.labels import exact, grouped, labels
from dart_eval.results.outcomes import Cell, Measure, cells, describe, newest, older_note
from dart_eval.results.pairing import Pair, counterparts, differing, nearest_to, pair
from dart_eval.results.store import UnreadSamples
from dart_eval.results.writers import Column, Table, finite
from dart_eval.util.errors import UserError, nearest, remark
from dart_eval.util.text import Json, json_text, settings_in


@dataclass(frozen=True)
class CompareRow:
    """One metric of one task, A against B.

    Attributes:
        contrast: the two cells, in words.
        task, metric, higher_is_better: as in records.
        result: the test.
        key_a, key_b: of the two records.
        p_holm: p of the test, adjusted over the tasks of this contrast and metric.
        better: `A` or `B` if `p_holm` is below .05, else `-`.
    """

    contrast: str
    task: str
    metric: str
    higher_is_better: bool | None
    result: stats.Paired
    key_a: str
    key_b: str
    p_holm: float | None = None
    better: str = "-"

    def to_json(self) -> dict[str, object]:
        """Return flat data for json and csv."""
        data = {k: v for k, v in vars(self).items() if k != "result"}
        return {**data, **{k: v for k, v in dataclasses.asdict(self.result).items() if k != "p_worse"}}


@dataclass(frozen=True)
class Comparison:
    """The rows, the names of A and B, and remarks."""

    a: str
    b: str
    rows: list[CompareRow]
    notes: list[str]


# Inputs in which A and B may differ.
FREE = {"method": ("method", "params"), "sparsity": ("sparsity",), "model": ("model",), "row": PRUNING}
ColumnOf = tuple[str, str, Callable[[Any], str]]
NamedPair = tuple[str, Cell, Cell]  # name in words, A, B


def compare_folders(a: Path, b: Path, metrics: Sequence[str] = ()) -> Comparison:
    """Compare cells of folder A with equal cells of folder B.

    Raises:
        UserError: nothing in common, or other documents.
    """
    left, right = (beside_dense(cells(folder), _texts(metrics)) for folder in (a, b))
    labelled = names(left)
    partners = counterparts(left, right)
    pairs = [(labelled[c.key], c, partners[c.key]) for c in left if c.key in partners]
    if not pairs:
        found = min((nearest_to(c, right) for c in left), key=lambda text: (text.count(","), text))
        raise UserError(f"{a} and {b} have no cell in common: {found}", "run both with the same options")
    common = {c.key for _, *sides in pairs for c in sides}
    several = len({model_of(c.inputs["model"]) for c in [*left, *right]}) > 1
    models = [some for side in (left, right) for some in grouped(side, lambda c: model_of(c.inputs["model"])).values()]
    called = {key: label for some in models for key, label in labels(some).items()}
    notes = [
        f"Only in {folder}: {', '.join(describe(c, several, called[c.key]) for c in alone)}."
        for folder, side in ((a, left), (b, right))
        if (alone := [c for c in side if c.key not in common])
    ]
    return _compare(str(a), str(b), pairs, metrics, notes)


def compare_within(by: str, a: str, b: str, folders: Sequence[Path], metrics: Sequence[str] = ()) -> Comparison:
    """Compare cells that differ only in their method, sparsity or model.

    Args:
        by: `method`, `sparsity`, `model` or `row`: a row of the board, which may differ in its bits, too.
        a, b: methods (`dart`, `dart:allocation=uniform`), sparsities (0 is dense) or models (`NAME`, or `NAME@` and
            first digits of the weights' hash or the commit, where several have one name), or rows as the board calls
            them, with their sparsity (`griffin on 4 bits 44.2 %`).

    Raises:
        UserError: no or several such cells, nothing in common, or not the same documents.
    """
    everything = beside_dense(newest([c for folder in folders for c in cells(folder)]), _texts(metrics))
    labelled = names(everything, model=by == "model")
    sides = [_side(by, spec, everything, labelled) for spec in (a, b)]
    pairs: list[NamedPair] = []
    for left, right in itertools.product(*sides):
        if left.key == right.key:
            raise UserError(f"{a} and {b} are the same cell: {labelled[left.key]}", "name two that differ")
        free = FREE[by]
        if by != "model" and DENSE in (left.inputs["method"], right.inputs["method"]):
            free = UNLIKE_DENSE  # dense goes with every method, sparsity and scope
        if identity(left.inputs, free) == identity(right.inputs, free):
            pairs.append((f"{labelled[left.key]} vs {labelled[right.key]}", left, right))
    if not pairs:
        extents = (f"{spec} has {_extent(side)}" for spec, side in zip((a, b), sides, strict=True))
        raise UserError(f"{a} and {b} have nothing in common: {', '.join(extents)}", "run both on the same tasks")
    return _compare(a, b, pairs, metrics, [])


def _texts(metrics: Sequence[str]) -> bool:
    """Whether generated texts are compared with dense's."""
    return any(name == "all" or name.startswith("dense_") for name in metrics)


def _side(by: str, spec: str, everything: Sequence[Cell], labelled: dict[str, str]) -> list[Cell]:
    """Return the cells that a user named.

    Raises:
        UserError: there are none, or the name means several methods or models.
    """
    side = [c for c in everything if (labelled[c.key] == spec if by == "row" else _is(by, spec, c))]
    if not side:
        known = sorted({labelled[c.key] if by == "row" else _trait(by, c) for c in everything})
        where = ", ".join(sorted({c.source for c in everything}))
        raise UserError(f"no cell of {by} {spec} in {where}", nearest(spec, known) or f"there: {', '.join(known)}")
    models = sorted({model_of(c.inputs["model"]) for c in side})
    if by == "model" and len(models) > 1:
        raise UserError(f"{spec} stands for several models: {', '.join(models)}", "give one of these names")
    if by == "method" and (several := _alike(side)):
        side = [c for c in side if _trait(by, c) == spec]  # `dart` beside `dart:allocation=uniform`
        if not side or _alike(side):
            typed = exact(everything)
            raise UserError(
                f"{spec} stands for several cells: {', '.join(labelled[c.key] for c in several)}",
                f"say which: {' or '.join(sorted({typed[c.key] for c in several}))}",
            )
    return side


def _alike(side: Sequence[Cell]) -> tuple[Cell, Cell] | None:
    """Return two cells that differ in their method alone, if there are any."""
    places: dict[str, Cell] = {}
    for cell in side:
        first = places.setdefault(identity(cell.inputs, FREE["method"]), cell)
        if first is not cell:
            return first, cell
    return None


def names(cells: Sequence[Cell], model: bool = False) -> dict[str, str]:
    """Name cells: model if there are several, method with distinguishing settings, sparsity."""
    known = labels(cells)
    many = model or len({c.inputs["model"]["name"] for c in cells}) > 1
    return {
        c.key: " ".join([
            *([c.inputs["model"]["name"]] if many else []), known[c.key],
            *([sparsity(c.inputs["sparsity"])] if c.inputs["sparsity"] else []),
        ])
        for c in cells
    }  # fmt: skip


def _trait(by: str, cell: Cell) -> str:
    """Return a user's name of a cell's method, sparsity or model."""
    inputs = cell.inputs
    if by == "sparsity":
        return f"{inputs['sparsity']:g}"
    return model_of(inputs["model"]) if by == "model" else str(cell.settings.get("method") or inputs["method"])


def _is(by: str, spec: str, cell: Cell) -> bool:
    """Whether a cell is what the user named."""
    if by == "model":
        model = cell.inputs["model"]
        name, _, digits = spec.rpartition("@")
        exact = name == model["name"] and any((model.get(k) or "").startswith(digits) for k in ("weights", "revision"))
        return spec == model["name"] or bool(digits and exact)
    if by == "sparsity":
        try:
            return float(spec) == cell.inputs["sparsity"]
        except ValueError:
            raise UserError(f"sparsity {spec!r} is not a number", "for example 0.5; 0 is dense") from None
    name, _, rest = spec.partition(":")
    params = settings_in(rest) if rest else []
    given, known = dict(p.partition("=")[::2] for p in params), {**UNSAID, **cell.inputs["params"]}
    if given.get("allocation", "").startswith("table:"):
        given["allocation"], _, given["allocation.file"] = given["allocation"].partition(":")
    return cell.inputs["method"] == name and all(k in known and _equals(known[k], v) for k, v in given.items())


def _equals(item: object, text: str) -> bool:
    """Whether a parameter equals a typed value."""
    if isinstance(item, bool):
        return text.lower() in (("true", "on", "yes", "1") if item else ("false", "off", "no", "0"))
    if isinstance(item, (int, float)):
        try:
            return float(text) == item
        except ValueError:
            return False
    return str(item) == text


def _extent(side: Sequence[Cell]) -> str:
    tasks = sorted({str(c.inputs["task"]) for c in side})
    sparsities = sorted({c.inputs["sparsity"] for c in side})
    limits = sorted({str(c.inputs.get("limit") or "none") for c in side})
    return f"{', '.join(tasks)} at {', '.join(map(sparsity, sparsities))} (limit {', '.join(limits)})"


def wanted(measures: Sequence[Measure], metrics: Sequence[str]) -> list[Measure]:
    """Return the measures that a user named, all of them, or each task's main one."""
    if "all" in metrics:
        return list(measures)
    return [m for m in measures if m.name in metrics] if metrics else known_metrics.main(measures)


def _compare(a: str, b: str, named: Sequence[NamedPair], metrics: Sequence[str], notes: list[str]) -> Comparison:
    rows: list[CompareRow] = []
    made: list[Pair] = []
    families: dict[tuple[str, ...], list[int]] = {}
    left_out: set[str] = set()
    unread: UnreadSamples | None = None
    for name, left, right in named:
        try:
            found = pair(left, right)
        except UnreadSamples as error:
            unread = error
            remark(f"left out: {error}")
            continue
        made.append(found)
        left_out.update((*found.x.left_out, *found.y.left_out))
        measures = dict.fromkeys((*found.x.measures, *(found.y.measures if metrics else ())))
        asked = wanted(list(measures), metrics)
        ours = compared(found, asked)
        left_out |= {f"{m.task} {m.metric}" for m in set(asked) - {one.measure for one in ours}}
        for one in ours:
            m = one.measure
            family = (name, m.metric)  # tasks may have limits of their own
            families.setdefault(family, []).append(len(rows))
            rows.append(CompareRow(name, m.task, m.metric, m.higher_is_better, one.test, left.key, right.key))
    known = {m.name for one in made for m in (*one.x.measures, *one.y.measures)}
    if unread is not None and not known:
        raise unread
    unknown = sorted(set(metrics) - known - {"all"})
    if unknown:
        raise UserError(f"no metric {unknown[0]!r} in these results", nearest(unknown[0], known))
    if not rows:
        raise UserError(
            "none of the metrics can be compared document by document"
            + (f" ({', '.join(sorted(left_out))})" if left_out else ": their direction is unknown"),
            "name others with --metric, or --metric all",
        )
    for members in families.values():
        for i, p in zip(members, stats.holm([rows[i].result.p for i in members]), strict=True):
            rows[i] = dataclasses.replace(rows[i], p_holm=p, better=_better(rows[i], p))
    notes += older_note(cell for _, *sides in named for cell in sides)
    notes += differing(made, "A and B differ in {} ({}).", "{} in A, {} in B")
    if left_out:
        why = "one side lacks them, or they have no value per document"
        notes.append(f"Not compared, since {why}: {', '.join(sorted(left_out))}.")
    rows.sort(key=lambda r: (r.contrast, r.metric, r.task))
    return Comparison(a, b, rows, notes)


def _better(row: CompareRow, p: float | None) -> str:
    if p is None or p >= stats.ALPHA or row.higher_is_better is None or row.result.difference == 0:
        return "-"
    return "A" if (row.result.difference > 0) == row.higher_is_better else "B"


def table(comparison: Comparison) -> Table:
    """Return the comparison as a table."""
    ratios = any(r.result.ratio is not None for r in comparison.rows)
    columns: list[ColumnOf] = [
        ("cells", "contrast", str), ("task", "task", str), ("metric", "metric", str), ("A", "value_a", number),
        ("B", "value_b", number), ("A - B", "difference", signed), ("95 % interval", "ends", str),
        *([("A / B", "ratio", FOUR)] if ratios else []), ("p", "p", chance), ("p (Holm)", "p_holm", chance),
        ("better", "better", str), ("n", "size", str),
    ]  # fmt: skip
    results = [r.result for r in comparison.rows]
    sizes = [str(r.n) if r.clusters == r.n else f"{r.n} in {r.clusters}" for r in results]
    lines = [{**row.to_json(), "size": size} for row, size in zip(comparison.rows, sizes, strict=True)]
    return table_of(f"A: {comparison.a}   B: {comparison.b}", lines, columns, note(comparison))


def table_of(title: str, lines: Sequence[Json], columns: Sequence[ColumnOf], note: str) -> Table:
    """Return a table of paired tests, also for `check`.

    Args:
        lines: flat rows; `ends` of the interval are added here.
        columns: head, name in a flat row, and formatter of a value.
    """
    import pandas as pd

    flat = [{**line, "ends": interval(line.get("low"), line.get("high"))} for line in lines]
    frame = pd.DataFrame(flat, dtype=object)  # a text that is no Unicode stays one
    return writers.from_frame(title, frame, [Column(*c) for c in columns], note)


def note(comparison: Comparison) -> str:
    """Return the tests in words, and remarks."""
    results = [r.result for r in comparison.rows]
    used = sorted({r.test for r in results if r.test} | {r.interval for r in results if r.interval})
    parts = [f"Paired by document. Tests and intervals: {', '.join(used) or 'none'}."]
    if stats.BOOTSTRAP in used:
        parts.append(f"{stats.RESAMPLES} resamples, seed {stats.SEED}.")
    parts.append(f"p (Holm) is over the tasks of one contrast and metric; better: p (Holm) < {stats.ALPHA:g}.")
    if any(r.kind == "log-perplexity" for r in results):
        parts.append("Perplexities: A - B of their logarithms (nats per word or byte), A / B of themselves.")
    if any(r.clusters < r.n for r in results):
        parts.append("n in m: documents in m independent clusters.")
    reasons: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.result.reason:
            missing = "No interval" if row.result.p is not None else "No test and no interval"
            reasons.setdefault(f"{missing}: {row.result.reason}", []).append(f"{row.task} {row.metric}")
    parts += [f"{reason} ({', '.join(dict.fromkeys(where))})." for reason, where in reasons.items()]
    return " ".join([*parts, *comparison.notes])


def render(comparison: Comparison, form: str) -> str:
    """Return the comparison as text (md, tex, csv or json); json and csv in full precision."""
    if form not in ("csv", "json"):
        return (writers.latex if form == "tex" else writers.markdown)(table(comparison))
    rows = [r.to_json() for r in comparison.rows]
    if form == "json":
        data = {
            "a": comparison.a, "b": comparison.b, "rows": rows, "notes": comparison.notes, "alpha": stats.ALPHA,
            "resamples": stats.RESAMPLES, "seed": stats.SEED, "correction": "Holm",
        }  # fmt: skip
        return json_text(finite(data)) + "\n"
    return writers.csv_text([list(rows[0]), *(list(r.values()) for r in rows)])
