"""Summaries: corpus BLEU from counts per document, its standard error, and which metrics have a direction."""

import importlib.util
import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

# The step from lm-eval's result to our metrics, by itself: no model writes the texts that these tests need.
from dart_eval.evaluation.evaluate import _metrics, _stderr
from dart_eval.evaluation.tasks import Tasks, leaves, tasks_dir

# Words that the 13a tokeniser splits, and some that it does not
WORDS = ["the", "a", "cat", "dog,", "runs.", "U.S.", "it's", "3.5%", "well-known", '"quick"', "&amp;", "é", "你好", "-"]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def summary():
    """tasks/summarisation/summary.py, which lm-eval loads by its path."""
    spec = importlib.util.spec_from_file_location("summary", tasks_dir() / "summarisation" / "summary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bleu_by_hand(summary):
    """Five words of which four match at the front: precisions 4/5, 3/4, 2/3, 1/2; then one document is too short."""
    counts = summary.bleu_statistics("a b c d e", "a b c d f")
    assert counts == [5, 5, 4, 3, 2, 1, 5, 4, 3, 2]
    assert summary.bleu([counts]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    short = summary.bleu_statistics("a", "a b c d e f")
    assert short == [1, 6, 1, 0, 0, 0, 1, 0, 0, 0]
    # 6 words against 11: the brevity penalty exp(1 - 11/6)
    both = math.exp(1 - 11 / 6) * 100 * (5 / 6 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert summary.bleu([counts, short]) == pytest.approx(both)


@settings(deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
@pytest.mark.slow
def test_bleu_is_sacrebleus_to_the_last_digit(summary, pairs):
    counts = [summary.bleu_statistics(answer, reference) for answer, reference in pairs]
    assert all(len(c) == 10 and all(type(x) is int for x in c) for c in counts)
    wanted = sacrebleu.corpus_bleu([a for a, _ in pairs], [[r for _, r in pairs]])
    assert summary.bleu(counts) == wanted.score


def test_the_standard_error_leaves_out_one_document_at_a_time(summary):
    answers = ["the cat runs .", "a dog , a cat", "", "it's well-known that the cat runs", "the the the"]
    references = ["the cat runs away .", "a dog , the cat", "one two", "it's well-known that a cat runs", "the end"]
    counts = [summary.bleu_statistics(a, r) for a, r in zip(answers, references, strict=True)]
    without = np.array([
        sacrebleu.corpus_bleu(
            [a for j, a in enumerate(answers) if j != i], [[r for j, r in enumerate(references) if j != i]]
        ).score
        for i in range(5)
    ])  # fmt: skip
    wanted = math.sqrt(4 / 5 * ((without - without.mean()) ** 2).sum())
    assert wanted > 1
    assert _stderr("bleu", counts) == pytest.approx(wanted)
    assert _stderr("bleu", [counts[0]] * 3) == pytest.approx(0, abs=1e-9)
    assert _stderr("bleu", counts[:1]) is None  # one document tells nothing of the others
    assert _stderr("bleu", [("a text", "another"), ("a", "b")]) is None  # lm-eval's own bleu keeps texts


@pytest.mark.slow
def test_the_jackknife_agrees_with_the_spread_of_new_corpora(summary):
    """Corpora drawn anew scatter as the standard error of one of them says."""
    rng = np.random.default_rng(0)

    def draw():
        chosen = []
        for _ in range(60):
            reference = rng.choice(list("abcdefgh"), 12)
            answer = np.where(rng.random(12) < rng.uniform(0.1, 0.5), "x", reference)[: rng.integers(8, 13)]
            chosen.append(summary.bleu_statistics(" ".join(answer), " ".join(reference)))
        return chosen

    corpora = [draw() for _ in range(60)]
    spread = np.std([summary.bleu(c) for c in corpora], ddof=1)
    mean_error = np.mean([_stderr("bleu", c) for c in corpora])
    assert mean_error == pytest.approx(spread, rel=0.3)  # a spread of 60 is itself known to 9 %


@pytest.mark.slow
def test_lm_eval_reports_it_for_a_summarisation_task(monkeypatch):
    """Through the harness, with canned answers: the value, our standard error, and no bootstrap over documents."""
    import lm_eval
    import lm_eval.api.metrics
    from lm_eval.api.model import LM

    answers = ["", "The old bridge was closed .", "The council will vote on the plan next week ."]

    class Canned(LM):
        def generate_until(self, requests, **_):
            return [answers[r.doc_id] for r in requests]

        def loglikelihood(self, requests, **_):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    def refuse(*_, **__):
        raise AssertionError("bootstrapped")

    monkeypatch.setattr(lm_eval.api.metrics, "bootstrap_stderr", refuse)
    tasks = Tasks()
    items = list(tasks.load("smoke_summary"))
    results = lm_eval.simple_evaluate(
        model=Canned(), tasks=items, task_manager=tasks.manager, limit=3, bootstrap_iters=1000, log_samples=True
    )
    found = {m.metric: m for m in _metrics(results, [])}
    references = [leaves(items)[0].eval_docs[i]["reference"] for i in range(3)]
    samples = sorted(results["samples"]["smoke_summary"], key=lambda s: s["doc_id"])
    assert found["bleu"].value == sacrebleu.corpus_bleu(answers, [references]).score > 0
    assert found["bleu"].stderr == pytest.approx(_stderr("bleu", [s["bleu"] for s in samples]))
    assert found["bleu"].stderr > 0
    assert {name: m.higher_is_better for name, m in found.items()} == {
        "rouge1": True, "rouge2": True, "rougeL": True, "bleu": True, "empty": False,
        "summary_words": None,  # neither long nor short is good
    }  # fmt: skip
