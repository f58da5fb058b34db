"""`dart-eval check`: regressions are caught, noise is not; verdicts and thresholds."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from dart_eval.results.check import FELL, Limits, Thresholds, bad, check, recovery, thresholds_from, workflow_commands
from dart_eval.results.documents import answers_of
from dart_eval.results.frame import Cell, cells, differing
from dart_eval.results.record import Metric
from dart_eval.util.errors import UserError
from tests.helpers.records import N, answered, choosing, perplexities, right, samples, save


def cell(record):
    """A record as a cell, without files."""
    answers = answers_of(record.metrics, record.samples)
    return Cell(record.key, record.inputs, "results", record.created, lambda: answers)


def checked(now, then, thresholds=None):
    return check([cell(r) for r in now], [cell(r) for r in then], thresholds or Thresholds(), "baseline.json")


# -- noise and regressions, simulated ------------------------------------------------------------------------------


def noisy_run(generator, fall=0.0):
    """Results of two methods whose documents' outcomes are drawn anew: accuracies, log-likelihoods, a perplexity."""
    base = np.random.default_rng(99)  # the documents stay the same
    gold, w = base.gamma(4, 5, 100), base.integers(50, 500, 40)
    ll = -w * base.gamma(9, 0.3, 40)
    made = []
    for method in ("dart", "griffin"):
        values = [
            {"acc": float(generator.random() < 0.6 - fall), "gold_ll": float(-g + generator.normal(-fall, 0.3))}
            for g in gold
        ]
        made.append(answered("arc", values, method))
        values = [
            {"word_perplexity": [float(x * (1 + fall + generator.normal(0, 0.02))), int(k)]}
            for x, k in zip(ll, w, strict=True)
        ]
        made.append(answered("drift", values, method, up=False))
    return made


@pytest.mark.slow
def test_noise_alone_is_no_regression():
    """100 pairs of runs, documents redrawn: at most the stated 5 % may fail (binomial bound, 1 in 1000)."""
    alarms = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        alarms += bool(bad(checked(noisy_run(generator), noisy_run(generator))))
    assert alarms <= scipy_stats.binom.ppf(0.999, 100, 0.05)


def test_a_real_fall_is_found():
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(6):
        report = checked(noisy_run(generator, fall=0.25), noisy_run(generator))
        found += {r["metric"] for r in bad(report)} == {"acc", "gold_ll", "word_perplexity"}
    assert found >= 5


# -- verdicts ------------------------------------------------------------------------------------------------------


def test_a_row_falls_only_with_too_much_lost_and_beyond_noise():
    then = right(0.9)
    slightly = [{"acc": v["acc"] if i else 0.0} for i, v in enumerate(then)]
    (row,) = checked([answered("arc", slightly)], [answered("arc", then)], Thresholds(recovery=0.999)).rows
    assert row["verdict"] == "ok" and "within noise" in row["why"]
    (row,) = checked([answered("arc", right(0.5))], [answered("arc", then)], Thresholds(recovery=0.3)).rows
    assert row["verdict"] == "ok"
    (row,) = checked([answered("arc", right(0.5))], [answered("arc", then)]).rows
    assert row["verdict"] == "FELL"
    assert row["recovery"] == pytest.approx(row["now"] / row["then"])
    assert row["changed"] == sum(a != b for a, b in zip(right(0.5), then, strict=True))


def test_better_is_never_a_fall():
    report = checked(
        [answered("arc", right(0.9)), answered("drift", perplexities(0.8), up=False)],
        [answered("arc", right(0.5)), answered("drift", perplexities(1.0), up=False)],
    )
    assert [r["verdict"] for r in report.rows] == ["ok", "ok"]
    assert all(r["recovery"] > 1 for r in report.rows)


def test_where_lower_is_better_more_is_a_fall():
    (row,) = checked(
        [answered("drift", perplexities(1.05), up=False)], [answered("drift", perplexities(1.0), up=False)]
    ).rows
    assert row["verdict"] == "FELL"
    assert row["recovery"] == pytest.approx(1 / row["ratio"], rel=1e-4)


def test_too_few_documents_fall_by_the_threshold_alone_and_say_so():
    (row,) = checked([answered("arc", right(0.5)[:5])], [answered("arc", [{"acc": 1.0}] * 5)]).rows
    assert row["verdict"] == "FELL"
    assert "not tested: 5 independent units" in row["why"]
    (row,) = checked([answered("arc", [{"acc": 1.0}] * 5)], [answered("arc", [{"acc": 1.0}] * 5)]).rows
    assert row["verdict"] == "ok"


def test_p_is_adjusted_over_all_rows():
    then, now = right(0.9), right(0.75)
    (alone,) = checked([answered("arc", now)], [answered("arc", then)]).rows
    tasks = [f"t{i}" for i in range(5)]
    many = checked(
        [answered("arc", now), *(answered(t, then) for t in tasks)],
        [answered("arc", then), *(answered(t, then) for t in tasks)],
    ).rows
    assert many[0]["p_holm"] == pytest.approx(min(1, 6 * alone["p_holm"]))


@pytest.mark.parametrize(("metric", "up", "now", "then", "expected"), [
    ("acc", True, 0.0, 0.0, None), ("acc", True, 0.5, 0.0, None), ("acc", True, 0.0, 0.5, 0.0),
    ("acc", True, 0.25, 0.25, 1.0), ("word_perplexity", False, 40.0, 20.0, 0.5),
    ("word_perplexity", False, math.inf, math.inf, 1.0), ("word_perplexity", False, math.inf, 20.0, 0.0),
    ("empty", False, 0.0, 0.0, None), ("empty", False, 0.2, 0.0, 0.0), ("score", True, -1.0, -2.0, None),
    ("gold_ll", True, -10.1, -10.0, math.exp(-0.1)), ("gold_ll", True, 0.0, -1000.0, math.inf),
])  # fmt: skip
def test_recovery_has_no_division_by_zero(metric, up, now, then, expected):
    test = SimpleNamespace(value_a=now, value_b=then)
    one = SimpleNamespace(metric=Metric("t", metric, now, None, 1, up), test=test, chance=0.0)
    assert recovery(one, tested=True) == (expected and pytest.approx(expected))


def test_a_baseline_of_zero_holds():
    (row,) = checked([answered("arc", [{"acc": 0.0}] * N)], [answered("arc", [{"acc": 0.0}] * N)]).rows
    assert (row["verdict"], row["recovery"]) == ("ok", None)


def test_values_that_became_nan_fall():
    now = [{"rougeL": math.nan if i == 3 else 0.5} for i in range(N)]
    (row,) = checked([answered("s", now)], [answered("s", [{"rougeL": 0.5}] * N)]).rows
    assert row["verdict"] == "FELL"
    assert "not finite" in row["why"]


def test_missing_cells_are_named():
    now = [answered("arc", right(0.5), limit=10)]
    report = checked(now, [answered("arc", right(0.5)), answered("arc", right(0.5), limit=10)])
    assert [r["verdict"] for r in report.rows] == ["missing", "ok"]
    assert report.rows[0]["why"] == "not in the results"
    assert report.title == "FAILED: of 2 rows of baseline.json 0 fell, 1 missing"


def test_new_cells_and_other_versions_are_remarked():
    report = checked(
        [answered("arc", right(0.5), code="new"), answered("piqa", right(0.5))], [answered("arc", right(0.5))]
    )
    assert not bad(report)
    assert "c0de then, new now" in report.notes[0] and "--update" in report.notes[1]


def test_other_documents_are_no_regression_but_wrong_input():
    lines = samples("arc", right(0.5), data="v2")
    with pytest.raises(UserError, match="documents"):
        checked([answered("arc", right(0.5), lines=lines)], [answered("arc", right(0.5))])


def test_annotations_are_escaped():
    report = checked([], [answered("a,b:c%\nd", right(0.5))])
    (line,) = workflow_commands(report)
    assert line.startswith("::error title=missing a%2Cb%3Ac%25 d acc::")
    assert "\n" not in line


# -- thresholds ----------------------------------------------------------------------------------------------------


def test_thresholds_are_read(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text("recovery: 0.9\nalpha: 0.01\ntasks: {drift: {recovery: 0.5}}\n")
    found = thresholds_from(file)
    assert found == Thresholds(recovery=0.9, alpha=0.01, tasks={"drift": Limits(recovery=0.5)})
    file.write_text("")
    assert thresholds_from(file) == thresholds_from(None) == Thresholds()


@pytest.mark.parametrize(("text", "word"), [
    ("recovry: 0.9", "recovry"), ("recovery: 98", "recovery"), ("recovery: null", "recovery"),
    ("recovery: yes", "recovery"), ("recovery: .nan", "recovery"), ("recovery: [1]", "recovery"), ("alpha: 0", "alpha"),
    ("alpha: {a: 1}", "alpha"), ("tasks: {arc: {alpha: 0.1}}", "alpha"), ("tasks: {arc: [1]}", "arc"),
    ("tasks: [arc]", "tasks"), ("{1: 2}", "1"), ("- 1", "keys"), ("a: [", "YAML"),
    ("alpha: 0.1\nalpha: 0.2", "twice"), ("!!timestamp x: 1", "YAML"), ("recovery: !!timestamp x", "YAML"),
    ("recovery: 2001-01-01", "recovery"), (f"recovery: {9**99}", "recovery"),
])  # fmt: skip
def test_wrong_thresholds_are_refused(tmp_path, text, word):
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=word):
        thresholds_from(file)


def test_a_loss_on_few_choices_falls_by_the_threshold_alone():
    """Of five items no test says anything, and all of them were lost."""
    then, now = ([choosing(answered("arc", [{"acc": v}] * 5))] for v in (1.0, 0.0))
    (row, *_) = checked(now, then, Thresholds()).rows
    assert (row["verdict"], row["recovery"]) == (FELL, pytest.approx(-1 / 3))


def test_thresholds_of_an_unknown_task_are_refused():
    with pytest.raises(UserError, match="acr"):
        checked([answered("arc", right(0.5))], [answered("arc", right(0.5))], Thresholds(tasks={"acr": Limits()}))


def test_code_of_a_method_differs_only_between_equal_methods():
    one, other, rival = (
        cell(answered("arc", [{"acc": 1}], method, method_code=code))
        for method, code in (("dart", "1"), ("dart", "2"), ("griffin", "2"))
    )
    said = (differing([(one, cell)], "{}{}", "{}{}") for cell in (other, rival))
    assert [any("method_code" in text for text in texts) for texts in said] == [True, False]


def test_a_baseline_that_checks_nothing_is_no_gate(tmp_path):
    """Matthews' correlation needs all documents: no test can be made of it, and -1 is no 1."""
    whole = [{"mcc": [i % 2, i % 2]} for i in range(40)]
    save(tmp_path / "then", answered("cola", whole, metrics=[Metric("cola", "mcc", 1.0, None, 40, True)]))
    with pytest.raises(UserError, match="no metric"):
        check(cells(tmp_path / "then"), cells(tmp_path / "then"), Thresholds(), "b.json")
    save(tmp_path / "then", answered("arc", right(0.5)))
    report = check(cells(tmp_path / "then"), cells(tmp_path / "then"), Thresholds(), "b.json")
    assert not bad(report) and any("cola" in note for note in report.notes)


@pytest.mark.parametrize(("rows", "alpha"), [(501, 0.05), (101, 0.01)])
def test_many_rows_that_all_fell_do_not_hold(rows, alpha):
    """p of resamples is at least 1 / 10 001, which Holm multiplies by the number of rows."""
    then = [answered(f"t{i}", perplexities(1.0, seed=i % 5), up=False) for i in range(rows)]
    now = [answered(f"t{i}", perplexities(3.0, seed=i % 5), up=False) for i in range(rows)]
    assert {r["verdict"] for r in checked(now, then, Thresholds(alpha=alpha)).rows} == {FELL}


def test_a_baselines_metric_is_checked_though_another_has_become_the_main_one():
    both = [{"acc": v["acc"], "acc_norm": w["acc"]} for v, w in zip(right(0.9), right(0.8), strict=True)]
    then = answered("arc", [{"acc_norm": v["acc_norm"]} for v in both])
    (row,) = checked([answered("arc", both, code="new")], [then]).rows
    assert (row["metric"], row["verdict"], row["changed"]) == ("acc_norm", "ok", 0)


@pytest.mark.parametrize(("documents", "rows"), [(6, 4), (8, 13), (10, 52)])
def test_a_loss_of_every_answer_falls_however_many_rows_there_are(documents, rows):
    """The smallest p of an exact test is 2^-n, which Holm multiplies by the number of rows."""
    then, now = ([answered(f"t{i}", [{"exact_match": v}] * documents) for i in range(rows)] for v in (1.0, 0.0))
    found = checked(now, then)
    assert {r["verdict"] for r in found.rows} == {FELL}
    assert f"not tested: {documents} independent units" in found.rows[0]["why"]
    assert not bad(checked(then, then))


def test_a_loss_that_is_left_untested_for_many_rows_has_the_threshold():
    """Eight answers do not show that a baseline is above guessing, and seven tasks leave them no test either."""
    sides = []
    for good in (0, 5):
        values = [{"acc": float(i < good), "gold_ll": -1.0} for i in range(8)]
        sides.append([choosing(answered(f"t{i}", values)) for i in range(7)])
    acc = [r for r in checked(*sides).rows if r["metric"] == "acc"]
    assert {r["verdict"] for r in acc} == {FELL} and all("not tested" in r["why"] for r in acc)
    scores = ([answered(f"t{i}", [{"score": v}] * 6) for i in range(4)] for v in (-0.5, 0.5))
    assert {r["verdict"] for r in checked(*scores).rows} == {FELL}


@pytest.mark.parametrize(("then", "now", "verdict"), [
    (-1.0, -50.0, FELL), (0.5, -0.5, FELL), (-1.0, -1.001, "ok"), (-50.0, -1.0, "ok"), (-1.0, -1.0, "ok"),
])  # fmt: skip
def test_a_negative_score_that_no_test_decides_is_held_against_the_threshold(then, now, verdict):
    sides = ([answered("s", [{"score": v}] * 5)] for v in (now, then))
    assert [r["verdict"] for r in checked(*sides).rows] == [verdict]


def test_thresholds_of_a_task_that_the_baseline_lacks_say_so():
    now = [answered("arc", right(0.5)), answered("piqa", right(0.5))]
    with pytest.raises(UserError, match=r"piqa.*--update"):
        checked(now, now[:1], Thresholds(tasks={"piqa": Limits()}))
