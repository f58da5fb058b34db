"""Data of the smoke tasks: original texts of this project, read from the files beside this one."""

import json
import re
from pathlib import Path

import datasets

HERE = Path(__file__).parent


def _rows(name):
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _test_split(rows):
    return {"test": datasets.Dataset.from_list(rows)}


def load_questions(**_):
    return _test_split(_rows("questions"))


def load_stories(**_):
    return _test_split(_rows("stories"))


def load_summaries(**_):
    return _test_split([{**row, "reference": row["summary_one"]} for row in _rows("articles")])


def load_highlights(**_):
    return _test_split([{**row, "reference": row["summary_three"]} for row in _rows("articles")])


def load_two_topics(**_):
    """Two articles in a row. `context` ends after the second one's first two sentences, `rest` is what follows."""
    articles = {row["id"]: row for row in _rows("articles")}
    rows = []
    for pair in _rows("two_topics"):
        first, second = articles[pair["first"]]["article"], articles[pair["second"]]["article"]
        opening = re.match(r"(?:.*?[.!?]['\"]?\s){2}", second, flags=re.S).group(0).rstrip()
        rest = second[len(opening) :]
        rows.append({**pair, "context": f"{first}\n\n{opening}", "rest": rest, "words": len(rest.split())})
    return _test_split(rows)


def perplexity(doc, results):
    """Word perplexity of the rest: summed log-likelihood over words, both over all documents."""
    (loglikelihood, _greedy) = results[0] if isinstance(results[0], (tuple, list)) else results
    return {"word_perplexity": (float(loglikelihood), doc["words"])}
