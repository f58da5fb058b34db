"""A against B, paired document by document: a frame with a row for each contrast, task and metric."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dart_eval.results import show, stats
from dart_eval.results.format import chance, interval, number, signed, sparsity
from dart_eval.results.frame import Cell, cells, counterparts, differing, newest, paired, typed, with_distances
from dart_eval.results.inputs import DENSE, PRUNING, UNLIKE_DENSE, asked, exact, grouped, identity, labels, model_of
from dart_eval.results.metrics import main
from dart_eval.results.show import Columns, Table, finite
from dart_eval.results.store import UnreadSamples
from dart_eval.util.errors import UserError, nearest, remark
from dart_eval.util.text import Json, json_text

FREE = {"method": ("method", "params"), "sparsity": ("sparsity",), "model": ("model",), "row": PRUNING}
Contrast = tuple[str, Cell, Cell]  # in words, A, B
COLUMNS: Columns = {
    "cells": ("contrast", str), "task": ("task", str), "metric": ("metric", str), "A": ("value_a", number),
    "B": ("value_b", number), "A - B": ("difference", signed), "better": ("better", str),
    "p (Holm)": ("p_holm", chance), "95 % interval": ("ends", str), "p": ("p", chance), "n": ("n", str),
    "units": ("clusters", str),
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
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
    if not contrasts:
        raise UserError(f"{a} and {b} have no cell in common: {_apart(left, right)}", "run both with the same options")
    common = {cell.key for _, *pair in contrasts for cell in pair}
    notes = []
    for folder, side, known in ((a, left, named), (b, right, names(right))):
        alone = [f"{c.inputs['task']} under {known[c.key]}" for c in side if c.key not in common]
        notes += [f"Only in {folder}: {', '.join(alone)}."] if alone else []
    return _compared(str(a), str(b), contrasts, metrics, notes)


def compare_within(by: str, a: str, b: str, folders: Sequence[Path], metrics: Sequence[str] = ()) -> Comparison:
    """Compare cells that differ only in their method, sparsity or model, or in what rows of the board differ in.

    Args:
        by: `method`, `sparsity`, `model` or `row`.
        a, b: methods (`dart`, `dart:allocation=uniform`), sparsities (0 is dense), models (`NAME`, or `NAME@` and first
            digits of the weights' hash or the commit), or rows as the board calls them (`griffin on 4 bits 44.2 %`, or
            `griffin on 4 bits` where it has one sparsity).

    Raises:
        UserError: no or several such cells, nothing in common, or not the same documents.
    """
    everything = _read(folders, metrics)
    named = names(everything)
    side_a, side_b = (_side(by, text, everything, named) for text in (a, b))
    contrasts = []
    for left, right in itertools.product(side_a, side_b):
        if left.key == right.key:
            raise UserError(f"{a} and {b} are the same cell: {named[left.key]}", "name two that differ")
        dense = by != "model" and DENSE in (left.inputs["method"], right.inputs["method"])
        free = UNLIKE_DENSE if dense else FREE[by]  # dense goes with every method, sparsity and scope
        if identity(left.inputs, free) == identity(right.inputs, free):
            contrasts.append((f"{named[left.key]} vs {named[right.key]}", left, right))
    if not contrasts:
        raise UserError(f"{a} and {b} have nothing in common: {_apart(side_a, side_b)}", "run both on the same tasks")
    return _compared(a, b, contrasts, metrics, [])


def _read(folders: Sequence[Path], metrics: Sequence[str]) -> list[Cell]:
    """Return the cells of folders with their distances from dense; of texts only where these are asked for."""
    texts = any(name == "all" or name.startswith("dense_") for name in metrics)
    return with_distances(newest([cell for folder in folders for cell in cells(folder)]), texts)


def _apart(left: Sequence[Cell], right: Sequence[Cell]) -> str:
    """Say in what the questions of the first cells of two sides differ."""
    a, b = asked(left[0].inputs), asked(right[0].inputs)
    return f"their first cells differ in {', '.join(name for name in a if a[name] != b[name])}"


# -- the cells that a name stands for ----------------------------------------------------------------------------------


def names(cells: Sequence[Cell]) -> dict[str, str]:
    """Name cells as the board's rows: the model if there are several, the label, the sparsity."""
    known = labels(cells)
    several = len({cell.inputs["model"]["name"] for cell in cells}) > 1
    named = {}
    for cell in cells:
        share = cell.inputs["sparsity"]
        parts = (cell.inputs["model"]["name"] if several else "", known[cell.key], sparsity(share) if share else "")
        named[cell.key] = " ".join(filter(None, parts))
    return named


def _side(by: str, text: str, everything: Sequence[Cell], named: Mapping[str, str]) -> list[Cell]:
    """Return the cells that a user named.

    Raises:
        UserError: there are none, or the name leaves a choice among cells of one question.
    """
    known, spelled, digits = labels(everything), exact(everything), len(text.rpartition("@")[2])
    with contextlib.suppress(ValueError):  # what is no number names no cell
        text = f"{float(text):g}" if by == "sparsity" else text

    def called(cell: Cell) -> list[str]:
        """What a user may call a cell; the full name is the first."""
        inputs, model = cell.inputs, cell.inputs["model"]
        codes = filter(None, (model.get("weights"), model.get("revision")))
        return {
            "method": [cell.settings.get("method") or inputs["method"], spelled[cell.key], inputs["method"]],
            "sparsity": [f"{inputs['sparsity']:g}"],
            "model": [model_of(model), model["name"], *(f"{model['name']}@{code[:digits]}" for code in codes)],
            "row": [named[cell.key], known[cell.key]],
        }[by]

    side = [cell for cell in everything if text in called(cell)]
    if not side:
        where, there = ", ".join(sorted({c.source for c in everything})), sorted({called(c)[0] for c in everything})
        raise UserError(f"no cell of {by} {text} in {where}", nearest(text, there) or f"there: {', '.join(there)}")
    if choice := _alike(by, side):
        side = [cell for cell in side if called(cell)[0] == text]  # `dart` beside `dart:allocation=uniform`
        if not side or _alike(by, side):
            several = sorted({called(cell)[by == "method"] for cell in choice})
            raise UserError(f"{text} stands for several {by}s: {', '.join(several)}", "give one of these names")
    return side


def _alike(by: str, side: Sequence[Cell]) -> list[Cell]:
    """Return cells that differ in nothing but what they are chosen by."""
    groups = grouped(side, lambda cell: identity(cell.inputs, FREE[by])).values()
    return [cell for group in groups if len(group) > 1 for cell in group]


# -- the rows ----------------------------------------------------------------------------------------------------------


def _compared(a: str, b: str, contrasts: Sequence[Contrast], metrics: Sequence[str], notes: list[str]) -> Comparison:
    """Test the metrics that a user named, all of them, or main ones and log-likelihoods of right answers."""
    rows: list[Json] = []
    pairs = []
    known, left_out = set[str](), set[str]()
    unread: list[UnreadSamples] = []
    for contrast, left, right in contrasts:
        try:
            both = {one.a.name: one for one in paired(left, right)}
        except UnreadSamples as error:
            remark(f"left out: {error}")
            unread.append(error)
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
            row |= {"p_holm": None, "better": "-", **vars(both[m.task, m.label].test)}
            del row["p_worse"]
            rows.append(row)
    if unread and not pairs:
        raise unread[-1]
    if unknown := sorted({*metrics} - known - {"all"}):
        raise UserError(f"no metric {unknown[0]!r} in these results", nearest(unknown[0], known))
    if not rows:
        why = f" ({', '.join(sorted(left_out))})" if left_out else ": their direction is unknown"
        problem = f"none of the metrics can be compared document by document{why}"
        raise UserError(problem, "name others with --metric, or --metric all")
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


# -- for people and machines -------------------------------------------------------------------------------------------


def table(comparison: Comparison) -> Table:
    """Return the comparison as a table, in which a contrast stands once above its rows."""
    rows = pd.DataFrame(comparison.rows, dtype=object)  # objects: a text that is no Unicode stays one
    cells = rows["contrast"]
    if cells.nunique() > 1:
        cells = cells.mask(cells.duplicated(), "")
    frame = rows.assign(contrast=cells, ends=[*map(interval, rows["low"], rows["high"])])
    notes = [*_notes(typed(rows)), *comparison.notes]
    shown = show.table(comparison.title, frame, COLUMNS, notes, ("cells", "n", "units"))
    return dataclasses.replace(shown, data=rows)


def _notes(rows: pd.DataFrame) -> list[str]:
    """Return what a reader must know of the tests: which, over what, why some are missing, and where two disagree."""
    used = ", ".join(sorted({*rows["test"], *rows["interval"]} - {""})) or "none"
    notes = [
        f"Paired by document. Tests and intervals: {used}.",
        f"p (Holm) is over the tasks of one contrast and metric; better: p (Holm) < {stats.ALPHA:g}.",
    ]
    if stats.BOOTSTRAP in used:
        notes.append(f"{stats.RESAMPLES} resamples, seed {stats.SEED}.")
    if "log-perplexity" in {*rows["kind"]}:
        notes.append("Of perplexities A - B and its interval are of logarithms (nats per word or byte).")
    cases = {f"No interval, and without p no test: {why}": rows["reason"] == why for why in {*rows["reason"]} - {""}}
    apart, alone = (rows["low"] > 0) | (rows["high"] < 0), rows["p"] < stats.ALPHA
    bounded = rows["low"].notna() & rows["p"].notna()
    cases |= {
        "Interval without 0 beside a larger p (Holm), since Holm corrects p alone":
            bounded & apart & alone & ~(rows["p_holm"] < stats.ALPHA),
        "Interval and p disagree on 0, since p is exact and the interval is not": bounded & (apart != alone),
    }  # fmt: skip
    for case, rule in sorted(cases.items()):
        where = [f"{task} {metric}" for task, metric in rows.loc[rule, ["task", "metric"]].drop_duplicates().to_numpy()]
        notes += [f"{case} ({', '.join(where)})."] if where else []
    return notes
