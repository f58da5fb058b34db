"""The report of a results folder, section by section, in the order of the page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_eval.bench import kept
from dart_eval.errors import UserError
from dart_eval.results import board_text, detector, frontier, tables
from dart_eval.results.board import Board, boards
from dart_eval.results.report import charts, head, page, quality
from dart_eval.results.report.cells import Cell, cells_of, looks
from dart_eval.results.report.drift import Drift
from dart_eval.results.report.explorer import Explorer
from dart_eval.results.store import Store
from dart_eval.results.writers import Table


@dataclass(frozen=True)
class Report:
    """The page and what is in it."""

    html: str
    cells: int
    samples: int


def build(store: Store, title: str | None = None, documents: int = 50) -> Report:
    """The report of the records in `store`. Equal folders give equal bytes.

    Args:
        store: a folder of finished cells; samples and texts may be missing.
        title: head of the page; without it, the models' names.
        documents: documents of each task in the sample explorer; 0 leaves it out.

    Raises:
        UserError: no record that can be read.
    """
    found = store.scan()
    found.tell()
    made = boards(store, found.records, kept.read(store.folder))
    cells = cells_of(made, found.records)
    known = looks(cells)
    drift, explorer = Drift(known), Explorer(cells, documents)
    untold: dict[str, list[str]] = {"Samples": [], "Prompts": []}
    chance = _read(store, cells, drift, explorer, untold)
    records = [c.record for c in cells]
    context = {
        "title": title or f"Pruning evaluation of {head.listed([b.model for b in made], 4)}",
        "facts": head.facts(cells), "warnings": head.warnings(cells, list(found.unread), untold),
        "models": [_model(board, cells, known, chance) for board in made],
        "keys": {label: charts.key(number) for label, number in known.items()}, "chance": bool(chance),
        "number": itertools.count().__next__, "drift": drift.table(), "traces": drift.charts(),
        "traced": drift.documents, "detectors": detector.tables(store, records),
        "explorer": explorer, "tasks": explorer.tasks(), "numbers": [*tables.tables(records), *_commands(cells)],
        "cells": len(found.records),
    }  # fmt: skip
    return Report(page.render(context), len(found.records), explorer.samples)


def _read(
    store: Store, cells: Sequence[Cell], drift: Drift, explorer: Explorer, untold: Mapping[str, list[str]]
) -> dict[str, float]:
    """Go through the samples of all cells, one cell at a time; returns the accuracy under guessing of each task."""
    guesses: dict[str, dict[tuple[str, int], float]] = {}
    for cell in cells:
        texts: dict[tuple[str, int], dict[str, Any]] = {}
        try:
            samples = store.samples(cell.record)
        except UserError:
            untold["Samples"].append(cell.place)
            continue
        try:
            texts = store.texts(cell.record)
        except UserError:
            untold["Prompts"].append(cell.place)
        drift.add(cell, samples)
        if explorer.kept:
            explorer.add(cell, samples, texts)
        for s in samples:
            if len(s["responses"]) > 1 and "acc" in s["metrics"]:
                for task in (s["task"], str(cell.record.inputs["task"])):  # a group's too
                    guesses.setdefault(task, {})[s["task"], s["doc_id"]] = 1 / len(s["responses"])
    return {task: sum(shares.values()) / len(shares) for task, shares in guesses.items()}


def _model(
    board: Board, cells: Sequence[Cell], known: Mapping[str, int], chance: Mapping[str, float]
) -> dict[str, Any]:
    """What the page shows of one model."""
    own = [c for c in cells if c.board is board]
    columns = board_text.columns_of(board)
    levels = [
        (board_text.level_name(level.rows), [(row, [value(row) for _, value in columns]) for row in level.rows])
        for level in board.levels
    ]
    curve = quality.frontier_chart(board, known)
    return {
        "name": board.model, "about": board_text.tasks_note(board), "heads": [name for name, _ in columns],
        "levels": levels, "verdicts": [level.verdict for level in board.levels if level.verdict],
        "legend": board_text.legend(board, columns)[-1],
        "frontier": curve and (curve, frontier.tables([board])[0]),
        "charts": quality.against(own, known, chance), "costs": quality.costs(board, own),
    }  # fmt: skip


def _commands(cells: Sequence[Cell]) -> list[Table]:
    """The commands that make the cells again, where they are known."""
    body = [[c.place, str(command)] for c in cells if (command := c.record.settings.get("command"))]
    return [Table("Commands", ["cell", "command"], body, "Each makes its cell again.")] if body else []
