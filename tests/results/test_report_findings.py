"""The findings of the report: what is said of the methods, and what is not said from too little."""

import math
import random

from dart_eval.results.outcomes import outcome
from dart_eval.results.record import Metric
from dart_eval.results.report.cells import Cells
from dart_eval.results.report.findings import Findings
from tests.helpers.pages import choice
from tests.helpers.records import cell, written


def asked(right, task="arc_easy", lean=0.0):
    """Samples of a choice task; `right` says which documents were answered right, `lean` moves the right answers."""
    return [choice(i, [-1.0 + lean, -2.0] if ok else [-2.0 + lean, -1.0], 0, task) for i, ok in enumerate(right)]


def answered(method, sparsity, right, task="arc_easy", **inputs):
    value = sum(right) / len(right)
    metrics = [Metric(task, "acc", value, (value * (1 - value) / len(right)) ** 0.5, len(right), True)]
    return cell(method, sparsity, task, metrics, samples=asked(right, task), **inputs)


def rolled(method, sparsity, lls):
    """A perplexity task of documents of ten words."""
    metrics = [Metric("wikitext", "word_perplexity", math.exp(-sum(lls) / (10 * len(lls))), 1.0, len(lls), False)]
    samples = [{**written(i, "", "wikitext"), "metrics": {"word_perplexity": [v, 10]}, "responses": [v]}
               for i, v in enumerate(lls)]  # fmt: skip
    return cell(method, sparsity, "wikitext", metrics, samples=samples)


def found(*records):
    """The findings of these cells."""
    tests = Findings(Cells.of(records))
    tests.add(list(records), {r.key: outcome(r, r.samples) for r in records if r.samples})
    return tests.made()


def said(*records):
    """All sentences of the one finding of these cells, then its notes."""
    (one,) = found(*records)
    return [f"{who} {what}" for _, sentences in one.groups for who, what in sentences] + one.notes


def right(n, of=100):
    return [i < n for i in range(of)]


def test_a_clear_loss_is_said_with_its_numbers():
    text = said(answered("dense", 0.0, right(60)), answered("dart", 0.5, right(30)))
    assert text == [
        "dart against dense: worse on arc_easy (acc 0.300 against 0.600: −0.300 [−0.396, −0.219])."
    ]  # fmt: skip


def test_what_the_same_documents_show_is_said_though_the_intervals_overlap():
    """0.60 and 0.52 on 100 documents are within each other's error, but all eight that changed were lost."""
    text = said(answered("dense", 0.0, right(60)), answered("dart", 0.5, right(52)))
    assert text[0].startswith("dart against dense: worse on arc_easy (acc 0.520 against 0.600")


def test_a_difference_inside_noise_is_not_said():
    changed = [*right(58), *[i < 5 for i in range(42)]]  # not nested: five gained, seven lost
    other = [*[i >= 7 for i in range(58)], *[i < 10 for i in range(42)]]
    text = said(answered("dense", 0.0, changed[:100]), answered("dart", 0.5, other[:100]))
    assert text[0].startswith("dart against dense: no difference shown on arc_easy (acc 0.610 against")


def test_lower_perplexity_is_better():
    dense = [-30.0 - (i % 5) for i in range(20)]
    text = said(rolled("dense", 0.0, dense), rolled("dart", 0.5, [v - 10 - (i % 3) for i, v in enumerate(dense)]))
    assert text[0].startswith("dart against dense: worse on wikitext (word_perplexity 73.")
    assert "×\u202f2.9" in text[0] or "×\u202f3.0" in text[0]


def test_nothing_is_said_from_too_little():
    text = said(answered("dense", 0.0, right(5, 5)), answered("dart", 0.5, right(0, 5)))
    assert text == ["1 comparison not made (dart against dense on arc_easy): 5 independent units, fewer than 6."]


def test_cells_without_samples_are_not_tested_and_it_is_said():
    (text,) = said(cell("dense", 0.0), cell("dart", 0.5))
    assert "samples are missing or damaged" in text


def test_more_comparisons_ask_for_smaller_p():
    """Seven documents lost and none gained: p = .016. Enough for one comparison, not for one of four."""
    dense, dart = answered("dense", 0.0, right(60)), answered("dart", 0.5, right(53))
    assert "worse" in said(dense, dart)[0]
    others = [answered(name, 0.5, right(60)) for name in ("griffin", "random")]
    assert said(dense, dart, *others)[0] == "dart, griffin and random against dense: no difference shown on arc_easy."


def test_the_best_is_held_against_each_other_method():
    records = [answered("dense", 0.0, right(90)), answered("dart", 0.5, right(80)), answered("griffin", 0.5, right(78)),
               answered("random", 0.5, right(30))]  # fmt: skip
    (one,) = found(*records)
    (head, sentences) = one.groups[1]
    assert head == "The best pruned method of each task, against the others"
    ((who, what),) = sentences
    assert who == "arc_easy:"
    assert what.startswith("dart (acc 0.800), better than random (0.300: +0.500 [")
    assert what.endswith("; not shown for griffin.")
    assert one.rule == "All 5 comparisons"
    assert [row[:4] for row in one.comparisons] == [
        ["dart", "dense", "arc_easy", "acc"], ["griffin", "dense", "arc_easy", "acc"],
        ["random", "dense", "arc_easy", "acc"], ["dart", "griffin", "arc_easy", "acc"],
        ["dart", "random", "arc_easy", "acc"],
    ]  # fmt: skip
    assert [row[-1] for row in one.comparisons] == ["worse", "worse", "worse", "not shown", "better"]


def test_choosing_the_best_by_the_tested_numbers_is_paid_for():
    """Many equal methods: the luckiest of them is seldom called better than another (nominal: in .05 of the cases)."""
    draw, alarms = random.Random(1), 0
    for _ in range(60):
        records = [answered(f"m{k}", 0.5, [draw.random() < 0.5 for _ in range(60)]) for k in range(6)]
        (one,) = found(*records)
        alarms += any(row[-1] == "better" for row in one.comparisons)
    assert alarms <= 6  # P(> 6 of 60 at .05) = .03; without the correction it is about .2 of them


def test_methods_without_a_shown_difference_share_a_sentence():
    records = [answered("dense", 0.0, right(60)), *(answered(f"m{k}", 0.5, right(60)) for k in range(4))]
    assert said(*records)[0] == "m0, m1, m2 and m3 against dense: no difference shown on arc_easy."


def test_other_settings_are_not_compared():
    text = said(answered("dense", 0.0, right(60), num_fewshot=5), answered("dart", 0.5, right(30), num_fewshot=0))
    assert text == ["There is no dense cell and no second method to compare with."]


def test_other_prompts_are_not_compared():
    dense, dart = answered("dense", 0.0, right(60)), answered("dart", 0.5, right(30))
    dart.samples[3]["prompt_hash"] = "another"
    (text,) = said(dense, dart)
    assert "not paired, 1 of 100 prompts differ" in text


def test_sparsities_with_nothing_to_say_share_a_heading():
    (one,) = found(answered("dart", 0.5, right(3)), answered("dart", 0.7, right(3)))
    assert one.sparsity == "50\u202f%, 70\u202f%"
