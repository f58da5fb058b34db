"""The report of a results folder: verdicts, board, charts and answers, in one page."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup

from dart_eval.results import board_table, speeds
from dart_eval.results.board import CONTROL, Block, Board, Row, boards, main_metrics
from dart_eval.results.format import finite, sparsity
from dart_eval.results.inputs import matters
from dart_eval.results.report import charts
from dart_eval.results.report.answers import documents, short
from dart_eval.results.store import Scan, Store
from dart_eval.results.tables import cut_prompts
from dart_eval.results.verdict import sentence, verdicts
from dart_eval.util.text import printable

MOST = 6000  # answers on the page: 2 MB
FEW = 100  # documents below which an interval is wide enough to say so
ALIKE = ("dtype", "device", "scope", "limit", "num_fewshot")  # inputs that a reader expects to be equal
COSTS = ("memory", "state", "work", "speed")  # columns of the board
# Only the page's own script runs, whatever a name or a text contains; nothing is loaded and nothing is sent.
POLICY = "default-src 'none'; script-src 'sha256-{}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def build(store: Store, title: str | None = None, wanted: int = 50) -> str:
    """Return the page of a folder. Equal folders give equal bytes.

    Args:
        store: a folder of finished cells; samples and texts may be missing.
        title: head of the page; without it, the models' names.
        wanted: number of documents of each task shown with all answers; 0 shows none.

    Raises:
        UserError: no record that can be read.
    """
    scan = store.scan()
    scan.report()
    every = boards(store, scan.records, speeds.load_speeds(store.folder))
    prefix = {board: f"{board.model}: " if len(every) > 1 else "" for board in every}
    rows = [(board, row) for board in every for row in board.rows]
    rows.sort(key=lambda pair: (pair[1].kind != CONTROL, -pair[1].read, pair[1].label))
    cells = [(i, prefix[board], record) for i, (board, row) in enumerate(rows) for record in row.records]
    most = min(wanted, max(1, MOST // len(cells)))
    tasks, unread = documents(store, cells, most)
    numbers = {row.keys: i for i, (_, row) in enumerate(rows)}

    def columns(block: Block) -> list[board_table.BoardColumn]:
        return [column for column in board_table.columns_of(block) if {*map(column.text, block.rows)} != {"-"}]

    def link(board: Board, row: Row, of_column: Sequence[str]) -> str:
        """Return the filter of the documents of a number of the board; empty if none are on the page."""
        sections = [("task", prefix[board] + task) for task in of_column if prefix[board] + task in tasks]
        other = [] if row.kind == CONTROL else [("row", numbers.get(row.keys)), ("differ", 1)]
        return urlencode([*sections, *other], errors="replace") if sections and row.keys else ""

    files = {name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")
             for name in ("page.js", "style.css", "template.html.j2")}  # fmt: skip
    digest = base64.b64encode(hashlib.sha256(files["page.js"].encode()).digest()).decode()
    judged = functools.cache(verdicts)  # they take seconds
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    html = environment.from_string(files["template.html.j2"]).render(
        title=title or f"Pruning evaluation of {', '.join(board.model for board in every)}", boards=every, most=most,
        first={board: next((block for block in board.blocks if any(judged(block))), None) for board in every},
        board_table=board_table, verdicts=judged, sentence=sentence, cost=_cost, columns_of=columns, link=link,
        tasks=tasks, short=short,
        names=[f"{prefix[board]}{row.label}{f' {sparsity(row.sparsity)}' * bool(row.sparsity)}" for board, row in rows],
        dense=sum(row.kind == CONTROL for _, row in rows), charts=charts.inline, records=scan.records,
        warnings=_warnings(scan, store, unread), style=Markup(files["style.css"]), script=Markup(files["page.js"]),
        policy=POLICY.format(digest),
    )  # fmt: skip
    return printable(html, lines=True)


def _cost(block: Block, row: Row) -> str:
    """Return what a row costs beside the bytes that it reads: ` (memory 71 MB, work +0.13 %)`."""
    texts = {column.name: column.text(row) for column in board_table.columns_of(block) if column.name in COSTS}
    costs = [f"{name} {text}" for name, text in texts.items() if text not in ("-", "none")]
    return f" ({', '.join(costs)})" if costs else ""


def _warnings(scan: Scan, store: Store, unread: dict[str, list[str]]) -> list[str]:
    """Return sentences about weak or incomparable numbers, and about what is missing."""
    values: dict[str, set[str]] = {}
    for record in scan.records:
        own = {name: record.inputs.get(name) for name in ALIKE if matters(name, record.inputs)}
        for name, value in {**own, **(record.inputs.get("versions") or {})}.items():
            values.setdefault(f"Cells differ in {name}", set()).add("default" if value is None else str(value))
    named = {
        f"Fewer than {FEW} documents, so that with more the order may change":
            [m.task for record in scan.records for m in main_metrics(record) if m.n < FEW],
        **{name: sorted(texts) for name, texts in values.items() if len(texts) > 1},
        "No finite value": [f"{m.task} {m.label} under {record.inputs['method']}" for record in scan.records
                            for m in record.metrics if m.part_of is None and not finite(m.value)],
        "Failed, see the folder failed":
            sorted(file.stem.rpartition("-")[0] for file in (store.folder / "failed").glob("*.txt")),
        "Records that cannot be read": [file.name for file in scan.unread],
        **unread,
    }  # fmt: skip
    return [
        *cut_prompts(scan.records),
        *(f"{what}: {', '.join(dict.fromkeys(names))}." for what, names in named.items() if names),
    ]
