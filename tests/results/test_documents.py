"""The frame of a cell's documents: what a value is, and what a missing one is."""

import math

from dart_eval.results import documents
from dart_eval.results.outcomes import Measure, rows_of, value
from tests.helpers.records import samples


def test_a_document_without_a_value_is_left_out_and_nan_stays_nan():
    some = documents.frame(samples("t", [{"f1": 1.0}, {"acc": 0.0}, {"acc": 1.0, "f1": 0.0}]))
    f1 = Measure("t", "f1", True, ("t",))
    assert list(rows_of(f1, some).index) == [("t", 0, "none"), ("t", 2, "none")]
    assert value(f1, some) == 0.5
    broken = documents.frame(samples("t", [{"f1": 1.0}, {"f1": math.nan}]))
    assert len(rows_of(f1, broken)) == 2 and math.isnan(value(f1, broken))
    assert value(Measure("t", "bleu", True, ("t",)), some) is None


def test_of_two_lines_on_one_document_the_last_counts_and_no_metric_hides_a_hash():
    lines = samples("t", [{"acc": 0.0, "doc_hash": 1.0}])
    frame = documents.frame([*lines, {**lines[0], "metrics": {"acc": 1.0}}])
    assert len(frame) == 1 and frame["acc"].iloc[0] == 1.0
    assert documents.frame(lines)["doc_hash"].iloc[0] == lines[0]["doc_hash"]
    assert len(documents.frame([])) == 0
