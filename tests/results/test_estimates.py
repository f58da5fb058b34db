"""Shares of what dense has above guessing: their intervals by simulation, and the chance that they start from."""

import math

import numpy as np
import pytest

from dart_eval.results import stats, sums
from dart_eval.results.documents import Compared, answers_of
from dart_eval.results.metrics import kind_of
from dart_eval.results.record import Metric
from dart_eval.results.stats import Estimate, above_zero, mean, share
from tests.helpers.records import answered, beside_dense, choosing, perplexities, samples


def test_a_mean_of_tasks_is_tested_as_its_smallest_task_allows():
    tasks = [Estimate(1.0, {f"{n} {i}": (-1.0) ** i for i in range(n)}) for n in (4, 40)]
    assert [e.smallest for e in (*tasks, mean(tasks), mean(tasks).times(2), tasks[1] - tasks[0])] == [4, 40, 4, 4, 4]
    ratio, (low, high) = tasks[1].exp_minus(), tasks[1].interval
    assert ratio.value == math.exp(-1) and ratio.interval == (math.exp(-high), math.exp(-low))
    assert mean(tasks).tested.p is None and tasks[1].tested.p is not None


def simulated(generator, skill, tasks=((4, 0.5), (2, 0.62), (4, 0.3)), n=100):
    """Answers above chance under a row and under dense, which share the luck of each document.

    Args:
        skill: share of what dense has above guessing that the row has, on every task. tasks: choices, dense's accuracy.
    """
    sides = []
    for t, (options, quality) in enumerate(tasks):
        luck, other = generator.random((2, n))
        same = generator.random(n) < 0.6  # of the documents both answer by the same draw
        row = 1 / options + skill * (quality - 1 / options)
        values = (np.where(same, luck, other) < row) - 1 / options, (luck < quality) - 1 / options
        sides.append([
            Estimate(v.mean(), {f"{t} {i}": x for i, x in enumerate((v - v.mean()) / n)}) for v in values
        ])  # fmt: skip
    part, whole = (mean(side) for side in zip(*sides, strict=True))
    return share(part, whole)


@pytest.mark.slow
@pytest.mark.parametrize("skill", [0.0, 0.5, 1.0])
def test_intervals_cover_what_is_true(skill):
    """Nineteen of twenty times; skill 0 is an answerer that guesses."""
    generator = np.random.default_rng(7)
    found = [simulated(generator, skill) for _ in range(600)]
    assert all(found)
    covered = np.mean([f.interval[0] <= skill <= f.interval[1] for f in found])
    assert 0.925 <= covered <= 0.975


def test_there_is_no_share_of_what_is_not_there():
    """Where dense is not above guessing by more than noise, and where the documents are too few for a test."""
    noise = {str(i): 0.01 * (-1) ** i for i in range(100)}
    assert not above_zero(Estimate(0.15, noise)) and above_zero(Estimate(0.25, noise))
    assert share(Estimate(0.1, noise), Estimate(0.15, noise)) is None
    few = {str(i): 0.01 * (-1) ** i for i in range(stats.MIN_CLUSTERS - 1)}
    assert share(Estimate(0.9, few), Estimate(0.9, few)) is None and Estimate(0.9, few).interval is None


def test_the_ends_are_those_ratios_that_a_t_test_does_not_refuse():
    from scipy.stats import ttest_1samp

    generator = np.random.default_rng(3)
    x = generator.normal(1.0, 1.0, 40)
    y = x + generator.normal(1.0, 1.0, 40)
    sides = [Estimate(v.mean(), {str(i): s for i, s in enumerate((v - v.mean()) / 40)}) for v in (x, y)]
    low, high = share(*sides).interval
    assert [ttest_1samp(x - r * y, 0).pvalue for r in (low, high)] == pytest.approx([0.05, 0.05], rel=0.1)


def test_a_few_documents_on_which_both_are_alike_say_little():
    """Eight right of ten under both: one more that differed would be a tenth. Dense itself is what it is."""
    same = Estimate(0.55, {str(i): v / 10 for i, v in enumerate([0.2] * 8 + [-0.8] * 2)})
    low, high = share(same, same, 0.1).interval
    assert low == pytest.approx(2 - high) and low < 0.7
    assert share(same, same).interval == pytest.approx((1, 1))


def measure_of(metric, values, members=("t",)):
    """The measure of a metric; `values` are shared by the members, in turn."""
    lines = [line for i, task in enumerate(members)
             for line in samples(task, [{metric.metric: v} for v in values[i :: len(members)]])]  # fmt: skip
    parts = [Metric(task, metric.metric, 0.0, None, 0, True, metric.task) for task in members if task != metric.task]
    (measure,) = answers_of([metric, *parts], lines).measures.values()
    return measure


@pytest.mark.parametrize(("weights", "members", "values", "value", "step"), [
    ("documents", "t", [0, 1, 1, 0], 1 / 2, 1 / 4), ("documents", "ab", [0, 1, 1], 2 / 3, 1 / 3),
    ("tasks", "ab", [0, 1, 1], 3 / 4, 1 / 2), ("documents", "t", [0.1, 0.4, 0.2, 0.3], 1 / 4, 0.0),
])  # fmt: skip
def test_one_answer_moves_a_value_by_its_weight(weights, members, values, value, step):
    """Of two tasks that weigh the same, one with two documents and one with one, the latter weighs a half."""
    metric = Metric("t", "acc", value, None, len(values), True, weights=weights)
    one, other = (measure_of(metric, values, members) for _ in range(2))
    assert Compared(one, other).step == step
    assert Compared(one, one).step == 0.0


def test_a_row_of_the_frame_says_what_lies_between_a_cell_and_dense(tmp_path):
    draws = np.random.default_rng(0).random(200)
    cells = [choosing(answered("arc", [{"acc": float(d < s), "gold_ll": -d} for d in draws], m, 0.7 * (m != "dense")))
             for m, s in (("dense", 0.8), ("griffin", 0.5))]  # fmt: skip
    found = beside_dense(tmp_path, *cells)
    line, (a, b) = found["griffin", "acc"], (np.mean(draws < s) for s in (0.5, 0.8))
    assert (line["value"], line["dense"], line["chance"]) == pytest.approx((a, b, 0.25))
    assert line["recovery"] == pytest.approx((a - 0.25) / (b - 0.25))
    assert line["recovery_low"] < line["recovery"] < line["recovery_high"]
    assert line["difference"] == pytest.approx(a - b) and line["p"] < 1e-6 and line["p_holm"] == line["p"]
    assert found["dense", "acc"]["recovery"] == 1.0


@pytest.mark.parametrize(("change", "chance"), [
    (lambda s: None, 1 / 4), (lambda s: s.update(responses=[[-1.0, False]]), 0.0),
    (lambda s: s.update(responses=["a text", "another"]), 0.0),
    (lambda s: s["metrics"].update(acc_mutual_info=1.0), 1 / 2), (lambda s: s["metrics"].update(acc=0.4), None),
])  # fmt: skip
def test_chance_follows_from_the_number_of_choices(tmp_path, change, chance):
    """One answer cannot be guessed; mutual information scores each choice twice; of probabilities it is not known."""
    cells = [choosing(answered("arc", [{"acc": 1.0}] * 20, m, 0.7 * (m != "dense"))) for m in ("dense", "griffin")]
    for s in (s for cell in cells for s in cell.samples):
        change(s)
    for cell in cells:
        cell.metrics[0] = type(cell.metrics[0])("arc", "acc", cell.samples[0]["metrics"]["acc"], 0.01, 20, True)
    found = beside_dense(tmp_path, *cells)
    assert found["griffin", "acc"]["chance"] == chance
    assert found["griffin", "acc"]["difference"] == 0.0  # known without chance, too


def test_a_flip_is_of_answers_and_not_of_what_they_were_without_their_context(tmp_path):
    cells = [choosing(answered("arc", [{"acc": 1.0, "acc_mutual_info": 1.0}] * 20, m, 0.7 * (m != "dense")), 8)
             for m in ("dense", "griffin")]  # fmt: skip
    for s in cells[1].samples:
        s["responses"][6] = [-0.1, False]  # the likeliest of all, but a score without the context
    assert beside_dense(tmp_path, *cells)["griffin", "flips"]["value"] == 0.0


@pytest.mark.parametrize("kind", ["acc", "word_perplexity", "bits_per_byte"])
def test_influence_values_spread_as_resampled_documents_do(tmp_path, kind):
    n, generator = 150, np.random.default_rng(0)
    raw = np.array([v["word_perplexity"] for v in perplexities(1.3, n, seed=1)])
    if kind == "acc":
        raw = (generator.random(n) < 0.6).astype(float)
    recorded = sums.as_recorded(kind_of(kind).kind, raw if raw.ndim > 1 else np.stack([raw, np.ones(n)], 1))[0]
    measure = measure_of(Metric("t", kind, recorded, None, n, kind == "acc"), raw.tolist())
    estimate = Compared(measure, measure).estimate(measure)

    def value(rows):
        some = raw[rows]
        if kind == "acc":
            return some.mean()
        nats = -some[:, 0].sum() / some[:, 1].sum()
        return nats / math.log(2) if kind == "bits_per_byte" else nats

    assert estimate.value == pytest.approx(value(np.arange(n))) and len(estimate.units) == n
    spread = np.std([value(generator.integers(0, n, n)) for _ in range(2000)])
    assert estimate.stderr == pytest.approx(spread, rel=0.08)
