"""The summarisation tasks: documents, references, and metrics (ROUGE F-measures, length, empty outputs)."""

from functools import lru_cache

from rouge_score.rouge_scorer import RougeScorer

TYPES = ("rouge1", "rouge2", "rougeL")


@lru_cache(maxsize=1)
def _scorer():
    return RougeScorer(list(TYPES), use_stemmer=True)


def _prepare(dataset, document, reference):
    return dataset.map(lambda d: {document: d[document].strip(), "reference": d[reference].strip()})


def cnn_dailymail(dataset):
    return _prepare(dataset, "article", "highlights")


def xsum(dataset):
    return _prepare(dataset, "document", "summary")


def process_results(doc, results):
    """ROUGE-1/2/L F-measures with stemming in [0, 1], words of the summary, and whether it is empty."""
    summary = results[0].strip()
    scores = _scorer().score(doc["reference"], summary)
    return {
        **{name: scores[name].fmeasure for name in TYPES},
        "summary_words": float(len(summary.split())),
        "empty": float(not summary),
    }
