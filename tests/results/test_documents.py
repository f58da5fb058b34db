"""The documents of a cell: what a value is, what a missing one is, and how far answers are from dense's."""

import dataclasses
import math

import numpy as np
import pytest

import dart_eval
from dart_eval.results.board import boards
from dart_eval.results.compare import compare_rows
from dart_eval.results.documents import answers_of, documents, loop_at
from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from tests.helpers.records import answered, beside_dense, choosing, right, samples, save


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


# -- how far answers are from dense's: flips, texts and divergence ----------------------------------------------------


def chosen(method, answers, **more):
    """A cell that chooses these of four answers, of which the first is right."""
    values = [{"acc": float(a == 0)} for a in answers]
    made = choosing(answered("arc", values, method, 0.0 if method == "dense" else 0.5, **more))
    for s, a in zip(made.samples, answers, strict=True):
        s["responses"] = [[-0.5 if i == a else -1.0, False] for i in range(4)]
    return made


def wrote(method, texts):
    values = [{"rougeL": 0.2}] * len(texts)
    made = answered("xsum", values, method, 0.0 if method == "dense" else 0.5)
    for s, (text, ids) in zip(made.samples, texts, strict=True):
        s.update(responses=[text], token_ids=ids)
    return made


def test_a_flip_is_another_answer_right_or_wrong(tmp_path):
    """Two wrong answers that differ leave the accuracy alone, and are a flip."""
    dense, pruned = [0, 0, 1, 2, 3, 0, 1, 1], [0, 1, 0, 3, 3, 0, 1, 1]
    found = beside_dense(tmp_path, chosen("dense", dense), chosen("griffin", pruned))
    line = found["griffin", "flips"]
    assert (line["value"], line["n"], line["dense"], line["higher_is_better"]) == (3 / 8, 8, 0.0, False)
    assert line["stderr"] == pytest.approx(np.std([0, 1, 1, 1, 0, 0, 0, 0], ddof=1) / 8**0.5)
    assert found["dense", "flips"]["value"] == 0.0
    assert ("griffin", "flips") not in beside_dense(tmp_path / "alone", chosen("griffin", pruned))


def test_there_are_no_flips_where_a_document_has_no_answer(tmp_path):
    """One item whose log-likelihoods are not there: no share over the others stands for all, and none is NaN."""
    dense, pruned = chosen("dense", [0, 1, 2, 0]), chosen("griffin", [0, 1, 3, 0])
    pruned.samples[2]["responses"] = ["?"]
    assert ("griffin", "flips") not in beside_dense(tmp_path, dense, pruned)
    (board,) = boards(Store(tmp_path), Store(tmp_path).load())
    assert all(row.flips is None or row.flips.value == 0 for row in board.blocks[0].rows)


@pytest.mark.slow
def test_texts_are_held_against_denses_own(tmp_path):
    dense = [("a cat sat on a mat", [1, 2, 3, 4]), ("one two three four", [5, 6]), ("the same", [7])]
    pruned = [("a cat sat on a mat", [1, 2, 3, 4]), ("one two six seven", [5, 9]), ("nothing at all", [8, 7])]
    sides = [wrote("dense", dense), wrote("griffin", pruned)]
    for side in sides:
        for sample in side.samples:
            sample["limited"] = len(sample["token_ids"]) > 1
    found = beside_dense(tmp_path, *sides)
    lengths = {name: found["griffin", name]["value"] for name in ("length", "limited", "loops")}
    assert lengths == pytest.approx({"length": 8 / 7, "limited": 1.0, "loops": 0.0})
    assert found["dense", "limited"]["value"] == pytest.approx(2 / 3)
    assert found["griffin", "dense_rougeL"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["griffin", "dense_tokens"]["value"] == pytest.approx((4 + 1 + 0) / 3)


def test_a_text_repeats_itself_if_a_long_run_comes_again_at_once():
    """Held against the definition: some run of 20 tokens or more stands twice, side by side."""

    def plain(tokens):
        runs = ((i, n) for n in range(20, len(tokens) // 2 + 1) for i in range(len(tokens) - 2 * n + 1))
        return min((i + n for i, n in runs if tokens[i : i + n] == tokens[i + n : i + 2 * n]), default=len(tokens))

    word = np.random.default_rng(0).integers(0, 1000, 200).tolist()
    loops = [[5] * 40, [1, 2, 3] * 14, word[:20] * 2, [7, *word[:33], *word[:33], 8, 9], [*word[:50], *word[30:50]]]
    others = [[], [5] * 39, word, word[:19] * 2, [*word[:30], 0, *word[:30]], [*word[:20], *word[1:20], 0]]
    assert [loop_at(t) for t in loops] == [*map(plain, loops)] == [20, 21, 20, 34, 50]
    assert [loop_at(t) for t in others] == [*map(plain, others)] == [*map(len, others)]
    few = np.random.default_rng(1).integers(0, 2, (60, 90)).tolist()
    again = [[*t[:20], *t[:n], *t[20:]] for t in few for n in (19, 20, 21)]
    assert [loop_at(t) for t in again] == [*map(plain, again)] and len({plain(t) < len(t) for t in again}) == 2


@pytest.mark.parametrize("text", ["", "\u5317\u4eac\u662f", "\u041f\u0440\u0438\u0432\u0435\u0442"])
def test_the_same_text_is_like_denses_whatever_its_letters(tmp_path, text):
    """ROUGE knows the letters a to z and digits."""
    texts = [(text, [1, 2])] * 3
    assert (
        beside_dense(tmp_path, wrote("dense", texts), wrote("griffin", texts))["griffin", "dense_rougeL"]["value"] == 1
    )


def test_what_a_filter_extracts_is_no_text(tmp_path):
    """Two texts without a word in common, in neither of which the filter finds an answer."""
    sides = [wrote(method, [("[invalid]", [i]) for i in range(3)]) for method in ("dense", "griffin")]
    for side in sides:
        side.samples[:] = [{**s, "filter": "strict-match"} for s in side.samples]
        side.metrics[:] = [dataclasses.replace(m, filter="strict-match") for m in side.metrics]
    found = beside_dense(tmp_path, *sides)
    assert ("griffin", "dense_tokens,strict-match") in found
    assert ("griffin", "dense_rougeL,strict-match") not in found


def diverging(method, far, n=40):
    """A perplexity whose positions are so far from dense, with the likeliest token the same at two of three."""
    generator = np.random.default_rng(3)
    values = [{"word_perplexity": [-30.0 - generator.random(), 10.0]} for _ in range(n)]
    for v in values if method != "dense" else ():
        positions = int(generator.integers(5, 15))
        v |= {"kl": [far * positions * (0.9 + 0.2 * generator.random()), positions], "top1": [positions - 2, positions]}
    measures = [Metric("wiki", "word_perplexity", float(np.exp(-sum(v["word_perplexity"][0] for v in values) / 10 / n)),
                       0.1, n, False)]  # fmt: skip
    for name in ("kl", "top1") if method != "dense" else ():
        value = sum(v[name][0] for v in values) / sum(v[name][1] for v in values)
        measures.append(Metric("wiki", name, value, 0.01, n, name == "top1"))
    return answered("wiki", values, method, 0.0 if method == "dense" else 0.5, metrics=measures)


def test_the_board_shows_the_divergence_and_compare_tests_it(tmp_path):
    records = [diverging("dense", 0.0), diverging("griffin", 0.3), diverging("dart", 0.5)]
    folder = save(tmp_path, *records)
    (board,) = boards(Store(folder), Store(folder).load())
    far = {row.label: row.kl.value for row in board.blocks[0].rows if row.kl}
    assert 0.27 < far["griffin"] < 0.33 < 0.45 < far["dart"] < 0.55
    (row,) = compare_rows("griffin", "dart", [folder], ["kl"]).rows
    assert row["difference"] == pytest.approx(far["griffin"] - far["dart"]) and row["better"] == "A"
    (row,) = compare_rows("dart", "dense", [folder], ["top1"]).rows
    assert row["value_b"] == 1.0 and row["better"] == "B"
    (row,) = compare_rows("dense", "dart", [folder], ["top1"]).rows
    assert row["value_a"] == 1.0 and row["better"] == "A"
