"""The documents of the sample explorer: the questions, and the answers of every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dart_eval.results import metrics
from dart_eval.results.documents import answers, written
from dart_eval.results.format import finite, number
from dart_eval.results.report.cells import ReportCell
from dart_eval.results.report.reader import CellSamples

HEAD, TAIL = 1200, 2400  # characters shown of a long text
GIST = 110  # characters of a document's line


@dataclass
class Answer:
    """The answer of a cell. `scores` are log-likelihoods of the candidates; `chosen` is the best, from 0."""

    cell: ReportCell
    facts: str
    scores: list[str] = field(default_factory=list)
    chosen: int | None = None
    text: str = ""


@dataclass
class Document:
    """A question. `right` is the right candidate, from 0; `filter` is set if a document has several filters."""

    id: int
    filter: str
    prompt: str = ""
    candidates: list[str] = field(default_factory=list)
    right: int | None = None
    reference: str = ""
    answers: list[Answer] = field(default_factory=list)

    @property
    def gist(self) -> str:
        """The end of the prompt in one line: many prompts begin alike."""
        line = " ".join(self.prompt.split())
        return line if len(line) <= GIST else f"… {line[-GIST:].partition(' ')[2]}"


Texts = Mapping[tuple[str, int], Mapping[str, Any]]  # (task, doc_id) -> prompt, choices and target


def documents(
    cells: Sequence[ReportCell], samples_of: Mapping[str, CellSamples], texts: Mapping[str, Texts]
) -> list[tuple[str, list[Document]]]:
    """Return each task with its first documents, by number, and the answers of every cell.

    Args:
        samples_of: key of a cell -> its samples.
        texts: key of a cell -> its texts.
    """
    tasks: dict[str, dict[tuple[Any, ...], Document]] = {}
    for cell in cells:
        shown = samples_of[cell.record.key].first if cell.record.key in samples_of else []
        filters = {(s["task"], s["filter"]) for s in shown}
        several = {task for task, which in filters if any(t == task and f != which for t, f in filters)}
        for s in shown:
            task, which = s["task"], s["filter"] if s["task"] in several else ""
            place = (s["doc_id"], which, s["prompt_hash"], s["target_hash"])
            document = tasks.setdefault(task, {}).setdefault(place, Document(s["doc_id"], which))
            text = texts.get(cell.record.key, {}).get((task, s["doc_id"]))
            if text is not None and not document.prompt:
                _tell(document, text)
            answer = _answer(cell, s)
            document.answers.append(answer)
            if answer.scores:  # with acc_mutual_info each candidate was asked twice (`answers`)
                document.candidates = document.candidates[: len(answer.scores)]
            gold = s["metrics"].get(metrics.GOLD)
            if document.right is None and finite(gold) and len(answer.scores) > 1:
                same = [i for i, score in enumerate(answer.scores) if score == _score(gold)]
                document.right = same[0] if len(same) == 1 else None
    return [(task, [d for _, d in sorted(found.items())]) for task, found in sorted(tasks.items())]


def _tell(document: Document, text: Mapping[str, Any]) -> None:
    """Fill in the prompt and the right answer."""
    document.prompt = _short(text.get("prompt") or "")
    target, choices = text.get("target"), text.get("choices")
    document.candidates = [_short(c).strip() for c in choices] if isinstance(choices, list) else []
    if isinstance(target, int) and document.candidates:
        document.right = target
    elif target is not None and target != text.get("prompt"):
        document.reference = _short("\n".join(map(str, target)) if isinstance(target, list) else target)


def _short(text: Any) -> str:
    text, kept = str(text), HEAD + TAIL
    if len(text) <= kept + 100:
        return text
    return f"{text[:HEAD]}\n\n[... {len(text) - kept} characters left out ...]\n\n{text[-TAIL:]}"


def _answer(cell: ReportCell, s: Mapping[str, Any]) -> Answer:
    values = {m: _metric(v) for m, v in sorted(s["metrics"].items()) if m != metrics.GOLD}
    facts = [f"{m} {shown}" for m, shown in values.items() if shown]
    facts += [f"re-masks {s['remasks']}"] if s.get("remasks") else []
    if finite(s.get("effective_sparsity")):
        facts.append(f"effective sparsity {s['effective_sparsity']:.2f}")
    made = Answer(cell, ", ".join(facts))
    responses = answers(s)
    if responses and all(isinstance(r, list) and r and finite(r[0]) for r in responses):
        scores = [r[0] for r in responses]
        made.scores = [_score(v) for v in scores]
        made.chosen = scores.index(max(scores)) if len(scores) > 1 else None
    else:
        of = written(s)
        texts = [r if isinstance(r, str) else str(r[0]) if isinstance(r, list) and r else str(r) for r in of]
        made.text = _short("\n\n".join(texts))
    return made


def _score(value: float) -> str:
    return f"{value:.3f}".replace("-", "\u2212")


def _metric(value: Any) -> str:
    """Return a number, or a log-likelihood with its unit, as text; other lists mean nothing to a reader."""
    value = int(value) if isinstance(value, bool) else value
    if isinstance(value, list):
        return f"{number(value[0])} over {value[1]}" if len(value) == 2 and all(map(finite, value)) else ""
    return "" if not finite(value) else f"{value:g}" if value == int(value) else number(value)
