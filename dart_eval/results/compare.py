"""A against B, paired document by document: a row for each contrast, task and metric."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from dart_eval.results import show, stats
from dart_eval.results.frame import Cell, cells, counterparts, differing, newest, paired, with_distances
from dart_eval.results.inputs import DENSE, UNLIKE_DENSE, asked, grouped, identity, labels
from dart_eval.results.metrics import asked as read_of
from dart_eval.results.metrics import chance, interval, main, number, signed
from dart_eval.results.record import described
from dart_eval.results.show import Columns, Table, finite
from dart_eval.results.store import UnreadSamples
from dart_eval.util.errors import UserError, nearest, remark
from dart_eval.util.text import Json, json_text

FREE = ("method", "params", "ffn_bits")  # inputs that make a row, and in which two of them may differ
Contrast = tuple[str, Cell, Cell]  # in words, A, B
COLUMNS: Columns = {
    "cells": ("contrast", str), "task": ("task", str), "metric": ("metric", str), "A": ("value_a", number),
    "B": ("value_b", number), "A - B": ("difference", signed), "better": ("better", str),
    "p (Holm)": ("p_holm", chance), "95 % interval": ("ends", str), "p": ("p", chance), "n": ("n", str),
    "units": ("clusters", str),
}  # fmt: skip


class Comparison(NamedTuple):
    """Tests of metrics, also those of `check`.

    Attributes:
        title: what is compared, or the verdict.
        rows: `contrast` in words, `task`, `metric`, `higher_is_better`, `key_a`, `key_b`, `p_holm` (over the tasks of a
            contrast and metric), `better` (A or B if `p_holm` is below .05, else -), and `stats.Paired` but `p_worse`.
        notes: remarks.
        about: further fields of its JSON.
    """

    title: str
    rows: list[Json]
    notes: list[str]
    about: Json

    def to_json(self) -> str:
        """Return everything in full precision."""
        data = {**self.about, "rows": self.rows, "notes": self.notes, "resamples": stats.RESAMPLES, "seed": stats.SEED}
        return json_text(finite(data)) + "\n"


def compare_folders(a: Path, b: Path, metrics: Sequence[str] = ()) -> Comparison:
    """Compare cells of folder A with equal cells of folder B.

    Raises:
        UserError: nothing in common, or other documents.
    """
    left, right = (_read([folder], metrics) for folder in (a, b))
    named, partners = names(left), counterparts(left, right)
    contrasts = [(named[cell.key], cell, partners[cell.key]) for cell in left if cell.key in partners]
    common = {cell.key for _, *pair in contrasts for cell in pair}
    notes = []
    for folder, side, known in ((a, left, named), (b, right, names(right))):
        alone = [f"{c.inputs['task']} under {known[c.key]}" for c in side if c.key not in common]
        notes += [f"Only in {folder}: {', '.join(alone)}."] if alone else []
    if not contrasts:
        raise _nothing_in_common(a, b, left, right)
    return _compared(str(a), str(b), contrasts, metrics, notes)


def compare_rows(a: str, b: str, folders: Sequence[Path], metrics: Sequence[str] = ()) -> Comparison:
    """Compare two rows of the board: their cells that have the same model and sparsity, or those that both names say.

    Dense goes with every sparsity and scope.

    Args:
        a, b: names as on the board: `griffin on 4 bits at 55.8 %`, after the model's if there are several. A name
            without the model, the settings in brackets or the read stands for all cells that it fits.

    Raises:
        UserError: there is no such row, nothing in common, or not the same documents.
    """
    everything = _read(folders, metrics)
    spellings = _spellings(everything)
    sides = [[cell for cell in everything if text in spellings[cell.key]] for text in (a, b)]
    said = {"model", "sparsity"}  # by both names
    for text, side in zip((a, b), sides, strict=True):
        if not side:
            where = ", ".join(sorted({cell.source for cell in everything}))
            raise UserError(f"no row {text} in {where}", nearest(text, {*itertools.chain(*spellings.values())}))
        said = said.intersection(*(spellings[cell.key][text] for cell in side))
    contrasts = []
    for left, right in itertools.product(*sides):
        if left is right:
            raise UserError(f"{a} and {b} are the same cell: {described(left)}", "name two that differ")
        dense = DENSE in (left.inputs["method"], right.inputs["method"])
        free = {*(UNLIKE_DENSE if dense else FREE), *said}
        if identity(left.inputs, free) == identity(right.inputs, free):
            contrasts.append((" vs ".join(next(iter(spellings[c.key])) for c in (left, right)), left, right))
    if not contrasts:
        raise _nothing_in_common(a, b, *sides)
    return _compared(a, b, contrasts, metrics, [])


def _read(folders: Sequence[Path], metrics: Sequence[str]) -> list[Cell]:
    """Return the cells of folders with their distances from dense; of texts only where these are asked for."""
    texts = any(name == "all" or name.startswith("dense_") for name in metrics)
    return with_distances(newest([cell for folder in folders for cell in cells(folder)]), texts)


def names(cells: Sequence[Cell]) -> dict[str, str]:
    """Name cells as the board's rows: the model if there are several, the label, the asked read."""
    return {key: next(iter(spellings)) for key, spellings in _spellings(cells).items()}


def _spellings(cells: Sequence[Cell]) -> dict[str, dict[str, set[str]]]:
    """Return how each cell may be called, the board's name first, and which of `model` and `sparsity` a name says."""
    known, several = labels(cells), len({cell.inputs["model"]["name"] for cell in cells}) > 1
    spellings: dict[str, dict[str, set[str]]] = {}
    for cell in cells:
        model = cell.inputs["model"]["name"] if several else ""
        label, share = known[cell.key], cell.inputs["sparsity"] and f"at {read_of(cell.inputs['sparsity'])}"
        spellings[cell.key] = {}
        for parts in itertools.product((model, ""), (label, label.partition(" (")[0]), (share, "")):
            says_model = "(model=" in parts[1] if "(model=" in label else parts[0] == model
            says = {"model": says_model, "sparsity": parts[2] == share or not share}
            spellings[cell.key][" ".join(filter(None, parts))] = {name for name, true in says.items() if true}
    return spellings


def _nothing_in_common(a: object, b: object, left: Sequence[Cell], right: Sequence[Cell]) -> UserError:
    first, other = asked(left[0].inputs), asked(right[0].inputs)
    apart = ", ".join(name for name in first if first[name] != other[name])
    problem = f"{a} and {b} have no cell in common: their first cells differ in {apart}"
    return UserError(problem, "run both with the same options")


def _compared(a: str, b: str, contrasts: Sequence[Contrast], metrics: Sequence[str], notes: list[str]) -> Comparison:
    """Test the metrics that a user named, all of them, or main ones and log-likelihoods of right answers."""
    rows: list[Json] = []
    pairs = []
    known, left_out = set[str](), set[str]()
    for contrast, left, right in contrasts:
        try:
            both = {one.a.name: one for one in paired(left, right)}
        except UnreadSamples as error:
            remark(f"left out: {error}")
            continue
        pairs.append((left, right))
        measures = {**right.answers.measures, **left.answers.measures}
        known |= {measure.metric.metric for measure in measures.values()}
        left_out.update((*left.answers.left_out, *right.answers.left_out))
        chosen = [measure.metric for measure in measures.values() if {measure.metric.metric, "all"} & {*metrics}]
        for m in chosen if metrics else main((measure.metric for measure in left.answers.measures.values()), gold=True):
            if (m.task, m.label) not in both:
                left_out.add(f"{m.task} {m.label}")
                continue
            row: Json = {"contrast": contrast, "task": m.task, "metric": m.label}
            row |= {"higher_is_better": m.higher_is_better, "key_a": left.key, "key_b": right.key}
            row |= {"p_holm": None, "better": "-"}
            test = vars(both[m.task, m.label].test)
            rows.append(row | {name: value for name, value in test.items() if name != "p_worse"})
    if unknown := sorted({*metrics} - known - {"all"}):
        raise UserError(f"no metric {unknown[0]!r} in these results", nearest(unknown[0], known))
    if not rows:
        why = ", ".join(sorted(left_out)) or "their direction is unknown"
        raise UserError(f"no metric can be compared by document ({why})", "give --metric NAMES, or --metric all")
    for family in grouped(rows, lambda row: (row["contrast"], row["metric"])).values():  # tasks may have other limits
        for row, p in zip(family, stats.holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p
            if p is not None and p < stats.ALPHA and row["difference"] and row["higher_is_better"] is not None:
                row["better"] = "A" if (row["difference"] > 0) == row["higher_is_better"] else "B"
    notes += differing(pairs, "A and B differ in {} ({}).", "{} in A, {} in B")
    if left_out:
        why = "one side lacks them, or they have no value per document"
        notes.append(f"Not compared, since {why}: {', '.join(sorted(left_out))}.")
    rows.sort(key=lambda row: (row["contrast"], row["metric"], row["task"]))
    about = {"a": a, "b": b, "alpha": stats.ALPHA, "correction": "Holm"}
    return Comparison(f"A: {a}   B: {b}", rows, notes, about)


def table(comparison: Comparison) -> Table:
    """Return the comparison as a table, in which a contrast stands once above its rows."""
    rows = pd.DataFrame(comparison.rows, dtype=object)  # objects: a text that is no Unicode stays one
    words = rows["contrast"].mask(rows["contrast"].duplicated() & (rows["contrast"].nunique() > 1), "")
    frame = rows.assign(contrast=words, ends=[*map(interval, rows["low"], rows["high"])])
    notes = [*_notes(comparison.rows), *comparison.notes]
    return dataclasses.replace(show.table(comparison.title, frame, COLUMNS, notes, ("cells", "n", "units")), data=rows)


def _notes(rows: Sequence[Json]) -> list[str]:
    """Return what a reader must know of the tests: which, over what, why some are missing, and where two disagree."""
    used = ", ".join(sorted({row[name] for row in rows for name in ("test", "interval")} - {""})) or "none"
    notes = [
        f"Paired by document. Tests and intervals: {used}.",
        f"p (Holm) is over the tasks of one contrast and metric; better: p (Holm) < {stats.ALPHA:g}.",
    ]
    if stats.BOOTSTRAP in used:
        notes.append(f"{stats.RESAMPLES} resamples, seed {stats.SEED}.")
    if any(row["kind"] == "log-perplexity" for row in rows):
        notes.append("Of perplexities A - B and its interval are of logarithms (nats per word or byte).")
    cases: dict[str, dict[str, None]] = {}
    for row in rows:
        case = f"No interval, and without p no test: {row['reason']}" if row["reason"] else ""
        if row["p"] is not None and row["low"] is not None:
            apart = row["low"] > 0 or row["high"] < 0
            if apart != (row["p_holm"] < stats.ALPHA):
                case = "Interval and p (Holm) disagree on 0, since p is exact and corrected, and the interval is not"
        cases.setdefault(case, {})[f"{row['task']} {row['metric']}"] = None
    return notes + [f"{case} ({', '.join(where)})." for case, where in sorted(cases.items()) if case]
