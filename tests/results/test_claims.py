"""Claims of a paper: which side of a claim the measured interval lies on, worked out here by other means."""

import dataclasses
import math
import re

import numpy as np
import pytest
from scipy import stats as theirs

from dart_eval.results.claims import ANY, FAILS, HOLDS, OPEN, Claim, Sides, judged, table
from dart_eval.results.estimates import Estimate, mean
from dart_eval.results.paper_layout import PaperColumn
from dart_eval.results.paper_tables import Paper
from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from dart_eval.sweep.options import config_from
from dart_eval.sweep.paper import load
from dart_eval.util.errors import UserError
from tests.helpers.records import answered, choosing
from tests.results.test_paper import ACC, A, B, _file, _layout, _paper

N = 200


def _estimate(values, task="easy"):
    values = np.asarray(values, float)
    slopes = (values - values.mean()) / len(values)
    return Estimate(float(values.mean()), {f"{task} {i}": v for i, v in enumerate(slopes)})


def _sides(a, b, head="Easy", metric="acc"):
    return Sides(head, _estimate(a), _estimate(b), len(a), metric)


def _claim(column="Easy", **more):
    return Claim("it is better", "abstract", "t", column, 0.5, ("A", "B"), **more)


@pytest.mark.parametrize(("by", "times"), [(0.0, None), (0.1, None), (0.3, None), (0.0, 0.9), (0.0, 1.5), (0.0, 3.0)])
def test_a_verdict_is_that_of_students_t_on_the_documents(by, times):
    """a - times b - by, document by document, tested against 0: another road to the same verdict."""
    draw = np.random.default_rng(3)
    a, b = 0.6 + 0.3 * draw.standard_normal(N), 0.4 + 0.3 * draw.standard_normal(N)
    gap = a - (b if times is None else times * b) - (by if times is None else 0)
    p = theirs.ttest_1samp(gap, 0).pvalue
    expected = OPEN if p > 0.05 else HOLDS if gap.mean() > 0 else FAILS
    assert abs(p - 0.05) > 0.02  # the bootstrap and Student's t need not agree at the edge
    assert judged(_claim(by=by, times=times), [_sides(a, b)]).verdict == expected


def test_what_was_measured_is_said_with_its_interval_and_documents():
    draw = np.random.default_rng(4)
    a, b = (draw.random(N) < 0.7).astype(float), (draw.random(N) < 0.5).astype(float)
    found = judged(_claim(), [_sides(a, b)])
    half = theirs.t.ppf(0.975, N - 1) * (a - b).std(ddof=1) / N**0.5
    value, low, high = map(float, re.findall(r"[+-][\d.]+", found.text))
    assert found.n == N and "points" in found.text
    assert value == pytest.approx(100 * (a - b).mean(), abs=0.05)
    assert (low, high) == pytest.approx((value - 100 * half, value + 100 * half), abs=1)
    ratio = judged(_claim(times=1.1), [_sides(a, b)]).text
    assert ratio.startswith(f"{a.mean() / b.mean():.2f} times [")
    nats = judged(_claim(), [_sides(-3 * a, -3 * b, metric="word_perplexity")]).text
    assert nats.startswith(f"{-3 * (a - b).mean():+.3f} [") and "points" not in nats


def test_a_claim_on_at_least_one_column_pays_for_each_look():
    """Ten columns, of which one is better by chance at p = .02: Holm's p over ten is .2."""
    base = np.tile([0.0, 1.0], N // 2)
    noise = np.random.default_rng(0).standard_normal(N)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    lucky = base + noise + theirs.t.ppf(1 - 0.02 / 2, N - 1) / N**0.5  # t at p = .02
    alone = [_sides(lucky, base, "one")]
    assert judged(_claim(), alone).verdict == HOLDS
    others = [_sides(base + np.roll(noise, i + 1), base, f"column {i}") for i in range(9)]
    found = judged(_claim(ANY), alone + others)
    assert found.verdict == OPEN and found.text.endswith("(one)")
    worse = [_sides(base - 1 + 0.1 * noise, base, f"column {i}") for i in range(3)]
    assert judged(_claim(ANY), worse).verdict == FAILS
    assert judged(_claim(ANY), [*worse, others[0]]).verdict == OPEN  # one of them may yet
    found = judged(_claim(ANY), worse, "3 of 4 columns")  # and so may one that was not measured
    assert found.verdict == OPEN and found.text.endswith("; 3 of 4 columns)")


def test_of_several_columns_the_one_that_proves_the_claim_is_shown():
    """A noisy column is 8 points better, a clear one 3."""
    draw = np.random.default_rng(6)
    noisy, clear = draw.normal(0.08, 1, N), draw.normal(0.03, 0.05, N)
    found = judged(
        _claim(ANY), [_sides(noisy - noisy.mean() + 0.08, 0 * noisy, "noisy"), _sides(clear, 0 * clear, "clear")]
    )
    assert found.verdict == HOLDS and found.text.endswith("(clear)")


def test_no_ratio_decides_nothing():
    """A rival near 0, and numbers of which the smaller one is better."""
    draw = np.random.default_rng(7)
    high, none = 0.3 + 0.1 * draw.standard_normal(N), 1e-4 + 0.1 * draw.standard_normal(N)
    found = judged(_claim(times=3), [_sides(high, none)])
    assert found.verdict == OPEN and found.text.startswith("no ratio")
    worse, better = -0.29 + 0.1 * draw.standard_normal(N), -0.21 + 0.1 * draw.standard_normal(N)  # of flips
    assert judged(_claim(times=2), [_sides(worse, better, metric="flips")]).verdict == OPEN
    for metric, said in (("acc", "not above guessing by"), ("flips", "smaller value"), ("rougeL", "not above 0 by")):
        below = none - none.mean() + (0.001 if metric == "rougeL" else -0.05)
        assert said in judged(_claim(times=0.9), [_sides(high, below, metric=metric)]).text


@pytest.mark.parametrize("gap", [0.92, 0.955, 0.99])
def test_the_verdict_on_a_ratio_is_that_of_its_interval(gap):
    draw = np.random.default_rng(8)
    base = 0.5 + 0.2 * draw.standard_normal(N)
    found = judged(_claim(times=0.95), [_sides(gap * base + 0.2 * draw.standard_normal(N), base)])
    low, high = map(float, re.search(r"\[([\d.]+), ([\d.]+)\]", found.text).groups())
    assert found.verdict == (HOLDS if low > 0.95 else FAILS if high < 0.95 else OPEN)


def test_numbers_are_told_from_the_limit(tmp_path):
    draw = np.random.default_rng(9)
    base = 0.5 + 0.2 * draw.standard_normal(N)
    found = judged(_claim(times=0.9), [_sides((0.9012 + 1e-4 * draw.standard_normal(N)) * base, base)])
    assert found.verdict == HOLDS and found.text.startswith("0.901 times [0.901, 0.901")
    found = judged(_claim(), [_sides(base + 4e-4 + 1e-4 * draw.standard_normal(N), base)])
    assert found.verdict == HOLDS and found.text.startswith("+0.04 points [+0.04, +0.04]")
    paper = _paper(tmp_path, ("a", 30, {}))
    for cost, text in ((10.4, "10.4 MB"), (9.96, "9.96 MB"), (250.3, "250 MB"), (3.14, "3.1 MB"), (10.0, "10 MB")):
        at_8b = Claim("at 8B", "s", column="state MB", shape="x", at_most=10.0)
        (row,) = table([at_8b], paper, {}, lambda claim, cost=cost: cost).body
        assert row[1:3] == [HOLDS if cost <= 10 else FAILS, f"{text}, counted"]


def test_a_mean_over_tasks_with_a_handful_of_documents_each_is_not_tested():
    """Ten tasks of two documents are twenty units, and their spread within tasks is hardly known."""
    draw = np.random.default_rng(10)
    tasks = [_estimate(draw.random(2), f"task {i}") for i in range(10)]
    assert len(mean(tasks).units) == 20 and mean(tasks).interval is None and mean(tasks).p is None
    assert mean([_estimate(draw.random(8), f"task {i}") for i in range(10)]).interval is not None


def test_few_or_equal_documents_decide_nothing():
    assert judged(_claim(), [_sides([1, 1, 1, 0], [0, 0, 0, 0])]).verdict == OPEN
    assert judged(_claim(), [_sides([1] * N, [1] * N)]).verdict == OPEN
    assert judged(_claim(), []) == judged(_claim(by=0.3), [])
    assert judged(_claim(), []).text == "not measured"


def test_verdicts_come_from_the_documents_of_a_folder(tmp_path):
    perplexity = PaperColumn("PPL", ("easy",), "word_perplexity")
    state = PaperColumn("state", ("easy",), field="state_mib")
    paper = _paper(tmp_path, ("a", 30, {"loss": 3.0}), ("b", 10, {"loss": 2.0, "params": {"x": 1}}))
    layout = _layout((ACC, perplexity, state), (A, B))
    at_8b = Claim("at 8B", "s", column="state MB", shape="x", at_most=10.0)
    claims = [
        _claim(), _claim(by=0.9), Claim("lower", "", "t", "PPL", 0.5, ("A", "B")),
        Claim("lower", "", "t", "PPL", 0.5, ("B", "A")), Claim("small", "", "t", "state", 0.5, ("A",), at_most=1.0),
        Claim("large", "", "t", "state", 0.5, ("A",), at_most=-1.0), Claim("none", "", "t", ANY, 0.7, ("A", "B")),
        at_8b, dataclasses.replace(at_8b, at_most=9.0),
    ]  # fmt: skip
    made = table(claims, paper, {"t": layout}, lambda claim: 9.7)
    assert [row[1] for row in made.body] == [HOLDS, FAILS, FAILS, HOLDS, HOLDS, FAILS, OPEN, HOLDS, FAILS]
    assert made.body[0] == ["it is better (abstract)", HOLDS, made.body[0][2], "40"]
    assert made.body[0][2].startswith("+50.0 points [") and made.body[7][2] == "9.7 MB, counted"
    assert made.body[4][2].endswith(" MiB")
    assert made.body[2][2].startswith("-1.000 [")  # a is worse by a nat a word
    assert "tiny@f00d" in made.note


def test_bits_are_held_against_nats(tmp_path):
    """One text under two metrics: its claims have one verdict."""
    store, generator, cells = Store(tmp_path), np.random.default_rng(0), []
    ends = [(100 * generator.gamma(9, 0.2), 9 + 2 * generator.random()) for _ in range(40)]
    for method in ("a", "b"):
        pairs = [[-(n + more * (method == "b")), 100] for n, more in ends]
        values = [{"byte_perplexity": pair, "bits_per_byte": pair} for pair in pairs]
        total = sum(v["bits_per_byte"][0] for v in values) / 4000
        found = [Metric("t", "byte_perplexity", math.exp(-total), 0.1, 40, False),
                 Metric("t", "bits_per_byte", -total / math.log(2), 0.1, 40, False)]  # fmt: skip
        cells.append(answered("t", values, method, metrics=found, params={"x": 1} if method == "b" else {}))
    paper = Paper(store, {None: [store.save(r.inputs["method"], r) for r in cells]}, {}, "x")
    columns = (PaperColumn("P", ("t",), "byte_perplexity"), PaperColumn("B", ("t",), "bits_per_byte"))
    layout = _layout(columns, (A, B))
    for by, verdict in ((0.09, HOLDS), (0.12, FAILS)):
        claims = [Claim("c", "s", "t", head, 0.5, ("A", "B"), by=by) for head in ("P", "B")]
        made = table(claims, paper, {"t": layout}, lambda claim: 0.0)
        assert [row[1] for row in made.body] == [verdict] * 2 and made.body[0][2] == made.body[1][2]


def test_a_mean_without_some_columns_is_over_the_others_and_says_so(tmp_path):
    """30 of 40 against 10 of 40 on the one column that was run."""
    hard = PaperColumn("Hard", ("hard",), "acc")
    paper = _paper(tmp_path, ("a", 30, {}), ("b", 10, {"params": {"x": 1}}))
    layout = _layout((ACC, hard), (A, B), mean=True)
    claim = dataclasses.replace(_claim(), column="mean")
    (row,) = table([claim], paper, {"t": layout}, lambda claim: 0).body
    assert row[1] == HOLDS and row[2].startswith("+50.0 points [") and row[2].endswith("(1 of 2 columns)")
    (row,) = table([claim], paper, {"t": _layout((hard,), (A, B), mean=True)}, lambda claim: 0).body
    assert row[1:] == [OPEN, "not measured", ""]


def test_a_claim_on_a_row_of_another_model_is_left_out(tmp_path):
    methods = {"Ours": "dart", "G": "griffin", "Table": {"method": "dart", "only": "llama"}}
    claims = [GOOD, {**GOOD, "rows": ["Table", "G"]}]
    base = config_from(None, {"method": "dense", "sparsity": "0"})
    assert [c.rows for c in load(_file(tmp_path, claims=claims, methods=methods), base).claims] == [("Ours", "G")]


def test_at_least_one_column_means_those_of_one_metric(tmp_path):
    """Two columns of accuracy and one of perplexity: the mean is none of them, and one was not measured."""
    columns = (ACC, PaperColumn("Hard", ("hard",), "acc"), PaperColumn("PPL", ("easy",), "word_perplexity"))
    paper = _paper(tmp_path, ("a", 10, {"loss": 2.0}), ("b", 30, {"loss": 3.0, "params": {"x": 1}}))
    layout = dataclasses.replace(_layout(columns, (A, B)), mean=True)
    (row,) = table([_claim(ANY, metric="acc")], paper, {"t": layout}, lambda claim: 0).body
    assert row[1] == OPEN and row[2].endswith("(Easy; 1 of 2 columns)")
    (row,) = table([_claim(ANY, metric="word_perplexity")], paper, {"t": layout}, lambda claim: 0).body
    assert row[1] == HOLDS and row[2].endswith("(PPL)")


def test_a_ratio_of_accuracies_counts_from_guessing(tmp_path):
    """Of two choices: 30 and 24 of 40 are .75 and .6, above guessing .25 and .1."""
    paper = _paper(tmp_path, ("a", 24, {"choices": 2}), ("b", 30, {"params": {"x": 1}, "choices": 2}))
    (row,) = table([_claim(times=0.9)], paper, {"t": _layout((ACC,), (A, B))}, lambda claim: 0).body
    assert row[2].startswith("0.40 times [")
    (row,) = table([_claim()], paper, {"t": _layout((ACC,), (A, B))}, lambda claim: 0).body
    assert row[2].startswith("-15.0 points [")


SHAPE = {"claim": "c", "shape": "llama-3.1-8b", "method": "dart", "column": "state MB", "sparsity": 0.7, "at_most": 9}
GOOD = {"claim": "c", "table": "one", "rows": ["Ours", "G"], "column": "Q", "sparsity": 0.5}


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({**GOOD, "rows": ["Ours", "H"]}, "claim 'c': table 'one' has no 'H'"),
        ({**GOOD, "column": "P"}, "has no 'P'"),
        ({**GOOD, "table": "three"}, "unknown table 'three'; known: one, two"),
        ({**GOOD, "rows": ["Ours"]}, "needs a sparsity, and two rows"),
        ({**GOOD, "at_most": 3}, "needs a sparsity, and two rows \\(one with at_most\\)"),
        ({**GOOD, "by": "much"}, "a value is of the wrong kind"),
        ({**GOOD, "claims": 1}, "unknown key 'claims'"),
        ({**GOOD, "shape": "llama-3.1-8b"}, "either a table or a shape"),
        ({"claim": "c", "shape": "llama-3.1-8b", "method": "dart", "column": "state MB"}, "a sparsity and at_most"),
        ({**GOOD, "sparsity": 0.6}, "has no sparsity 0.6"),
        ({**GOOD, "rows": ["Ours"], "at_most": 3}, "at_most is for costs, and 'Q' does not fit"),
        ({**GOOD, "rows": ["Ours"], "at_most": 3, "column": ANY}, "at_most is for costs"),
        ({**GOOD, "by": 0.1, "times": 2}, "only one of `by` and `times`"), ({**GOOD, "by": float("nan")}, "finite"),
        ({**GOOD, "column": ANY, "metric": "bleu"}, "`any` needs columns of one metric; give metric: "),
        ({**SHAPE, "method": "drat"}, "did you mean"),
        ({**SHAPE, "column": "state MiB"}, "unknown cost 'state MiB'; did you mean state MB"),
    ],
)  # fmt: skip
def test_a_claim_that_cannot_be_tested_is_refused(tmp_path, claim, message):
    with pytest.raises(UserError, match=message):
        load(_file(tmp_path, claims=[claim]), config_from(None, {"method": "dense", "sparsity": "0"}))


def test_a_ratio_needs_a_level_of_guessing(tmp_path):
    """TruthfulQA's mc2 is a share of the probability: nobody knows what guessing has, so there is no ratio above it."""
    store, cells = Store(tmp_path), []
    for method, level in (("a", 0.42), ("b", 0.45)):
        own = 0.02 * np.random.default_rng(ord(method)).standard_normal(N)
        shares = np.clip(level + 0.15 * np.random.default_rng(1).standard_normal(N) + own, 0, 1)
        params = {"x": 1} if method == "b" else {}
        cells.append(choosing(answered("mc2", [{"acc": float(v)} for v in shares], method, params=params)))
    paper = Paper(store, {None: [store.save(r.inputs["method"], r) for r in cells]}, {}, "x")
    layout = _layout((PaperColumn("Easy", ("mc2",), "acc"),), (A, B))
    ratio, gap = table([_claim(times=0.9), _claim()], paper, {"t": layout}, lambda claim: 0).body
    assert ratio[1] == OPEN and gap[1] == FAILS


def test_at_least_one_column_of_accuracy_may_be_a_ratio_beside_a_perplexity(tmp_path):
    columns = {"Q": {"task": "boolq", "metric": "acc"}, "P": {"task": "wikitext", "metric": "word_perplexity"}}
    tables = [{"name": "one", "title": "One", "columns": columns}]
    claim = {**GOOD, "column": ANY, "times": 1.1}
    base = config_from(None, {"method": "dense", "sparsity": "0"})
    (found,) = load(_file(tmp_path, tables=tables, claims=[{**claim, "metric": "acc"}]), base).claims
    assert found.times == 1.1 and found.metric == "acc"
    with pytest.raises(UserError, match="`times` is not for perplexities"):
        load(_file(tmp_path, tables=tables, claims=[{**claim, "metric": "word_perplexity"}]), base)
