"""What is best at equal reads: a lead counts beyond noise and beyond what matters; of equals the cheaper is named."""

import dataclasses

import numpy as np
import pytest

from dart_eval.results import board, stats
from dart_eval.results.board import AHEAD, BEHIND, MATTERS, SPLIT, TIED, UNTESTED, Row, verdicts
from dart_eval.results.stats import Estimate
from dart_eval.results.tables import sentence
from tests.helpers.boards import board_of, choices, places
from tests.helpers.records import answered, choosing, right


def verdict_of(board, level=1):
    return verdicts(board.blocks[0])[level]


def sentence_of(board, level=1):
    return sentence(board.blocks[0], verdict_of(board, level))


def words_of(board, level=1):
    """Where each pruned row stands beside the leader."""
    judged = verdict_of(board, level)
    return {judged.leader.label: "leader", **{row.label: word for row, word in judged.stands.items()}}


def likely(falls, right_of=20, n=30, overhead=None, noise=0.3):
    """Methods with the same right answers but for one, whose log-likelihoods fell by so many nats."""
    drawn = np.random.default_rng(3).normal(0, noise, (len(falls), n))
    records = []
    for i, (method, fall) in enumerate(falls.items()):
        values = [{"acc": float(j < right_of + i % 2), "gold_ll": -5 - fall + drawn[i, j]} for j in range(n)]
        record = choosing(answered("arc", values, method, 0.0 if method == "dense" else 0.5))
        records.append(dataclasses.replace(record, flops={"overhead_share": (overhead or {}).get(method, 0.0)}))
    return records


def texts(changes, n=100):
    """A text's cells whose log-likelihood a word is lower than dense's by so much, at each method's work."""
    generator = np.random.default_rng(1)
    base = generator.normal(-3, 0.5, n)
    records = []
    for method, (loss, overhead) in changes.items():
        small = 0.0 if method == "dense" else generator.normal(0, 1e-4, n)
        values = [{"word_perplexity": [100 * x, 100]} for x in (base - loss + small).tolist()]
        record = answered("wiki", values, method, 0.0 if method == "dense" else 0.5, up=False)
        records.append(dataclasses.replace(record, flops={"overhead_share": overhead}))
    return records


@pytest.mark.parametrize(("lead", "word", "take"), [
    (0.8 * MATTERS, TIED, "griffin"), (1.5 * MATTERS, BEHIND, "dart"), (0.0, TIED, "griffin"),
])  # fmt: skip
def test_a_lead_counts_beyond_noise_and_beyond_what_matters(tmp_path, lead, word, take):
    """Noise of 1e-5 nats a word, so that each lead is beyond noise; griffin adds less work than dart."""
    made = board_of(tmp_path, *texts({"dense": (0, 0), "dart": (0.1, 0.2), "griffin": (0.1 + lead, 0.1)}))
    judged = verdict_of(made)
    better = judged.leader.quality["word_perplexity"].better
    assert abs(better.value + 0.1) < 1e-3 and better.stderr < 1e-4
    (word_of,) = judged.stands.values()
    assert word_of == word and judged.take.label == take
    assert (judged.best is None) == (word == TIED)
    said = sentence_of(made)
    assert ("is the best" in said) == (word == BEHIND) and ("costs less" in said) == (word == TIED)
    assert [mark for _, mark in places(made)[1]] == (["*", ""] if word == BEHIND else ["", ""])


def test_of_rows_that_are_tied_the_one_with_less_memory_is_named_if_they_work_alike(tmp_path):
    sizes = {"dense": 0, "dart": 5_000, "griffin": 3_000}
    records = [
        dataclasses.replace(r, memory={"weights": 1, "beside": sizes[r.inputs["method"]], "state": 1})
        for r in texts({"dense": (0, 0), "dart": (0.1, 0.1), "griffin": (0.1, 0.1)})
    ]
    assert verdict_of(board_of(tmp_path, *records)).take.label == "griffin"


def lead_of(value, spread, n=40):
    slopes = np.random.default_rng(0).normal(0, spread / np.sqrt(n), n)
    return Estimate(value, {str(i): s for i, s in enumerate(slopes - slopes.mean())})


def test_the_p_of_a_lead_is_of_what_lies_beyond_what_matters():
    """A lead of MATTERS and a margin is tested as that margin against 0, on both sides; a smaller one has p 1."""
    for sign in (1, -1):
        lead = lead_of(sign * (MATTERS + 0.02), 0.01)
        assert board._p(lead) == dataclasses.replace(lead, value=sign * 0.02).p
        assert board._p(lead_of(sign * 0.9 * MATTERS, 1e-6)) == 1.0
    few = Estimate(0.001, {str(i): 0.0 for i in range(stats.MIN_CLUSTERS - 1)})
    assert board._p(few) is None
    assert board._p(lead_of(float("nan"), 1.0)) is board._p(lead_of(float("inf"), 1.0)) is None


def test_the_best_pays_for_having_been_chosen_among_many(tmp_path):
    """Six methods that are equal but for luck: none is best, and no mark says so."""
    drawn = [answered("arc", right(0.5, n=80, seed=s), "griffin", params={"score.seed": s}) for s in range(6)]
    made = board_of(tmp_path, answered("arc", right(0.5, n=80, seed=99), "dense", 0.0), *drawn)
    (level,) = [level for level in places(made) if len(level) > 2]
    assert {mark for _, mark in level} == {""} and len(verdict_of(made).of(TIED)) == 5


@pytest.mark.parametrize(("p", "best"), [(0.02, False), (0.01, True)])
def test_each_p_counts_for_all_pairs_that_could_have_been_chosen(tmp_path, monkeypatch, p, best):
    """Of three rows p counts 3 / 2 times, and Holm doubles the smaller of two: .02 becomes .06, and .01 .03."""
    monkeypatch.setattr(board, "_p", lambda lead: p)
    pruned = [choices(s, method=m) for m, s in (("griffin", 0.6), ("dart", 0.5), ("random", 0.4))]
    made = board_of(tmp_path, choices(0.8, method="dense"), *pruned)
    assert (verdict_of(made).best is not None) == best
    assert [mark for _, mark in places(made)[1]] == (["*", "", ""] if best else ["", "", ""])


@pytest.mark.slow
def test_however_many_rows_a_clear_lead_is_told(tmp_path):
    """No resample gives less than 1 / 10001, which hundreds of tests would make .05 and more."""
    rows = [choices(0.75, method="dart"), *(choices(0.3, params={"draw": str(i)}) for i in range(30))]
    assert verdict_of(board_of(tmp_path, choices(0.8, method="dense"), *rows)).best.label == "dart"


def test_log_likelihoods_tell_apart_what_few_answers_do_not(tmp_path):
    made = board_of(tmp_path, *likely({"dense": 0.0, "griffin": 1.0, "dart": 2.0}))
    (word,) = verdict_of(made).stands.values()
    assert places(made)[1] == [("griffin", "*"), ("dart", "")] and word == BEHIND


def test_the_row_with_more_right_answers_is_not_best_where_log_likelihoods_say_otherwise(tmp_path):
    """griffin has one answer more, which is noise, and is a nat worse in every answer."""
    made = board_of(tmp_path, *likely({"dense": 0.0, "griffin": 2.0, "dart": 1.0}))
    assert places(made)[1] == [("griffin", ""), ("dart", "*")] and verdict_of(made).leader.label == "dart"


def test_no_row_is_best_where_each_of_two_is_ahead_in_a_metric(tmp_path):
    dense, griffin = likely({"dense": 0.0, "griffin": 3.0}, 150, 200)
    golds = [s["metrics"]["gold_ll"] + 2 + 0.1 * (j % 3) for j, s in enumerate(griffin.samples)]
    values = [{"acc": float(j < 90), "gold_ll": gold} for j, gold in enumerate(golds)]
    made = board_of(tmp_path, dense, griffin, choosing(answered("arc", values, "dart", 0.5)))
    assert places(made)[1] == [("griffin", ""), ("dart", "")]
    judged = verdict_of(made)
    (word_of,) = judged.stands.values()
    assert word_of == SPLIT
    assert judged.best is None and "no row is best" in sentence_of(made)


@pytest.mark.parametrize(("share", "word", "take"), [
    (0.78, AHEAD, "dense on 4 bits"), (0.603, TIED, "griffin"), (0.3, BEHIND, "griffin"),
])  # fmt: skip
def test_the_best_rounding_that_reads_no_more_stands_beside_the_leader(tmp_path, share, word, take):
    rounded = choices(share, method="dense", read=0.281, ffn_bits="4")
    first = choices(0.2, method="rounding", read=0.29)
    first.settings["granularity"] = "last bits"
    made = board_of(tmp_path, choices(0.8, method="dense"), choices(0.6), rounded, first)
    kinds = {r.label: r.kind for r in made.blocks[0].levels[-1]}
    assert kinds == {"griffin": "pruned", "dense on 4 bits": "rounding", "rounding": "rounding"}
    judged = verdict_of(made)
    assert (judged.control[0].label, judged.control[1], judged.take.label) == ("dense on 4 bits", word, take)
    assert "Rounding (dense on 4 bits" in sentence_of(made)


def test_rounding_that_reads_more_takes_no_part_and_that_of_a_lower_level_does(tmp_path):
    dense, at_half = choices(0.8, method="dense"), choices(0.6, sparsity=0.5)
    better, more = [choices(s, method="dense", read=r, ffn_bits=b) for s, r, b in ((0.7, 0.41, "6"), (0.79, 0.53, "8"))]
    worse = choices(0.3, method="dense", read=0.28, ffn_bits="4")
    made = board_of(tmp_path / "a", dense, at_half, better, worse, more)
    (judged,) = [one for one in verdicts(made.blocks[0]) if one]
    assert (judged.control[0].label, judged.control[1]) == ("dense on 6 bits", AHEAD)
    alone = board_of(tmp_path / "b", dense, at_half, more)
    (judged,) = [one for one in verdicts(alone.blocks[0]) if one]
    assert judged.control is None


def test_a_row_with_the_same_answers_is_tied(tmp_path):
    """Re-masks that no alarm called for: no document differs, so there is nothing to test by."""
    dense, best = choices(0.9, method="dense"), choices(0.8, method="dart", params={"remask": "drift"})
    twin, other = choices(0.8, method="dart", params={"remask": "off"}), choices(0.4)
    made = board_of(tmp_path, dense, best, twin, other)
    assert [*words_of(made).values()] == ["leader", TIED, BEHIND]
    assert verdict_of(made).best is None and [mark for _, mark in places(made)[1]] == ["~", "~", ""]


def test_rows_that_were_not_tested_are_not_called_tied(tmp_path):
    """Five documents are too few units."""
    cells = [choosing(answered("arc", [{"acc": float(i % 3 > 0) * keep} for i in range(5)], m, s))
             for m, s, keep in (("dense", 0.0, 1), ("dart", 0.7, 1), ("griffin", 0.7, 0))]  # fmt: skip
    made = board_of(tmp_path, *cells)
    assert words_of(made) == {"dart": "leader", "griffin": UNTESTED}
    assert "not tested against griffin" in sentence_of(made)


def test_nothing_is_judged_where_nothing_is_pruned():
    assert board._verdict([Row("dense", "dense", 0.0, 1.0, "control")], [], "acc") is None
