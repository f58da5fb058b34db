"""The summarisation tasks: documents, references, and metrics (ROUGE F-measures, BLEU, length, empty outputs)."""

from functools import lru_cache

import sacrebleu
from sacrebleu.metrics import BLEU

TYPES = ("rouge1", "rouge2", "rougeL")


@lru_cache(maxsize=1)
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer  # takes a second, and finished cells need none

    return RougeScorer(list(TYPES), use_stemmer=True)


def _prepare(dataset, document, reference):
    return dataset.map(lambda d: {document: d[document].strip(), "reference": d[reference].strip()})


def cnn_dailymail(dataset):
    return _prepare(dataset, "article", "highlights")


def xsum(dataset):
    return _prepare(dataset, "document", "summary")


def longbench(dataset):
    return dataset.map(lambda d: {"reference": d["answers"][0].strip()})  # the document as in lm-eval's prompt


def bleu_statistics(summary, reference):
    """What corpus BLEU sums over documents: 10 integers, [hyp_len, ref_len, correct 1..4, total 1..4] n-grams."""
    score = sacrebleu.sentence_bleu(summary, [reference])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def bleu(statistics):
    """Corpus BLEU in [0, 100] as sacrebleu.corpus_bleu gives it (13a tokens, exponential smoothing)."""
    hyp_len, ref_len, *ngrams = (sum(column) for column in zip(*statistics, strict=True))
    return BLEU.compute_bleu(ngrams[:4], ngrams[4:], hyp_len, ref_len, smooth_method="exp").score


def process_results(doc, results):
    """ROUGE-1/2/L F-measures with stemming in [0, 1], BLEU's statistics, words of the summary, whether it is empty."""
    summary = results[0].strip()
    scores = _scorer().score(doc["reference"], summary)
    return {
        **{name: scores[name].fmeasure for name in TYPES},
        "bleu": bleu_statistics(summary, doc["reference"]),
        "summary_words": float(len(summary.split())),
        "empty": float(not summary),
    }
