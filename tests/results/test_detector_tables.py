"""Detection rates and false alarms from traces, by hand."""

import dataclasses

from dart_eval.results import detector
from dart_eval.results.report.reader import Reader
from dart_eval.results.store import Store
from tests.helpers.records import cell, written


def trace(signal, alarms=(), remasks=(), mean=0.9, deviation=0.02, window=10):
    return {"window": window, "signal": signal, "mean": mean, "deviation": deviation, "threshold": 0.8,
            "alarms": list(alarms), "remasks": list(remasks)}  # fmt: skip


def test_the_counter_goes_up_and_down():
    low, high = 0.5, 0.9
    assert detector.first_alarm([low, high, low, low], 0.7, 2) == 4
    assert detector.first_alarm([low, high, low, high], 0.7, 2) is None
    assert detector.first_alarm([high, low], 0.7, 1) == 2
    assert detector.first_alarm([], 0.7, 1) is None


def test_rates_by_hand():
    switched = [trace([0.9, 0.7, 0.7]), trace([0.87, 0.87, 0.87]), trace([0.6, 0.6, 0.6])]
    same = [trace([0.9, 0.91, 0.9]), trace([0.9, 0.8, 0.8, 0.8])]
    found = detector.judged(switched, same, 2.0, "sigma", 2)  # below 0.86
    assert (found.documents, found.detected, found.delay) == (3, 2, 25)
    assert (found.watched, found.false_alarms) == (30 + 30, 1)
    assert found.false_per_1000 == 1000 / 60
    wide = detector.judged(switched, same, 0.15, "cosine", 2)  # below 0.75
    assert (wide.detected, wide.false_alarms, wide.watched) == (2, 0, 70)
    as_run = detector.judged([trace([0.9] * 4, alarms=[20])], [trace([0.9] * 4, alarms=[30])], None, "", 2)
    assert (as_run.detected, as_run.delay, as_run.watched, as_run.false_alarms) == (1, 20, 30, 1)


def test_signals_after_an_alarm_are_judged_only_where_it_changed_nothing():
    moved = trace([0.9, 0.9, 0.5, 0.5], alarms=[20], remasks=[])  # the mask is made anew later, from dense tokens
    assert detector.judged([moved], [], 0.1, "cosine", 1).detected == 0
    assert detector.judged([moved], [], 0.1, "cosine", 1, remasks=False).detected == 1


def test_prompts_without_windows_are_left_out():
    silent = {"window": 10, "signal": [0.5, 0.5], "threshold": float("-inf"), "alarms": [], "remasks": []}
    assert detector.judged([silent], [silent], 1.0, "sigma", 1) == detector.Rate(0, 0, None, 0, 0)


def test_a_task_goes_with_its_control_and_nothing_else(tmp_path):
    store = Store(tmp_path)

    def save(task, signal, limit=None, patience=2, **changes):
        record = cell("dart", 0.5, task, params={"remask.patience": patience}, limit=limit, **changes)
        samples = [written(i, "", task, drift=trace(signal)) for i in range(3)]
        store.save(f"{task}{patience}", dataclasses.replace(record, samples=samples))

    save("drift_x", [0.5, 0.5])
    assert detector.tables(Reader(tmp_path).traces, store.load()) == []
    save("drift_x_same", [0.9, 0.9], seed=1)
    assert detector.tables(Reader(tmp_path).traces, store.load()) == []
    save("drift_x_same", [0.9, 0.9], limit=3)
    save("drift_x", [0.9, 0.5], patience=1)  # another setting, whose control was not run
    (table,) = detector.tables(Reader(tmp_path).traces, store.load())
    assert len({row[0] for row in table.body}) == 1
    assert table.title == "Drift detector on drift_x"
    rows = {row[2]: row[3:] for row in table.body}
    assert rows["2 sigma"] == ["3 of 3", "20", "0.00", "60"]
    assert rows["as run"] == ["0 of 3", "-", "0.00", "60"]


def test_rates_of_two_models_are_told_apart(tmp_path):
    store = Store(tmp_path)
    for model, low in (("small", 0.5), ("large", 0.9)):
        for task, level in (("drift_x", low), ("drift_x_same", 0.9)):
            record = cell("dart", 0.5, task, model=model, params={"remask.patience": 2})
            lines = [written(i, "", task, drift=trace([level] * 2)) for i in range(3)]
            store.save(f"{task}{model}", dataclasses.replace(record, samples=lines))
    (table,) = detector.tables(Reader(tmp_path).traces, store.load())
    found = {row[0]: row[4] for row in table.body if row[3] == "2 sigma"}
    assert table.columns[0] == "model" and found == {"small": "3 of 3", "large": "0 of 3"}
