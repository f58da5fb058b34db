"""The report of a results folder: verdicts, board, charts and answers side by side, in one page."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup

from dart_eval.results import tables
from dart_eval.results.board import CONTROL, Block, Board, Row, boards, main_metrics, verdicts
from dart_eval.results.documents import answers
from dart_eval.results.frame import dense_of
from dart_eval.results.metrics import GOLD, asked
from dart_eval.results.record import Record
from dart_eval.results.report import charts
from dart_eval.results.store import Store, UnreadSamples
from dart_eval.util.text import Json, printable

MOST = 6000  # answers on the page: 2 MB
HEAD, TAIL = 1200, 2400  # characters shown of a long text
FEW = 100  # documents below which an interval is wide enough to say so
# Only the page's own script runs, whatever a name or a text contains; nothing is loaded and nothing is sent.
POLICY = "default-src 'none'; script-src 'sha256-{}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


class Document(NamedTuple):
    """A question, with a line for the answer of each row."""

    name: str  # its number, with the member of a group and the filter if there are any
    text: Json  # prompt, choices and target, where they were stored
    answers: list[tuple[int, str, str, bool, bool]]  # row, what it said, scores, whether right, whether unlike dense's


def build(store: Store, wanted: int = 50) -> str:
    """Return the page of a folder. Equal folders give equal bytes.

    Args:
        store: a folder of finished cells; samples and texts may be missing.
        wanted: number of documents of each task shown with all answers; 0 shows none.

    Raises:
        UserError: no record that can be read.
    """
    records = store.load()
    every = boards(store, records)
    prefix = {board: f"{board.model}: " if len(every) > 1 else "" for board in every}
    rows = [(board, row) for board in every for row in board.rows]
    rows.sort(key=lambda pair: (pair[1].kind != CONTROL, -pair[1].read, pair[1].label))
    cells = [(i, prefix[board], record) for i, (board, row) in enumerate(rows) for record in row.records]
    most = min(wanted, max(1, MOST // len(cells)))
    shown, unread = _documents(store, cells, most)
    numbers = {row.keys: i for i, (_, row) in enumerate(rows)}

    def columns(block: Block) -> list[tables.Column]:
        return [column for column in tables.columns_of(block)[0] if {*map(column.text, block.rows)} != {"-"}]

    def link(board: Board, row: Row, of_column: Sequence[str]) -> str:
        """Return the filter of the documents of a number of the board; empty if none are on the page."""
        sections = [("task", prefix[board] + task) for task in of_column if prefix[board] + task in shown]
        other = [] if row.kind == CONTROL else [("row", numbers.get(row.keys)), ("differ", 1)]
        return urlencode([*sections, *other], errors="replace") if sections and row.keys else ""

    warnings = {
        f"Fewer than {FEW} documents, so that with more the order may change":
            [m.task for record in records for m in main_metrics(record) if m.n < FEW],
        "Failed, see the folder failed": sorted(file.stem for file in (store.folder / "failed").glob("*.txt")),
        "Samples or prompts that cannot be read": unread,
    }  # fmt: skip
    lists = [f"{what}: {', '.join(dict.fromkeys(names))}." for what, names in warnings.items() if names]
    files = {name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")
             for name in ("page.js", "style.css", "template.html.j2")}  # fmt: skip
    digest = base64.b64encode(hashlib.sha256(files["page.js"].encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    html = environment.from_string(files["template.html.j2"]).render(
        boards=every, most=most, made=tables, columns=columns, link=link, tasks=shown, short=_short, records=records,
        verdicts=functools.cache(verdicts),  # they take seconds
        names=[f"{prefix[board]}{row.label}{f' at {asked(row.sparsity)}' * bool(row.sparsity)}" for board, row in rows],
        dense=sum(row.kind == CONTROL for _, row in rows), warnings=[*tables.cut_prompts(records), *lists],
        charts={b: [(t, base64.b64encode(svg).decode()) for t, svg in charts.charts(b)] for b in every},
        script=Markup(files["page.js"]), style=Markup(files["style.css"]), policy=POLICY.format(digest),
    )  # fmt: skip
    return printable(html, lines=True)


def _documents(
    store: Store, cells: Sequence[tuple[int, str, Record]], most: int
) -> tuple[dict[str, list[Document]], list[str]]:
    """Return each task's first documents, and the cells whose samples or prompts cannot be read.

    Args:
        store: the folder.
        cells: number of the row, what stands before the names of its tasks, and record; dense ones first.
        most: documents of a task.
    """
    tasks: dict[str, dict[tuple[Any, ...], Document]] = {}
    unread: list[str] = []
    files: dict[object, dict[tuple[str, int], Json]] = {None: {}}  # texts, which cells of the same documents share
    said: dict[tuple[Any, ...], str] = {}
    dense = dense_of([record for *_, record in cells])
    for row, prefix, record in cells if most else ():
        samples, file, requested = [], record.files.get("texts", {}).get("name"), record.inputs["task"]
        try:
            samples = sorted(store.samples(record), key=lambda s: (s["task"], s["doc_id"]))
            files[file] = files.get(file) or store.texts(record)
        except UnreadSamples:
            unread.append(f"{record.settings.get('method', record.inputs['method'])} on {requested}")
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
            answer, score, right = _answer(s, document.text.get("choices") or ())
            said[record.key, place] = answer
            other = said.get((reference.key, place), answer) if reference else answer
            document.answers.append((row, answer, score, right, other != answer))
    return {task: [document for _, document in sorted(tasks[task].items())] for task in sorted(tasks)}, unread


def _answer(s: Json, choices: Sequence[str]) -> tuple[str, str, bool]:
    """Return what a sample says (a choice, a text or a log-likelihood), its scores, and whether its choice is right."""

    def known(value: object) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value)

    responses = answers(s)
    values = {name: value for name, value in sorted(s["metrics"].items()) if name != GOLD and known(value)}
    score = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    if not responses or not all(isinstance(r, list) and r and known(r[0]) for r in responses):
        texts = s.get("written") or responses
        return "\n\n".join(str(r[0]) if isinstance(r, list) and r else str(r) for r in texts), score, False
    likelihoods = [r[0] for r in responses]
    if len(likelihoods) == 1:
        return f"log-likelihood {likelihoods[0]:.2f}", score, False
    chosen = likelihoods.index(max(likelihoods))
    text = f"{chosen + 1}. {choices[chosen].strip() if chosen < len(choices) else ''}"
    return text, f"{score}; {' '.join(f'{v:.2f}' for v in likelihoods)}", values.get("acc") == 1


def _short(text: object) -> str:
    """Return the head and the tail of a long text."""
    text, left = str(text).strip(), len(str(text).strip()) - HEAD - TAIL
    return text if left < 100 else f"{text[:HEAD]}\n\n[... {left} characters left out ...]\n\n{text[-TAIL:]}"
