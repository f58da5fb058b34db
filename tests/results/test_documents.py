"""The documents of a cell: what a value is, and what a missing one is."""

import math

import pytest

import dart_eval
from dart_eval.results import documents
from dart_eval.results.outcomes import Measure, rows_of, value
from dart_eval.util.errors import UserError
from tests.helpers.records import answered, right, samples, save


def test_a_document_without_a_value_is_left_out_and_nan_stays_nan():
    some = documents.documents(samples("t", [{"f1": 1.0}, {"acc": 0.0}, {"acc": 1.0, "f1": 0.0}]))
    f1 = Measure("t", "f1", True, ("t",))
    assert rows_of(f1, some).index == [("t", 0, "none"), ("t", 2, "none")]
    assert value(f1, some) == 0.5
    broken = documents.documents(samples("t", [{"f1": 1.0}, {"f1": math.nan}]))
    assert len(rows_of(f1, broken)) == 2 and math.isnan(value(f1, broken))
    assert value(Measure("t", "bleu", True, ("t",)), some) is None


def test_of_two_lines_on_one_document_the_last_counts_and_no_metric_hides_a_hash():
    lines = samples("t", [{"acc": 0.0, "doc_hash": 1.0}])
    found = documents.documents([*lines, {**lines[0], "metrics": {"acc": 1.0}}])
    assert len(found) == 1 and found.columns["acc"] == [1.0]
    assert documents.documents(lines).columns["doc_hash"] == [lines[0]["doc_hash"]]
    assert len(documents.documents([])) == 0


def test_samples_of_a_task_that_is_not_there(tmp_path, monkeypatch):
    """A frame without columns would say nothing; and ~ is the home folder, as for `evaluate`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "out", answered("arc_easy", right(0.6), "griffin"))
    with pytest.raises(UserError, match="no cell of task 'arc_eazy'"):
        dart_eval.samples("~/out", task="arc_eazy")
    assert len(dart_eval.samples("~/out", task="arc_easy")) == 60 and len(dart_eval.records("~/out")) == 1
