"""Check the smoke tasks' texts and pair articles into two-topic documents (tasks/smoke/two_topics.jsonl).

Run it after editing the texts: `python scripts/build_smoke_data.py`. It exits with 1 and says why if they break a rule.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

SMOKE = Path(__file__).resolve().parent.parent / "tasks" / "smoke"
PAIRS = 40


def rows(name: str) -> list[dict]:
    """The rows of one file of the smoke data."""
    return [json.loads(line) for line in (SMOKE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def sentences(text: str) -> int:
    """Sentences of a summary: full stops (or ! ?) before a space and a capital, or at the end."""
    return len(re.findall(r"[.!?](?=\s+[A-Z]|$)", text.strip()))


def problems() -> list[str]:
    """Every broken rule, in words; empty when all is well."""
    found = []
    for name, options, least in (("questions", "choices", 120), ("stories", "endings", 60)):
        items = rows(name)
        if len(items) < least:
            found.append(f"{name}: {len(items)} items, at least {least} wanted")
        places = Counter(item["answer"] for item in items)
        if max(places.values()) - min(places.values()) > 1 or len(places) != 4:
            found.append(f"{name}: answers are not balanced over positions: {dict(places)}")
        for item in items:
            if len(set(item[options])) != 4:
                found.append(f"{item['id']}: four different {options} wanted")
        if len({item["id"] for item in items}) != len(items):
            found.append(f"{name}: ids repeat")
    for item in rows("articles"):
        words = len(item["article"].split())
        if not 250 <= words <= 400:
            found.append(f"{item['id']}: {words} words, 250 to 400 wanted")
        if sentences(item["summary_one"]) != 1 or sentences(item["summary_three"]) != 3:
            found.append(f"{item['id']}: summaries must have one and three sentences")
    return found


def two_topics() -> list[dict]:
    """Pairs of different articles; every article opens at least one document and closes at least one."""
    ids = [item["id"] for item in rows("articles")]
    order = random.Random(20260101)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < PAIRS:
        shuffled = order.sample(ids, len(ids))
        pairs += [p for p in zip(shuffled, shuffled[1:] + shuffled[:1], strict=True) if p not in pairs]
    return [{"id": f"pair-{i:02d}", "first": a, "second": b} for i, (a, b) in enumerate(pairs[:PAIRS], 1)]


def main() -> int:
    """Check, then write the pairs."""
    found = problems()
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        return 1
    lines = [json.dumps(row) for row in two_topics()]
    (SMOKE / "two_topics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"smoke data is in order; {len(lines)} two-topic documents written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
