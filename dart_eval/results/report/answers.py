"""Answers side by side: the documents of each task, with the answers of dense and of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dart_eval.results.documents import answers
from dart_eval.results.format import finite
from dart_eval.results.frame import dense_of
from dart_eval.results.metrics import GOLD
from dart_eval.results.record import Record
from dart_eval.results.store import Store, UnreadSamples
from dart_eval.util.text import Json

HEAD, TAIL = 1200, 2400  # characters shown of a long text


class Answer(NamedTuple):
    """The answer of a row: a choice, a text or a log-likelihood. differs: from dense's."""

    row: int
    said: str
    score: str
    right: bool
    differs: bool


class Document(NamedTuple):
    """A question: its number, with the member of a group and the filter if there are any, and its text.

    `text` has prompt, choices and target, where they were stored.
    """

    name: str
    text: Json
    answers: list[Answer]


def documents(
    store: Store, cells: Sequence[tuple[int, str, Record]], most: int
) -> tuple[dict[str, list[Document]], dict[str, list[str]]]:
    """Return each task's first documents, and the cells whose samples or prompts cannot be read.

    Args:
        store: the folder.
        cells: number of the row, what stands before the names of its tasks, and record; dense ones first.
        most: documents of a task.
    """
    tasks: dict[str, dict[tuple[Any, ...], Document]] = {}
    unread: dict[str, list[str]] = {}
    files: dict[object, dict[tuple[str, int], Json]] = {None: {}}  # texts, which cells of the same documents share
    said: dict[tuple[Any, ...], str] = {}
    dense = dense_of([record for *_, record in cells])
    for row, prefix, record in cells if most else ():
        samples, file, requested = [], record.files.get("texts", {}).get("name"), record.inputs["task"]
        try:
            samples = sorted(store.samples(record), key=lambda s: (s["task"], s["doc_id"]))
            files[file] = files.get(file) or store.texts(record)
        except UnreadSamples:
            what = f"{'Prompts' if samples else 'Samples'} that cannot be read"
            method = record.settings.get("method", record.inputs["method"])
            unread.setdefault(what, []).append(f"{method} on {requested}")
        reference, shown = dense.get(record.key), dict[str, set[tuple[str, int]]]()
        alone = {m.task for m in record.metrics if m.part_of is None}
        for s in samples:
            task = s["task"] if s["task"] in alone else requested
            shown.setdefault(task, set()).add((s["task"], s["doc_id"]))
            if len(shown[task]) > most:
                continue
            place = (s["task"], s["doc_id"], s["filter"], s["prompt_hash"], s["target_hash"])
            names = [s["task"] if task != s["task"] else "", s["doc_id"], s["filter"] if s["filter"] != "none" else ""]
            document = tasks.setdefault(prefix + task, {}).setdefault(
                place, Document(" ".join(map(str, names)).strip(), files.get(file, {}).get(place[:2], {}), [])
            )
            answer = _answer(s, document.text.get("choices") or ())
            said[record.key, place] = answer[0]
            other = None if reference is None else said.get((reference.key, place))
            document.answers.append(Answer(row, *answer, other not in (None, answer[0])))
    return {task: [document for _, document in sorted(tasks[task].items())] for task in sorted(tasks)}, unread


def _answer(s: Json, choices: Sequence[str]) -> tuple[str, str, bool]:
    """Return what a sample says, its scores, and whether it is the right choice."""
    responses = answers(s)
    values = {name: value for name, value in sorted(s["metrics"].items()) if name != GOLD and finite(value)}
    score = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    if not responses or not all(isinstance(r, list) and r and finite(r[0]) for r in responses):
        texts = s.get("written") or responses
        return "\n\n".join(str(r[0]) if isinstance(r, list) and r else str(r) for r in texts), score, False
    likelihoods = [r[0] for r in responses]
    if len(likelihoods) == 1:
        return f"log-likelihood {likelihoods[0]:.2f}", score, False
    chosen = likelihoods.index(max(likelihoods))
    text = f"{chosen + 1}. {choices[chosen].strip() if chosen < len(choices) else ''}"
    return text, f"{score}; {' '.join(f'{v:.2f}' for v in likelihoods)}", values.get("acc") == 1


def short(text: object) -> str:
    """Return the head and the tail of a long text."""
    text, left = str(text).strip(), len(str(text).strip()) - HEAD - TAIL
    return text if left < 100 else f"{text[:HEAD]}\n\n[... {left} characters left out ...]\n\n{text[-TAIL:]}"
