"""The documents of a cell: what a value is, and what a missing one is."""

import dataclasses
import math

import pytest

import dart_eval
from dart_eval.results.documents import answers_of, documents
from dart_eval.results.record import Metric
from dart_eval.util.errors import UserError
from tests.helpers.records import answered, right, samples, save


def test_a_document_without_a_value_is_left_out_and_nan_stays_nan():
    f1 = Metric("t", "f1", 0.5, None, 2, True)
    some = answers_of([f1], samples("t", [{"f1": 1.0}, {"acc": 0.0}, {"acc": 1.0, "f1": 0.0}]))
    measure = some.measures["t", "f1"]
    assert measure.index == [("t", 0, "none"), ("t", 2, "none")] and measure.x.tolist() == [1.0, 0.0]
    nan = dataclasses.replace(f1, value=math.nan)
    broken = answers_of([nan], samples("t", [{"f1": 1.0}, {"f1": math.nan}]))
    assert len(broken.measures["t", "f1"].x) == 2
    assert answers_of([f1], samples("t", [{"f1": 1.0}, {"f1": math.nan}])).left_out == ("t f1",)


def test_of_two_lines_on_one_document_the_last_counts_and_no_metric_hides_a_hash():
    lines = samples("t", [{"acc": 0.0, "doc_hash": 1.0}])
    frame = documents([*lines, {**lines[0], "metrics": {"acc": 1.0}}])
    assert frame["acc"].tolist() == [1.0]
    assert documents(lines)["doc_hash"].tolist() == [lines[0]["doc_hash"]]
    assert len(documents([])) == 0


GROUP = [{"acc": 1.0}, {"acc": 0.0}, {"acc": 1.0}, {"acc": 1.0}]  # three documents of one task, one of another


@pytest.mark.parametrize(("weights", "value"), [("documents", 3 / 4), ("tasks", (2 / 3 + 1) / 2)])
def test_a_groups_value_follows_from_the_documents_of_its_members_as_they_weigh(weights, value):
    metrics = [Metric("g", "acc", value, None, 4, True, weights=weights),
               *(Metric(task, "acc", 0.0, None, 0, True, "g") for task in "ab")]  # fmt: skip
    group = answers_of(metrics, samples("a", GROUP[:3]) + samples("b", GROUP[3:]))
    assert set(group.measures) == {("g", "acc")} and group.left_out == ()
    measure = group.measures["g", "acc"]
    assert measure.members == ("a", "b") and measure.units == ["g a", "g a", "g a", "g b"]
    assert measure.sums[:, 0].sum() / measure.sums[:, 1].sum() == pytest.approx(value)


def test_a_recorded_value_that_does_not_follow_from_the_documents_is_left_out():
    """A value of a group by one rule, which the record says is by the other; and a task's own."""
    metrics = [Metric("g", "acc", 3 / 4, None, 4, True, weights="tasks"),
               *(Metric(task, "acc", 0.0, None, 0, True, "g") for task in "ab"),
               Metric("b", "acc", 0.9, None, 1, True)]  # fmt: skip
    group = answers_of(metrics, samples("a", GROUP[:3]) + samples("b", GROUP[3:]))
    assert group.measures == {} and group.left_out == ("g acc", "b acc")


def test_what_no_sums_give_has_no_measure():
    """BLEU's counts are of texts; lists of several lengths, and words, are no values; a mean is of no pairs."""
    wrong = {"bleu": [[1] * 10] * 3, "f1": [[1, 2], [1], [2]], "acc": ["a", "b", "c"], "acc_norm": [[1, 1]] * 3}
    for name, values in wrong.items():
        metric = Metric("t", name, 1.0, None, 3, True)
        assert answers_of([metric], samples("t", [{name: v} for v in values])).measures == {}


def test_samples_of_a_task_that_is_not_there(tmp_path, monkeypatch):
    """A frame without columns would say nothing; and ~ is the home folder, as for `evaluate`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "out", answered("arc_easy", right(0.6), "griffin"))
    with pytest.raises(UserError, match="arc_easy"):
        dart_eval.samples("~/out", task="arc_eazy")
    assert len(dart_eval.samples("~/out", task="arc_easy")) == 60 and len(dart_eval.records("~/out")) == 1
