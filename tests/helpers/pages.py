"""Folders of results to make report pages of, and a look at a page's HTML."""

import dataclasses
import math
from html.parser import HTMLParser

import numpy as np

from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from tests.helpers.records import answered, cell, choosing, written

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


METHODS = ("dense", 0.0), ("griffin", 0.5), ("griffin", 0.7), ("dart", 0.5), ("dart", 0.7)
FEW = ("dense", 0.0), ("dart", 0.5)  # where what is said of methods is not the point


RIGHT = {("dense", 0.0): 6, ("griffin", 0.5): 4, ("griffin", 0.7): 2, ("dart", 0.5): 5, ("dart", 0.7): 3}  # of 8


def folder(path, hostile="", methods=METHODS):
    """A choice task, a summary and a perplexity, with texts; `hostile` is put into all names."""
    store = Store(path)
    questions = texts("arc_easy", 8, [f" one{hostile}", " two", " three"], "Question {}?" + hostile)
    stories = texts("xsum", 3, None, "Text {}" + hostile, f"The reference {hostile}")
    for method, s in methods:
        right = RIGHT[method, s]
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


class Checked(HTMLParser):
    """Every element that is opened is closed; tags and attributes are kept."""

    VOID = {"meta", "link", "input", "img"}  # noqa: RUF012

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(html)
        assert self.open == []
        ids = [v for k, v in self.attributes if k == "id"]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # of SVG
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def choices(share, method="griffin", sparsity=0.7, read=None, **more):
    """A cell that answers the easiest of 200 questions right."""
    easy = np.random.default_rng(5).random(200)
    values = [{"acc": float(e < share)} for e in easy]
    made = choosing(answered("arc", values, method, 0.0 if method == "dense" else sparsity, **more))
    read = read if read is not None else 1.0 if method == "dense" else 1 - sparsity
    return dataclasses.replace(made, weights_read=read)


def scored(value, stderr=0.02, n=400, metric="acc", better=True):
    return [Metric("arc_easy", metric, value, stderr, n, better)]


def only(*records):
    def make(path):
        store = Store(path)
        for i, record in enumerate(records):
            store.save(f"cell{i}", record)
        return store

    return make


NO_FLOPS = dataclasses.replace(cell(), flops={})
PARTS = {
    "dense only": only(cell("dense", 0.0)),
    "no dense": only(cell(), cell("griffin")),
    "one cell": only(cell()),
    "several models": only(*(cell(m, s, model=n) for m, s in (("dense", 0.0), ("dart", 0.5)) for n in ("x", "y"))),
    "only perplexity": only(*(cell(m, s, "w", [Metric("w", "word_perplexity", 20 + s, 1.0, 9, False)])
                              for m, s in (("dense", 0.0), ("dart", 0.5)))),
    "no error": only(*(cell(m, s, metrics=scored(0.5, None)) for m, s in (("dense", 0.0), ("dart", 0.5)))),
    "nan": only(*(cell(m, s, metrics=scored(math.nan, math.inf)) for m, s in (("dense", 0.0), ("dart", 0.5)))),
    "infinite beside finite": only(cell("dense", 0.0), cell(), cell("griffin", metrics=scored(math.inf))),
    "zeros": only(*(cell(m, s, metrics=scored(0.0, 0.0)) for m, s in (("dense", 0.0), ("dart", 0.5)))),
    "no flops": only(cell("dense", 0.0), NO_FLOPS),
    "no metrics": only(cell(metrics=[])),
    "no settings": only(dataclasses.replace(cell(), settings={})),
    "a group": only(cell(metrics=[*scored(0.5), Metric("arc_law", "acc", 0.4, 0.1, 20, True, "arc_easy")])),
    "many methods": only(cell("dense", 0.0), *(cell(f"method-{i}", s) for i in range(12) for s in (0.3, 0.5, 0.7))),
    "mixed": only(cell("dense", 0.0, code="other"), cell(dtype="bfloat16"), cell("griffin", seed=1)),
}  # fmt: skip
