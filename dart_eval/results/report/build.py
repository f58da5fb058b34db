"""The report of a results folder, section by section, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_eval.results import board_text, speeds, tables
from dart_eval.results.blocks import CONTROL, GUESSING, Block, Board
from dart_eval.results.board import boards, newest
from dart_eval.results.format import percent
from dart_eval.results.report import charts, head, page
from dart_eval.results.report.cells import ReportCell, cells_of, looks
from dart_eval.results.report.explorer import Texts, documents
from dart_eval.results.report.reader import CellSamples, Reader
from dart_eval.results.store import Store, UnreadSamples
from dart_eval.results.writers import Table

MOST = 6000  # answers to all documents together: a page of 2 MB


@dataclass(frozen=True)
class Report:
    """The page and the numbers of its contents."""

    html: str
    cells: int
    samples: int


def build(store: Store, title: str | None = None, wanted: int = 50) -> Report:
    """Return the report of the records in `store`. Equal folders give equal bytes.

    Args:
        store: a folder of finished cells; samples and texts may be missing.
        title: head of the page; without it, the models' names.
        wanted: number of documents of each task shown with all answers; 0 shows none.

    Raises:
        UserError: no record that can be read.
    """
    found = store.scan()
    found.report()
    leaves = sum(len(r.by_task) or 1 for r in found.records)
    reader = Reader(store.folder, min(wanted, max(1, MOST // leaves)))
    made = boards(reader, found.records, speeds.load_speeds(store.folder))
    cells = cells_of(made, found.records)
    known = looks(cells)
    every, _ = newest(found.records)  # with those of other seeds, of which a row is the mean
    samples_of, texts, untold = _read(reader, cells)
    shown = documents(cells, samples_of, texts)
    samples = sum(len(d.answers) for _, of_task in shown for d in of_task)
    failed = sorted(file.stem.rpartition("-")[0] for file in (store.folder / "failed").glob("*.txt"))
    heads = [level.rows[0] for board in made for block in board.blocks for level in block.levels]
    levels = {percent(row.read): row.read for row in heads if row.kind not in (CONTROL, GUESSING)}
    context = {
        "title": title or f"Pruning evaluation of {head.listed([b.model for b in made], 4)}",
        "levels": sorted(levels.items(), key=lambda v: -v[1]),
        "facts": head.facts(cells, every), "warnings": head.warnings(cells, list(found.unread), untold, failed),
        "models": [_model(board, known) for board in made],
        "methods": [(label, charts.COLOURS[i % len(charts.COLOURS)], charts.sign(i)) for label, i in known.items()],
        "tasks": shown, "kept": reader.most,
        "left_out": len(set[Any]().union(*(seen.left_out for seen in samples_of.values()))),
        "numbers": [*tables.tables(every), *_commands(cells)],
        "cells": len(found.records), "explained": board_text.EXPLAINED,
    }  # fmt: skip
    return Report(page.render(context), len(found.records), samples)


def _read(
    reader: Reader, cells: Sequence[ReportCell]
) -> tuple[dict[str, CellSamples], dict[str, Texts], dict[str, list[str]]]:
    """Return samples of all cells and texts of the documents on the page, by key, and the cells without either."""
    samples_of: dict[str, CellSamples] = {}
    texts: dict[str, Texts] = {}
    files: dict[str, Texts] = {}  # cells with the same documents share one
    untold: dict[str, list[str]] = {"Samples": [], "Prompts": []}
    for cell in cells:
        key, file = cell.record.key, cell.record.files.get("texts", {}).get("name", "")
        try:
            samples_of[key] = reader.look(cell.record)
        except UnreadSamples:
            untold["Samples"].append(cell.place)
            continue
        try:
            if reader.most and file not in files:
                files[file] = reader.texts(cell.record)
        except UnreadSamples:
            untold["Prompts"].append(cell.place)
        texts[key] = files.get(file, {})
    return samples_of, texts, untold


def _model(board: Board, looks: Mapping[str, int]) -> dict[str, Any]:
    """Return the page's data of one model."""
    blocks = [_block(board, block) for block in board.blocks]
    answered = next((i for i, b in enumerate(board.blocks) if any(level.take for level in b.levels)), 0)
    return {
        "name": board.model, "blocks": blocks, "answered": blocks[answered]["about"],
        "answer": head.answer(board.blocks[answered]), "notes": board_text.notes(board),
        "charts": [c for b in board.blocks if (c := charts.of_block(b, looks, board_text.sizes(board, b)))],
    }  # fmt: skip


def _block(board: Board, block: Block) -> dict[str, Any]:
    """Return a block's table, and the sentences under it."""
    columns = board_text.columns_of(block)
    rows = [(row, board_text.name_of(row), [board_text.read_of(row), *(c.text(row) for c in columns)])
            for row in block.rows]  # fmt: skip
    said = [*filter(None, [board_text.wins(block)]), *(text for level in block.levels for text in level.sentences)]
    if block.at_chance:
        said.append(f"D{board_text.at_chance(block)[1:]}.")
    heads = ["FFN bytes read", *(c.title for c in columns)]
    about = f"{board_text.heading(board, block)} {board_text.sizes(board, block)}".strip()
    return {"about": about, "heads": heads, "rows": rows, "said": said}


def _commands(cells: Sequence[ReportCell]) -> list[Table]:
    """Return the commands that reproduce the cells, where they are recorded."""
    body = [[c.place, str(command)] for c in cells if (command := c.record.settings.get("command"))]
    return [Table("Commands", ["cell", "command"], body, "Each makes its cell again.")] if body else []
