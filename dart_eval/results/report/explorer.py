"""The documents of the sample explorer: what was asked, what each cell answered."""

from __future__ import annotations

from typing import Any

from dart_eval.results.record import Record
from dart_eval.results.report.cells import Cells
from dart_eval.results.report.text import finite, number, percent

HEAD, TAIL = 1200, 2400  # characters kept of a long prompt
ANSWER = 4000  # and of an answer, reference or choice
MOST = 1200  # documents of all tasks together: a page of some MB


class Explorer:
    """Collects the first documents of each task.

    Attributes:
        wanted: documents a task that were asked for; `kept` of them fit where tasks are many.
        left_out: documents that are not on the page.
        cut: texts that are not whole.
        samples: answers on the page, over all cells.
        texts: whether any prompt is known.
    """

    def __init__(self, cells: Cells, wanted: int) -> None:
        self._cells, self.wanted = cells, wanted
        leaves = {t for r in cells.records for t in (r.by_task or [str(r.inputs["task"])])}
        self.kept = min(wanted, max(1, MOST // max(1, len(leaves)))) if wanted else 0
        self.left_out = self.cut = self.samples = 0
        self.texts = False
        self._documents: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
        self._outside: set[tuple[Any, ...]] = set()
        self._used: set[int] = set()

    def add(
        self, index: int, record: Record, samples: list[dict[str, Any]], texts: dict[tuple[str, int], dict[str, Any]]
    ) -> None:
        """Take a cell's first documents of each of its tasks; `index` numbers the cell."""
        if not self.kept:
            return
        filters: dict[str, set[str]] = {}
        ids: dict[str, set[int]] = {}
        for s in samples:
            filters.setdefault(s["task"], set()).add(str(s.get("filter")))
            ids.setdefault(s["task"], set()).add(s["doc_id"])
        first = {task: set(sorted(found)[: self.kept]) for task, found in ids.items()}
        for s in samples:
            task = s["task"]
            which = str(s.get("filter")) if len(filters[task]) > 1 else ""
            place = (s["doc_id"], which, str(s.get("prompt_hash")), str(s.get("target_hash")))
            if s["doc_id"] not in first[task]:
                self._outside.add((task, *place))
                continue
            documents = self._documents.setdefault(task, {})
            if place not in documents:
                documents[place] = {"id": s["doc_id"], "filter": which, "answers": {}}
            document = documents[place]
            text = texts.get((task, s["doc_id"]))
            if text is not None and "prompt" not in document:
                self.texts = True
                document.update(self._text(text))
            answer = document["answers"][str(index)] = self._answer(s)
            gold, scores = s.get("metrics", {}).get("gold_ll"), answer.get("scores", [])
            if "target" not in document and finite(gold) and scores.count(round(gold, 3)) == 1:
                document["target"] = scores.index(round(gold, 3))
            self._used.add(index)
            self.samples += 1

    def data(self) -> dict[str, Any]:
        """What the page's script reads: cells by number, and documents with their answers by cell number."""
        models = len(self._cells.models) > 1
        cells = {
            str(i): (f"{r.inputs['model']['name']}: " if models else "") + self._cells.name(r)
            for i, r in enumerate(self._cells.records)
            if i in self._used
        }
        tasks = [
            {"name": task, "documents": [d for _, d in sorted(documents.items(), key=lambda item: item[0])]}
            for task, documents in sorted(self._documents.items())
        ]
        shown = {(t, *p) for t, documents in self._documents.items() for p in documents}
        self.left_out = len({(p[0], p[1]) for p in self._outside - shown})
        return {"cells": cells, "tasks": tasks}

    def _text(self, text: dict[str, Any]) -> dict[str, Any]:
        prompt = str(text.get("prompt") or "")
        if len(prompt) > HEAD + TAIL + 100:
            self.cut += 1
            gap = f"\n\n[... {len(prompt) - HEAD - TAIL} characters left out ...]\n\n"
            prompt = prompt[:HEAD] + gap + prompt[-TAIL:]
        target = text.get("target")
        choices = text.get("choices")
        return {
            "prompt": prompt,
            "choices": [self._short(c) for c in choices] if isinstance(choices, list) else None,
            "target": target if isinstance(target, int) or target is None
            else self._short("\n".join(map(str, target)) if isinstance(target, list) else target),
        }  # fmt: skip

    def _short(self, text: Any) -> str:
        text = str(text)
        if len(text) > ANSWER:
            self.cut += 1
            return f"{text[:ANSWER]} [... {len(text) - ANSWER} characters left out]"
        return text

    def _answer(self, s: dict[str, Any]) -> dict[str, Any]:
        responses = s.get("responses") or []
        facts = [[name, shown] for name, value in sorted(s.get("metrics", {}).items()) if (shown := _metric(value))]
        facts.append(["tokens", f"{s.get('tokens', '-')}"])
        if s.get("remasks"):
            facts.append(["re-masks", f"{s['remasks']}"])
        if finite(s.get("effective_sparsity")):
            facts.append(["effective sparsity", percent(s["effective_sparsity"], 1)])
        pairs = [r for r in responses if isinstance(r, list) and r and isinstance(r[0], (int, float))]
        if responses and len(pairs) == len(responses):
            likelihoods = [round(r[0], 3) if finite(r[0]) else None for r in pairs]
            known = [x for x in likelihoods if x is not None]
            chosen = likelihoods.index(max(known)) if known and len(pairs) > 1 else None
            return {"scores": likelihoods, "chosen": chosen, "facts": facts}
        texts = [r if isinstance(r, str) else str(r[0]) if isinstance(r, list) and r else str(r) for r in responses]
        return {"text": self._short("\n\n".join(texts)), "facts": facts}


def _metric(value: Any) -> str:
    """A number, or a log-likelihood and what it is counted over; other lists say nothing to a reader."""
    if isinstance(value, list):
        return f"log-likelihood {number(value[0])} over {number(value[1], like=1000)[:-2]}" if len(value) == 2 else ""
    if finite(value) and value == int(value):
        return str(int(value)).replace("-", "\u2212")
    return number(value)
