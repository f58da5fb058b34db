"""How far the texts of a study of long generations are from dense's, and how much they repeat themselves.

python scripts/long_texts.py OUTPUT
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

from dart_eval.results import writers
from dart_eval.results.inputs import DENSE
from dart_eval.results.labels import specs
from dart_eval.results.store import Store

HEADS = ["task", "method", "texts", "ROUGE-L with dense's text", "repeated 4-grams"]
NOTE = (
    "ROUGE-L (F1) of each text against dense's text for the same prompt. repeated 4-grams: share of a text's sequences "
    "of four words that stood in it before. Mean over the texts ± standard error, in per cent."
)
WORDS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    store = Store(Path(folder))
    records = store.load()
    names = specs(records)
    texts: dict[tuple[str, str], dict[int, str]] = {}
    for record in records:
        name = (str(record.inputs["task"]), names[record.key])
        whole = [s for s in store.samples(record) if s["filter"] == "none"]  # others are what a filter found in a text
        if whole:
            texts[name] = {s["doc_id"]: s["responses"][0] for s in whole}
    scorer = RougeScorer(["rougeL"])
    body = []
    for (task, method), mine in sorted(texts.items(), key=lambda item: (item[0][0], item[0][1] != DENSE, item[0][1])):
        theirs = texts.get((task, DENSE), {})
        near = [scorer.score(theirs[i], mine[i])["rougeL"].fmeasure for i in mine if i in theirs]
        shown = "" if method == DENSE else _percent(near)
        body.append([task, method, str(len(mine)), shown, _percent([repeated(text) for text in mine.values()])])
    print(writers.markdown(writers.Table("Texts beside those of dense", HEADS, body, note=NOTE)))
    return 0


def repeated(text: str) -> float:
    """Share of the sequences of four words that stood in the text before."""
    words = text.split()
    runs = [tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _percent(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f}"


if __name__ == "__main__":
    sys.exit(main())
