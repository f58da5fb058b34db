"""The folder of results is deleted while a run writes into it."""

import shutil

from dart_eval.results.store import Journal
from tests.helpers.commands import command


def test_a_folder_that_is_deleted_inside_a_cell_holds_that_cell_in_the_end(saved_llama, tmp_path, monkeypatch):
    stock, deleted = Journal.add, []

    def add(self, *answers):
        if not deleted:
            deleted.append(1)
            shutil.rmtree(tmp_path / "out")
        return stock(self, *answers)

    monkeypatch.setattr(Journal, "add", add)
    monkeypatch.chdir(tmp_path)
    words = ("run", "--model", saved_llama, "--tasks", "smoke_questions", "--limit", 2, "--method", "dense,griffin")
    status, _, errors = command(*words)
    assert deleted and status == 0, errors
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2
