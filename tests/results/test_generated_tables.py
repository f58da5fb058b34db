"""The table of generated texts, by hand."""

import dataclasses

import pytest

from dart_eval.results import generated, report
from dart_eval.results.report.reader import Reader
from dart_eval.results.store import Store
from tests.helpers.records import FLOPS, cell, written

WATCHES = {"remask": "drift", "remask.patience": 2, "remask.dense_tokens": 0}


def _drift(*alarms):
    return {"window": 10, "signal": [0.5], "alarms": list(alarms), "remasks": list(alarms)}


def _table(tmp_path, *records):
    store = Store(tmp_path)
    for number, record in enumerate(records):
        store.save(f"cell{number}", record)
    return generated.table(records, Reader(tmp_path).counts(store.load()))


def test_tokens_alarms_and_remasks_are_counted_once_for_a_text(tmp_path):
    texts = [
        written(0, "long", tokens=300, remasks=2, drift=_drift(90, 200, 250)),
        written(0, "long", tokens=300, remasks=2, drift=_drift(90, 200, 250), filter="strict"),  # the same text
        written(1, "short", tokens=100, remasks=1),  # no window was full
    ]
    record = cell("dart", 0.5, "xsum", params=WATCHES, samples=texts)
    record = dataclasses.replace(record, effective_sparsity=0.49, flops={**FLOPS, "remask_reads": 0.04})
    dense = cell("dense", 0.0, "xsum", samples=[written(0, "a", tokens=7, remasks=0)])
    (table,) = _table(tmp_path, record, dense)
    rows = {row[1]: row[3:] for row in table.body}
    assert table.columns[3:] == [
        "texts", "new tokens", "longest", "alarms / 100", "re-masks", "effective", "with re-masks",
    ]  # fmt: skip
    assert rows["dart"] == ["2", "200.0", "300", "0.75", "1.50", "0.490", "0.450"]
    assert rows["dense"] == ["1", "7.0", "7", "-", "0.00", "0.000", "-"]  # the record says nothing of re-masks


def test_what_a_remask_reads_is_counted_once_or_not_at_all():
    record = cell("dart", 0.5, params={**WATCHES, "remask.dense_tokens": 8})
    record = dataclasses.replace(record, effective_sparsity=0.49, flops={"remask_reads": 0.04})
    assert generated.with_remasks(record) == 0.49  # its tokens ran dense
    assert generated.with_remasks(dataclasses.replace(record, inputs={**record.inputs, "ffn_bits": "4"})) is None
    ring = dataclasses.replace(cell("dart", 0.5, params=WATCHES), effective_sparsity=0.86)
    for reads in (0.04, 0.01125):  # of weights as they are, and of 4 bits and scales
        known = dataclasses.replace(ring, flops={"remask_reads": 0.04, "remask_bytes": reads})
        assert generated.with_remasks(known) == pytest.approx(0.86 - reads)


def test_scored_answers_are_no_texts(tmp_path):
    scored = {**written(0, ""), "responses": [[-1.0, True]]}
    empty = written(0, "", tokens=0)
    assert _table(tmp_path, cell("dart", 0.5, "arc_easy", samples=[scored]), cell("dart", samples=[empty])) == []


def test_the_report_shows_the_same_table(tmp_path):
    store = Store(tmp_path)
    made = cell("dart", 0.5, "xsum", params=WATCHES, samples=[written(0, "a b", tokens=31, remasks=2)])
    store.save("cell", made)
    html = report.build(store).html
    assert generated.NOTE in html and '<td class="n">31.0</td><td class="n">31</td>' in html
    scored = tmp_path / "scored"
    Store(scored).save("cell", cell("dart", 0.5, "arc_easy", samples=[{**written(0, ""), "responses": [[-1.0, True]]}]))
    assert generated.NOTE not in report.build(Store(scored)).html


def test_several_texts_of_a_document_are_counted_one_by_one(tmp_path):
    texts = [written(i, "x", tokens=15, remasks=3, texts=3) for i in range(2)]
    (table,) = _table(tmp_path, cell("dart", 0.5, "gsm8k", params=WATCHES, samples=texts))
    assert table.body[0][3:7] == ["6", "5.0", "-", "-"] and table.body[0][7] == "1.00"
