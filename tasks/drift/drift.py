"""Two-topic documents from any set of articles: does a mask made on the first topic serve the second?

`switch`: one article is the context, another is what follows. `same`: the first half of an article is the context, the
second half follows: the control, in which every alarm of a detector is a false one.
"""

import json
from pathlib import Path

import datasets

FIELDS = ("article", "document", "text")  # where data sets keep their articles; the first that is there
WORDS = 200  # of the context, and of what follows
SMOKE_WORDS = 170  # of each half of this project's own, shorter articles
SMOKE = Path(__file__).resolve().parent.parent / "smoke" / "articles.jsonl"


def _words(text, start, end):
    return " ".join(text.split()[start:end])


def _row(first, second, join):
    return {"context": first, "rest": join + second, "words": len(second.split())}


def switches(articles, words=WORDS):
    """Article i, then article i + 1 (after the last the first); those with too few words are left out."""
    long = [a for a in articles if len(a.split()) >= words]
    if len(long) < 2:
        return []
    return [
        _row(_words(a, 0, words), _words(b, 0, words), "\n\n") for a, b in zip(long, [*long[1:], long[0]], strict=True)
    ]


def halves(articles, words=WORDS):
    """The first and the next `words` words of one article."""
    long = [a for a in articles if len(a.split()) >= 2 * words]
    return [_row(_words(a, 0, words), _words(a, words, 2 * words), " ") for a in long]


def _articles(dataset):
    field = next((f for f in FIELDS if f in dataset.column_names), None)
    if field is None:
        raise ValueError(f"no field {' or '.join(FIELDS)} to take articles from: {', '.join(dataset.column_names)}")
    return dataset[field]


def from_switches(dataset):
    return datasets.Dataset.from_list(switches(_articles(dataset)))


def from_halves(dataset):
    return datasets.Dataset.from_list(halves(_articles(dataset)))


def _smoke():
    return [json.loads(line)["article"] for line in SMOKE.read_text(encoding="utf-8").splitlines()]


def smoke_switches(**_):
    return {"test": datasets.Dataset.from_list(switches(_smoke()))}


def smoke_halves(**_):
    return {"test": datasets.Dataset.from_list(halves(_smoke(), SMOKE_WORDS))}


def perplexity(doc, results):
    """Word perplexity of what follows: summed log-likelihood over words, both over all documents."""
    (loglikelihood, _greedy) = results[0] if isinstance(results[0], (tuple, list)) else results
    return {"word_perplexity": (float(loglikelihood), doc["words"])}
