"""Claims of a paper: which side of a claim the measured interval lies on, worked out here by other means."""

import math
import re
from functools import partial

import numpy as np
import pytest
from scipy import stats as theirs

from dart_eval.results import stats as ours
from dart_eval.results.paper import ANY, FAILS, HOLDS, MEAN, OPEN, TAILED_UNITS, Claim, Sides, judged
from dart_eval.results.record import Metric
from dart_eval.results.stats import Estimate, mean
from dart_eval.sweep.options import config_from
from dart_eval.sweep.paper import load
from tests.results.test_paper import ACC, BASE, COUNTED, GOOD, HARD, PPL, easy, file, paper, table

N = 200


def estimate(values, task="easy"):
    values = np.asarray(values, float)
    slopes = (values - values.mean()) / len(values)
    return Estimate(float(values.mean()), {f"{task} {i}": v for i, v in enumerate(slopes)})


def sides(a, b, head="Easy", metric="acc"):
    return Sides(head, metric, len(a), estimate(a), estimate(b))


def claim(column="Easy", **more):
    return Claim(**{**GOOD, "column": column, **more})


def verdicts(tmp_path, answers, *claims, counted=None, **keys):
    filled, _, spec = paper(tmp_path, answers, claims=[{**GOOD, **one} for one in claims], **keys)
    return filled.verdicts(spec.claims, counted or {}).body


@pytest.mark.parametrize(("by", "times"), [
    (None, None), (0.1, None), (0.3, None), (None, 0.9), (None, 1.5), (None, 3.0),
])  # fmt: skip
def test_a_verdict_is_that_of_students_t_on_the_documents(by, times):
    """a - times b - by, document by document, tested against 0: another road to the same verdict."""
    draw = np.random.default_rng(3)
    a, b = 0.6 + 0.3 * draw.standard_normal(N), 0.4 + 0.3 * draw.standard_normal(N)
    gap = a - b * (times or 1) - (by or 0)
    p = theirs.ttest_1samp(gap, 0).pvalue
    assert abs(p - 0.05) > 0.02  # the bootstrap and Student's t need not agree at the edge
    expected = OPEN if p > 0.05 else HOLDS if gap.mean() > 0 else FAILS
    assert judged(claim(by=by, times=times), [sides(a, b)])[0] == expected


def test_what_was_measured_is_said_with_its_interval_and_documents():
    draw = np.random.default_rng(4)
    a, b = (draw.random(N) < 0.7).astype(float), (draw.random(N) < 0.5).astype(float)
    _, text, n = judged(claim(), [sides(a, b)])
    half = theirs.t.ppf(0.975, N - 1) * (a - b).std(ddof=1) / N**0.5
    value, low, high = map(float, re.findall(r"[+-][\d.]+", text))
    assert n == str(N) and "points" in text and value == pytest.approx(100 * (a - b).mean(), abs=0.05)
    assert (low, high) == pytest.approx((value - 100 * half, value + 100 * half), abs=1)
    assert judged(claim(times=1.1), [sides(a, b)])[1].startswith(f"{a.mean() / b.mean():.2f} times [")
    nats = judged(claim(), [sides(-3 * a, -3 * b, metric="word_perplexity")])[1]
    assert nats.startswith(f"{-3 * (a - b).mean():+.3f} [") and "points" not in nats


@pytest.mark.slow
def test_a_long_tail_alone_decides_nothing_on_perplexities(monkeypatch):
    """Where nothing is true, one column and one of seven err in at most 4 % of cases; at p < .05 in 8 and 25 %."""
    monkeypatch.setattr(ours, "bootstrap_t", partial(ours.bootstrap_t, resamples=700))
    draw, drawn, wrong = np.random.default_rng(9), 400, dict.fromkeys(("Easy", ANY), 0)
    for _ in range(drawn):
        tails = draw.lognormal(size=(7, TAILED_UNITS)) - math.exp(0.5)
        columns = [sides(tail, 0 * tail, f"column {i}", "word_perplexity") for i, tail in enumerate(-tails)]
        wrong["Easy"] += judged(claim(), columns[:1])[0] != OPEN
        wrong[ANY] += judged(claim(ANY), columns)[0] != OPEN
    assert all(count <= 0.04 * drawn for count in wrong.values()), wrong
    clear = draw.normal(1, 1, TAILED_UNITS)
    one, few = (sides(v, 0 * v, metric="word_perplexity") for v in (clear, clear[1:]))
    assert [judged(claim(), [rows])[0] for rows in (one, few)] == [HOLDS, OPEN]


def test_a_claim_on_at_least_one_column_pays_for_each_look():
    """Ten columns, of which one is better by chance at p = .02: Holm's p over ten is .2."""
    base = np.tile([0.0, 1.0], N // 2)
    noise = np.random.default_rng(0).standard_normal(N)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    lucky = base + noise + theirs.t.ppf(1 - 0.02 / 2, N - 1) / N**0.5  # t at p = .02
    alone = [sides(lucky, base, "one")]
    assert judged(claim(), alone)[0] == HOLDS
    others = [sides(base + np.roll(noise, i + 1), base, f"column {i}") for i in range(9)]
    verdict, text, _ = judged(claim(ANY), alone + others)
    assert verdict == OPEN and text.endswith("(one)")
    worse = [sides(base - 1 + 0.1 * noise, base, f"column {i}") for i in range(3)]
    assert judged(claim(ANY), worse)[0] == FAILS
    assert judged(claim(ANY), [*worse, others[0]])[0] == OPEN  # one of them may yet
    verdict, text, _ = judged(claim(ANY), worse, "3 of 4 columns")  # and so may one that was not measured
    assert verdict == OPEN and text.endswith("; 3 of 4 columns)")


def test_of_several_columns_the_one_that_proves_the_claim_is_shown():
    """A noisy column is 8 points better, a clear one 3."""
    draw = np.random.default_rng(6)
    noisy, clear = draw.normal(0.08, 1, N), draw.normal(0.03, 0.05, N)
    columns = [sides(noisy - noisy.mean() + 0.08, 0 * noisy, "noisy"), sides(clear, 0 * clear, "clear")]
    verdict, text, _ = judged(claim(ANY), columns)
    assert verdict == HOLDS and text.endswith("(clear)")


def test_no_ratio_decides_nothing():
    """A rival near 0, and numbers of which the smaller one is better."""
    draw = np.random.default_rng(7)
    high, none = 0.3 + 0.1 * draw.standard_normal(N), 1e-4 + 0.1 * draw.standard_normal(N)
    verdict, text, _ = judged(claim(times=3), [sides(high, none)])
    assert verdict == OPEN and text.startswith("no ratio")
    worse, better = -0.29 + 0.1 * draw.standard_normal(N), -0.21 + 0.1 * draw.standard_normal(N)  # of flips
    assert judged(claim(times=2), [sides(worse, better, metric="flips")])[0] == OPEN


@pytest.mark.parametrize("gap", [0.92, 0.955, 0.99])
def test_the_verdict_on_a_ratio_is_that_of_fiellers_interval(gap):
    draw = np.random.default_rng(8)
    base = 0.5 + 0.2 * draw.standard_normal(N)
    verdict, text, _ = judged(claim(times=0.95), [sides(gap * base + 0.2 * draw.standard_normal(N), base)])
    low, high = map(float, re.search(r"\[([\d.]+), ([\d.]+)\]", text).groups())
    assert verdict == (HOLDS if low > 0.95 else FAILS if high < 0.95 else OPEN)


def test_few_or_equal_documents_decide_nothing():
    """Ten tasks of two documents are twenty units, and their spread within tasks is hardly known."""
    draw = np.random.default_rng(10)
    tasks = [estimate(draw.random(2), f"task {i}") for i in range(10)]
    assert len(mean(tasks).units) == 20 and mean(tasks).interval is None and mean(tasks).p is None
    assert judged(claim(), [sides([1, 1, 1, 0], [0, 0, 0, 0])])[0] == OPEN
    assert judged(claim(), [sides([1] * N, [1] * N)])[0] == OPEN
    assert judged(claim(), []) == (OPEN, "not measured", "")


def test_numbers_are_told_from_the_limit(tmp_path):
    draw = np.random.default_rng(9)
    base = 0.5 + 0.2 * draw.standard_normal(N)
    verdict, text, _ = judged(claim(times=0.9), [sides((0.9012 + 1e-4 * draw.standard_normal(N)) * base, base)])
    assert verdict == HOLDS and text.startswith("0.901 times [0.901, 0.901")
    verdict, text, _ = judged(claim(), [sides(base + 4e-4 + 1e-4 * draw.standard_normal(N), base)])
    assert verdict == HOLDS and text.startswith("+0.04 points [+0.04, +0.04]")
    filled, shape = paper(tmp_path, easy(A=30))[0], Claim(**{**COUNTED, "at_most": 10.0})
    for cost, said in ((10.4, "10.4 MB"), (9.96, "9.96 MB"), (250.3, "250 MB"), (3.14, "3.1 MB"), (10.0, "10 MB")):
        (row,) = filled.verdicts([shape], {shape: cost}).body
        assert row[1:3] == [HOLDS if cost <= 10 else FAILS, f"{said}, counted"]


def test_verdicts_come_from_the_documents_of_a_folder(tmp_path):
    columns = {**ACC, **PPL, "state": {"task": "easy", "field": "state_mib"}}
    own, lower = {"rows": ["A"], "column": "state"}, {"column": "PPL"}
    body = verdicts(
        tmp_path, easy(A={"right": 30, "loss": 3.0}, B={"right": 10, "loss": 2.0}),
        {}, {"by": 0.9}, lower, {**lower, "rows": ["B", "A"]}, {**own, "at_most": 1.0}, {**own, "at_most": 0.0},
        {"rows": ["A", "C"]}, one=table(columns, ["A", "B", "C"]),
    )  # fmt: skip
    assert [row[1] for row in body] == [HOLDS, FAILS, OPEN, OPEN, HOLDS, FAILS, OPEN]
    assert body[0] == ["it is better (abstract)", HOLDS, body[0][2], "40"] and body[0][2].startswith("+50.0 points [")
    assert body[2][2].startswith("-1.000 [") and body[4][2].endswith(" MiB")  # a nat a word worse


def test_bits_are_held_against_nats(tmp_path):
    """One text under two metrics: its claims have one verdict."""
    generator, answers = np.random.default_rng(0), {}
    ends = [(100 * generator.gamma(9, 0.2), 9 + 2 * generator.random()) for _ in range(120)]
    for row in "AB":
        pairs = [[-(n + more * (row == "B")), 100] for n, more in ends]
        total = sum(x for x, _ in pairs) / 12000
        answers[row] = {
            "values": [{"byte_perplexity": pair, "bits_per_byte": pair} for pair in pairs],
            "metrics": [Metric("easy", "byte_perplexity", math.exp(-total), 0.1, 120, False),
                        Metric("easy", "bits_per_byte", -total / math.log(2), 0.1, 120, False)],
        }  # fmt: skip
    columns = {head: {"task": "easy", "metric": head} for head in ("byte_perplexity", "bits_per_byte")}
    for i, (by, verdict) in enumerate(((0.09, HOLDS), (0.12, FAILS))):
        body = verdicts(
            tmp_path / str(i), easy(**answers), *({"column": c, "by": by} for c in columns), one=table(columns)
        )
        assert [row[1] for row in body] == [verdict] * 2 and body[0][2] == body[1][2]


def test_a_mean_or_any_without_some_columns_is_over_the_others_and_says_so(tmp_path):
    """30 of 40 against 10 of 40 on the one column that was run; `any` means the columns of one metric."""
    answers = easy(A={"right": 30, "loss": 3.0}, B={"right": 10, "loss": 2.0})
    (row,) = verdicts(tmp_path / "a", answers, {"column": MEAN}, one=table({**ACC, **HARD}, mean=True))
    assert row[1] == HOLDS and row[2].startswith("+50.0 points [") and row[2].endswith("(1 of 2 columns)")
    of_acc, swapped, of_ppl = verdicts(
        tmp_path / "b", answers, {"column": ANY, "metric": "acc"}, {"column": ANY, "rows": ["B", "A"]},
        {"column": ANY, "rows": ["B", "A"], "metric": "word_perplexity"}, one=table({**ACC, **HARD, **PPL}),
    )  # fmt: skip
    assert of_acc[1] == HOLDS and of_acc[2].endswith("(Easy; 1 of 2 columns)")
    assert swapped[1] == OPEN and swapped[2].endswith("(Easy; 1 of 2 columns)")
    assert of_ppl[1] == OPEN and of_ppl[2].endswith("(PPL)")


def test_a_ratio_of_accuracies_counts_from_guessing(tmp_path):
    """Of two choices: 24 and 30 of 40 are .6 and .75, above guessing .1 and .25."""
    answers = easy(A={"right": 24, "choices": 2}, B={"right": 30, "choices": 2})
    ratio, gap = verdicts(tmp_path, answers, {"times": 0.9}, {})
    assert ratio[2].startswith("0.40 times [") and gap[2].startswith("-15.0 points [")


def test_what_no_test_takes_is_not_called_unmeasured(tmp_path):
    """Nobody knows what guessing has of mc2, a share of the probability; mcc is of no document, nats have no ratio."""
    answers = {}
    for row, level in (("A", 0.42), ("B", 0.45)):
        own = 0.02 * np.random.default_rng(ord(row)).standard_normal(40)
        shares = np.clip(level + 0.15 * np.random.default_rng(1).standard_normal(40) + own, 0, 1)
        found = [Metric("easy", name, v, 0.05, 40, True) for name, v in (("acc", float(shares.mean())), ("mcc", 0.4))]
        answers[row] = {"values": [{"acc": float(v)} for v in shares], "metrics": found, "choices": 4}
    one = table({**ACC, "MCC": {"task": "easy", "metric": "mcc"}})
    ratio, gap, mcc = verdicts(tmp_path / "a", easy(**answers), {"times": 0.9}, {}, {"column": "MCC"}, one=one)
    assert gap[1] == FAILS and ratio[1] == mcc[1] == OPEN and "not tested" in ratio[2] and "not tested" in mcc[2]
    losses = easy(A={"loss": 2.0}, B={"loss": 3.0})
    (nats,) = verdicts(tmp_path / "b", losses, {"column": "PPL", "times": 1.1}, one=table(PPL))
    assert nats[1] == OPEN and "not tested" in nats[2]


def test_a_claim_on_a_row_of_another_model_is_left_out(tmp_path):
    rows = {"A": "griffin", "B": "wanda-sp", "C": {"method": "dart", "only": "llama"}}
    claims = [GOOD, {**GOOD, "rows": ["C", "B"]}, COUNTED]
    spec = load(file(tmp_path, table(rows=rows), claims=claims), config_from(None, BASE))
    assert [one.rows for one in spec.claims] == [("A", "B"), ()]
