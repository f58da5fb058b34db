"""The tables of results/board.md, from one folder a model: all rows side by side, and the test of each sentence.

    python scripts/board_page.py TESTS.yaml 270M 0.5B 1.5B [--picture FILE.svg]

The file is a list of `{sentence: 1, model: 270M, tasks: drift, a: grinqh at 30 %, b: dense on q4_k}`, where tasks are
`drift`, `no switch`, `choice` or one task, and rows are named as in the table. A difference is of nats per word, or of
points; it is positive if A is better. Holm's p is over all tests of the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from dart_eval.results import metrics, stats
from dart_eval.results.board import CONTROL, GUESSING, Block, Board, Row, boards
from dart_eval.results.inputs import NOISE
from dart_eval.results.record import Record
from dart_eval.results.report import charts
from dart_eval.results.store import Store
from dart_eval.results.tables import APART, columns_of, read_of

GSM8K = "gsm8k_cot_zeroshot"
PARTS = {
    "drift": ("drift_xsum", "drift_cnn_dailymail"), "drift_xsum": ("drift_xsum",),
    "no switch": ("drift_xsum_same", "drift_cnn_dailymail_same"), "wikitext": ("wikitext",),
    "choice": ("arc_easy", "arc_challenge", "boolq", "winogrande", "openbookqa", "rte", "hellaswag"),
    GSM8K: (GSM8K,), "cnn_dailymail": ("cnn_dailymail",),
}  # fmt: skip

PICTURED = (
    "grinqh", "graded-both", "griffin", "dart", "cats", "teal:allocation=greedy", "oracle-token",
    "dense on gptqN:32", "dense on qN_k+imatrix", "dense on N:128 bits",
)  # fmt: skip


def named(row: Row) -> str:
    """Return the name of a row in the table: a method's with the read that was asked for."""
    return row.label if not row.sparsity else f"{row.label} at {metrics.asked(row.sparsity)}"


def board_of(store: Store, records: Sequence[Record], tasks: Sequence[str]) -> Board | None:
    """Return the board of a folder's rows that ran all of some tasks. records: the folder's cells."""
    rows: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record.inputs["task"] in tasks:
            key = tuple(str(record.inputs.get(name)) for name in ("method", "params", "sparsity", "ffn_bits"))
            rows.setdefault(key, []).append(record)
    complete = [record for of_row in rows.values() if len(of_row) == len(tasks) for record in of_row]
    metric = "exact_match,flexible-extract" if GSM8K in tasks else None  # a model of chat does not end as the task asks
    return boards(store, complete, metric)[0] if complete else None


def cells(row: Row, block: Block, name: str) -> dict[str, str]:
    """Return head -> text of a row on some tasks, as `dart-eval tables` has them."""
    columns, _ = columns_of(block)
    heads = {"perplexity\nx dense": name, "above\nguessing": name}
    if name == GSM8K:
        heads = {columns[0].head: name}
    elif name.startswith("drift"):
        heads |= {"KL nats\nx noise": "KL nats, x noise", "speed\ntoday": "speed"}
    return {heads[column.head]: column.text(row) for column in columns if column.head in heads}


def table(blocks: Mapping[str, Mapping[str, Block]]) -> str:
    """Return all rows of all models side by side, in Markdown. blocks: model -> tasks -> rows."""
    texts: dict[str, dict[str, str]] = {}
    rows: dict[str, Row] = {}
    for model, of_model in blocks.items():
        for name, block in of_model.items():
            for row in (row for row in block.rows if row.kind != GUESSING):
                rows.setdefault(named(row), row)
                own = texts.setdefault(named(row), {})
                own |= {f"{model}, {head}": text for head, text in cells(row, block, name).items()}
    heads = list(dict.fromkeys(head for own in texts.values() for head in own))
    lines = [f"| read | in lines | row | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    order = {CONTROL: 0, NOISE: 1}
    for name, row in sorted(rows.items(), key=lambda item: (order.get(item[1].kind, 2), -round(item[1].read, 2))):
        fetched = metrics.percent(row.fetched) if row.fetched and row.fetched - row.read >= APART else ""
        body = " | ".join(texts[name].get(head, "") for head in heads)
        lines.append(f"| {read_of(row)} | {fetched} | {name} | {body} |")
    return "\n".join(lines)


def tests(asked: Sequence[Mapping[str, object]], blocks: Mapping[str, Mapping[str, Block]]) -> str:
    """Return the paired test of each line of a file, in Markdown."""
    found = []
    for test in asked:
        block = blocks[str(test["model"])][str(test["tasks"])]
        rows = {named(row): row for row in block.rows}
        a, b = (rows[str(test[side])].quality[block.first].better for side in "ab")
        if a is None or b is None:
            raise SystemExit(f"not tested: {test}")
        points = metrics.kind_of(block.first).percent
        found.append((test, a - b, 100 if points else 1, " points" if points else ""))
    adjusted = stats.holm([gap.p for _, gap, *_ in found])
    lines = ["| sentence | model, tasks | A | B | A better by | n | p (Holm) |", "|---|---|---|---|---|---|---|"]
    for (test, gap, scale, unit), p in zip(found, adjusted, strict=True):
        digits = 1 if unit else 3
        ends = ", ".join(f"{scale * end:.{digits}f}" for end in gap.interval or ())
        lines.append(
            f"| {test['sentence']} | {test['model']}, {test['tasks']} | {test['a']} | {test['b']} "
            f"| {scale * gap.value:+.{digits}f}{unit} [{ends}] | {len(gap.units)} | {metrics.chance(p)} |"
        )
    return "\n".join(lines)


def boards_of(folder: Path) -> dict[str, Board]:
    """Return tasks -> the board of a folder's rows on them; XSum alone where CNN/DailyMail was not run."""
    store = Store(folder)
    records = store.load()
    found = {name: board for name, tasks in PARTS.items() if (board := board_of(store, records, tasks))}
    return {name: board for name, board in found.items() if name != "drift_xsum" or "drift" not in found}


def picture(model: str, board: Board) -> bytes:
    """Return the picture of the rows that the sentences speak of, as SVG."""
    lines = {label: points for label, points in charts.curves(board, True)[1].items() if label in PICTURED}
    return charts.plot(f"{model}: perplexity after a switch of topic, x dense", lines, sorted(lines), True, "svg")


def main() -> None:
    """Print the tables, and draw the picture of the first folder."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("tests", type=Path)
    options.add_argument("folders", type=Path, nargs="+")
    options.add_argument("--picture", type=Path)
    given = options.parse_args()
    found = {folder.name: boards_of(folder) for folder in given.folders}
    blocks = {model: {name: board.blocks[0] for name, board in of_model.items()} for model, of_model in found.items()}
    print(table(blocks), tests(yaml.safe_load(given.tests.read_text(encoding="utf-8")), blocks), sep="\n\n")
    if given.picture:
        model, of_model = next(iter(found.items()))
        given.picture.write_bytes(picture(model, of_model["drift"]))


if __name__ == "__main__":
    main()
