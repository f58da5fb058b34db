"""What the driver of a sweep on Ray does with what its workers send, without a cluster."""

import contextlib
import dataclasses
from types import SimpleNamespace

from dart_eval.executors.cluster import _CellTask, _Desk, _Open
from dart_eval.results.journal import Journal
from dart_eval.results.store import Store
from tests.helpers.records import record


class View:
    def __init__(self):
        self.said = []

    def finished(self, cell, made):
        self.said.append(cell.key)

    def note(self, text):
        self.said.append(text)


def test_what_is_odd_about_a_checkpoint_is_said_once_whichever_worker_loaded_it(tmp_path):
    view = View()
    desk = _Desk(SimpleNamespace(store=Store(tmp_path), view=view, done={}, failed=[]), 2, None)
    for key in ("a", "b"):
        made = record(key=key * 64)
        made = dataclasses.replace(made, settings={**made.settings, "notes": ["2 weights are not used"]})
        cell = SimpleNamespace(key=made.key, name=key, title=key)
        desk._open[cell.key] = _Open(contextlib.ExitStack(), Journal(), 1)
        desk.done(_CellTask(key, job=SimpleNamespace(cell=cell)), ([], made))
    assert view.said == ["a" * 64, "2 weights are not used", "b" * 64]
