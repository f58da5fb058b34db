"""Boards of records by hand."""

import dataclasses
from unittest import mock

import numpy as np

from dart_eval.results.board import GUESSING, boards, verdicts
from dart_eval.results.store import Store
from dart_eval.results.tables import board_tables
from tests.helpers.records import answered, choosing, save

EASY = np.random.default_rng(5).random(200)  # how easy each question is, the same for all methods


def choices(share, task="arc", method="griffin", sparsity=0.7, read=None, **more):
    """A cell that answers the easiest questions right."""
    values = [{"acc": float(e < share)} for e in EASY]
    made = choosing(answered(task, values, method, 0.0 if method == "dense" else sparsity, **more))
    read = read if read is not None else 1.0 if method == "dense" else 1 - sparsity
    return dataclasses.replace(made, weights_read=read)


def board_of(tmp_path, *records, speeds=()):
    store = Store(save(tmp_path, *records))
    saved = {r.key: r for r in store.load()}
    with mock.patch("dart_eval.results.speeds.load_speeds", return_value=speeds):
        (made,) = boards(store, [saved[r.key] for r in records])
    return made


def places(board, block=0):
    """The label and the mark of each row, by level; guessing left out."""
    block = board.blocks[block]
    return [
        [(row.label, verdict.mark(row) if verdict else "") for row in level if row.kind != GUESSING]
        for level, verdict in zip(block.levels, verdicts(block), strict=True)
    ]


def rows_of(board, block=0):
    """Heads and texts of the rows of a block."""
    table = board_tables([board])[block]
    return [dict(zip((" ".join(head.split()) for head in table.columns), row, strict=True)) for row in table.body]


def said_of(board):
    """All sentences of a board."""
    return " ".join(note for table in board_tables([board]) for note in table.notes)
