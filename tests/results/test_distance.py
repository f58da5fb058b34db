"""How far answers are from dense's: flips, texts and divergence, in the frame, on the board and in `compare`."""

import dataclasses

import numpy as np
import pytest

from dart_eval.results import frame
from dart_eval.results.board import boards
from dart_eval.results.compare import compare_rows
from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from dart_eval.results.tables import board_tables
from tests.helpers.records import answered, choosing, save


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


def lines_of(tmp_path, *records):
    store = Store(save(tmp_path, *records))
    lines = frame.lines(store, store.load()).to_dict("records")
    return {(line["method"], line["metric"]): line for line in lines}


def test_a_flip_is_another_answer_right_or_wrong(tmp_path):
    """Two wrong answers that differ leave the accuracy alone, and are a flip."""
    dense, pruned = [0, 0, 1, 2, 3, 0, 1, 1], [0, 1, 0, 3, 3, 0, 1, 1]
    found = lines_of(tmp_path, chosen("dense", dense), chosen("griffin", pruned))
    line = found["griffin", "flips"]
    assert (line["value"], line["n"], line["dense"], line["higher_is_better"]) == (3 / 8, 8, 0.0, False)
    assert line["stderr"] == pytest.approx(np.std([0, 1, 1, 1, 0, 0, 0, 0], ddof=1) / 8**0.5)
    assert found["dense", "flips"]["value"] == 0.0
    assert ("griffin", "flips") not in lines_of(tmp_path / "alone", chosen("griffin", pruned))


def test_there_are_no_flips_where_a_document_has_no_answer(tmp_path):
    """One item whose log-likelihoods are not there: no share over the others stands for all, and none is NaN."""
    dense, pruned = chosen("dense", [0, 1, 2, 0]), chosen("griffin", [0, 1, 3, 0])
    pruned.samples[2]["responses"] = ["?"]
    assert ("griffin", "flips") not in lines_of(tmp_path, dense, pruned)
    (board,) = boards(Store(tmp_path), Store(tmp_path).load())
    assert all(row.flips is None or row.flips.value == 0 for row in board.blocks[0].rows)


def test_texts_are_held_against_denses_own(tmp_path):
    dense = [("a cat sat on a mat", [1, 2, 3, 4]), ("one two three four", [5, 6]), ("the same", [7])]
    pruned = [("a cat sat on a mat", [1, 2, 3, 4]), ("one two six seven", [5, 9]), ("nothing at all", [8, 7])]
    found = lines_of(tmp_path, wrote("dense", dense), wrote("griffin", pruned))
    assert found["griffin", "dense_rougeL"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["griffin", "dense_tokens"]["value"] == pytest.approx((4 + 1 + 0) / 3)


@pytest.mark.parametrize("text", ["", "\u5317\u4eac\u662f", "\u041f\u0440\u0438\u0432\u0435\u0442"])
def test_the_same_text_is_like_denses_whatever_its_letters(tmp_path, text):
    """ROUGE knows the letters a to z and digits."""
    texts = [(text, [1, 2])] * 3
    assert lines_of(tmp_path, wrote("dense", texts), wrote("griffin", texts))["griffin", "dense_rougeL"]["value"] == 1


def test_what_a_filter_extracts_is_no_text(tmp_path):
    """Two texts without a word in common, in neither of which the filter finds an answer."""
    dense, pruned = ([(text, [i]) for i in range(3)] for text in ("[invalid]", "[invalid]"))
    sides = [wrote(method, texts) for method, texts in (("dense", dense), ("griffin", pruned))]
    for s in (s for side in sides for s in side.samples):
        s["filter"] = "strict-match"
    sides = [dataclasses.replace(s, metrics=[dataclasses.replace(m, filter="strict-match") for m in s.metrics])
             for s in sides]  # fmt: skip
    found = lines_of(tmp_path, *sides)
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
    (table,) = board_tables([board])
    shown = {row[2]: row[table.columns.index("KL\nnats")] for row in table.body}
    assert shown == {"dense": "0", **{name: f"{far[name]:.3g}" for name in ("griffin", "dart")}}
    (row,) = compare_rows("griffin", "dart", [folder], ["kl"]).rows
    assert row["difference"] == pytest.approx(far["griffin"] - far["dart"]) and row["better"] == "A"
    (row,) = compare_rows("dart", "dense", [folder], ["top1"]).rows
    assert row["value_b"] == 1.0 and row["better"] == "B"
    (row,) = compare_rows("dense", "dart", [folder], ["top1"]).rows
    assert row["value_a"] == 1.0 and row["better"] == "A"
