"""Distance of a cell's answers from dense's, by document: flips of choices, and texts beside dense's text."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from dart_eval.results.outcomes import Cell, Measure, Outcome, check_paired
from dart_eval.results.pairing import dense_cells, dense_of
from dart_eval.util.errors import UserError


def beside_dense(cells: Sequence[Cell], texts: bool = True) -> list[Cell]:
    """Add distances from dense to the outcomes of cells with a dense cell of the same documents.

    Args:
        cells: of a folder.
        texts: whether to compare generated texts, too, which takes time.
    """
    dense = dense_cells(cells)
    return [
        dataclasses.replace(cell, read=functools.cache(_reader(cell, dense_of(cell, dense), texts))) for cell in cells
    ]


def _reader(cell: Cell, dense: Cell | None, texts: bool) -> Callable[[], Outcome]:
    def outcome() -> Outcome:
        own = cell.read()
        if dense is None:
            return own
        try:
            reference = dense.read()
            check_paired(cell, own, dense, reference)
        except UserError:  # said where the two are compared
            return own
        return with_distances(own, reference, texts)

    return outcome


def with_distances(outcome: Outcome, dense: Outcome, texts: bool = True) -> Outcome:
    """Add the distances of answers from dense's to an outcome, as metrics of its tasks.

    `flips`: the chosen answer of an item differs. For texts `dense_rougeL`: ROUGE-L against dense's text, and
    `dense_tokens`: tokens before the first difference.
    """
    ours, theirs = outcome.documents, dense.documents

    def each(name: str, of: Callable[[Any, Any], float]) -> list[float | None]:
        """Return a number for each document with an answer on both sides; None for the others."""
        sides = (side.columns.get(name) or [None] * len(side) for side in (ours, theirs))
        return [None if a is None or b is None else of(a, b) for a, b in zip(*sides, strict=True)]

    columns = {"flips": each("chosen", lambda a, b: float(a != b))}
    if texts:
        columns["dense_rougeL"] = each("text", _similarity)
        columns["dense_tokens"] = each("token_ids", _common)
    columns = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    firsts = {m.task: m for m in reversed(outcome.measures)}.values()
    documents = ours.assign(**columns)
    lacking = {
        name: {task for (task, *_), v in zip(ours.index, values, strict=True) if v is None}
        for name, values in columns.items()
    }
    made = [
        Measure(m.task, name if m.filter == "none" else f"{name},{m.filter}", name != "flips", m.members, m.equal)
        for m in reversed(list(firsts)) for name in columns if not lacking[name] & set(m.members)
    ]  # fmt: skip
    return dataclasses.replace(outcome, measures=(*outcome.measures, *made), documents=documents)


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and most folders have no texts

    return RougeScorer(["rougeL"], use_stemmer=True)


def _similarity(ours: str, theirs: str) -> float:
    """Return ROUGE-L against dense's text; 1 for the same text, also where it has no word that ROUGE knows."""
    return 1.0 if ours == theirs else float(_scorer().score(theirs, ours)["rougeL"].fmeasure)


def _common(ours: Sequence[int], theirs: Sequence[int]) -> float:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return float(sum(1 for _ in same))
