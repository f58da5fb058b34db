"""Folders of results to make report pages of."""

import math

from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from tests.helpers.records import cell, written

HOSTILE = '<img src=x onerror="window.hit=1"></script><script>window.hit=1</script>\'$x_y$&amp;\u2028{{7*7}}'


def choice(doc, scores, gold, task="arc_easy", **more):
    return {
        "task": task, "doc_id": doc, "filter": "none", "doc_hash": f"d{doc}", "prompt_hash": f"p{doc}",
        "target_hash": "t", "cluster": None,
        "metrics": {"acc": float(scores.index(max(scores)) == gold), "gold_ll": scores[gold]},
        "responses": [[s, False] for s in scores], "tokens": 4, "remasks": 0, "effective_sparsity": 0.5, **more,
    }  # fmt: skip


def texts(task, n, choices=None, prompt="Question {}?", target=1):
    return [{"task": task, "doc_id": i, "prompt": prompt.format(i), "choices": choices, "target": target}
            for i in range(n)]  # fmt: skip


RIGHT = {("dense", 0.0): 6, ("griffin", 0.5): 4, ("griffin", 0.7): 2, ("dart", 0.5): 5, ("dart", 0.7): 3}  # of 8


def folder(path, hostile=""):
    """A choice task, a summary and a perplexity, with texts; `hostile` is put into all names."""
    store = Store(path)
    questions = texts("arc_easy", 8, [f" one{hostile}", " two", " three"], "Question {}?" + hostile)
    stories = texts("xsum", 3, None, "Text {}" + hostile, f"The reference {hostile}")
    for (method, s), right in RIGHT.items():
        asked = [choice(i, [-3.5 if i < right else -1.0, -2.0, -3.0], 1) for i in range(8)]
        accuracy = [
            Metric("arc_easy", "acc", right / 8, 0.17, 8, True),
            Metric("arc_easy", "acc_norm", 0.5, None, 8, True),
        ]
        name = method if method == "dense" else method + hostile
        model = "tiny" + hostile
        store.save(f"a{method}{s}", cell(name, s, metrics=accuracy, model=model, samples=asked), questions)
        summaries = [written(i, f"{method} wrote {i} {hostile}") for i in range(3)]
        quality = [Metric("xsum", "rougeL", 0.2 - 0.1 * s, 0.01, 50, True), Metric("xsum", "empty", 0, 0, 50, None)]
        store.save(f"b{method}{s}", cell(name, s, "xsum", quality, model, summaries), stories)
        perplexity = [Metric("wikitext", "word_perplexity", 20 * math.exp(5 * s), 1.0, 50, False),
                      Metric("wikitext", "bits_per_byte", 1.0, 0.1, 50, False)]  # fmt: skip
        store.save(f"c{method}{s}", cell(name, s, "wikitext", perplexity, model))
    return store
