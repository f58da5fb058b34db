"""The folder of results is deleted while a run writes into it: the run says what is missing and ends with status 1."""

import shutil

import pytest

import dart_eval
from dart_eval.cli import view
from dart_eval.results.journal import Journal
from tests.helpers.commands import command


@pytest.fixture
def run(saved_llama, tmp_path, monkeypatch):
    """Runs two cells into `out`; its status, output and messages."""
    monkeypatch.chdir(tmp_path)
    words = ("run", "--model", saved_llama, "--tasks", "smoke_questions", "--limit", 2, "--method", "dense,griffin")
    return lambda: command(*words)


def test_a_folder_that_is_deleted_after_a_cell_is_missed_at_the_end(run, tmp_path, monkeypatch):
    stock, deleted = view.TerminalView.__call__, []

    def tell(self, event):
        stock(self, event)
        if event.kind == "finished" and not deleted:
            deleted.extend((tmp_path / "out" / "cells").iterdir())
            shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(view.TerminalView, "__call__", tell)
    status, _, errors = run()
    assert status == 1
    assert errors.endswith(
        f"missing: files of finished cells have been deleted: smoke_questions dense (out/cells/{deleted[0].name}); the "
        "same command runs them again\n"
    )
    status, _, errors = run()
    assert status == 0
    assert "1 of 2 cells are finished already" in errors


def test_a_folder_that_is_deleted_inside_a_cell_holds_that_cell_in_the_end(run, tmp_path, monkeypatch):
    stock, deleted = Journal.add, []

    def add(self, *answers):
        if not deleted:
            deleted.append(1)
            shutil.rmtree(tmp_path / "out")
        return stock(self, *answers)

    monkeypatch.setattr(Journal, "add", add)
    status, _, errors = run()
    assert deleted and status == 0, errors
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2


@pytest.mark.parametrize("kind", ["samples", "texts"])
def test_a_part_of_a_cell_that_is_deleted_is_missed(run, tmp_path, monkeypatch, kind):
    stock = view.TerminalView.__call__

    def tell(self, event):
        stock(self, event)
        if event.kind == "finished" and event.cell.method.prunes:
            shutil.rmtree(tmp_path / "out" / kind)

    monkeypatch.setattr(view.TerminalView, "__call__", tell)
    status, _, errors = run()
    assert status == 1
    assert f"smoke_questions dense (out/{kind}/smoke_questions" in errors


def test_python_is_told_too(saved_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("dart_eval.results.store.Store.missing", lambda self, name, _: [self.file("cells", name, "x")])
    with pytest.raises(RuntimeError, match=r"files of finished cells have been deleted: .*out/cells/smoke_questions"):
        dart_eval.evaluate(
            model=saved_llama, tasks="smoke_questions", limit=1, method="dense", output=str(tmp_path / "out")
        )
